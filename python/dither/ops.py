"""The operators in `torch.ops.dither`, completed: version counters, other devices, and how the library reaches them.

The C++ side registers CPU and CUDA kernels. Tensors on other devices, and machines without the compiled extension, run the
definitions in `dither.reference`.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from typing_extensions import ParamSpec

from . import reference
from .reference.optim import Hyper as Hyper

if importlib.util.find_spec("._C", __package__) is None:  # a platform without kernels
    _C: Any = None
else:
    from . import _C  # type: ignore[no-redef]

_P = ParamSpec("_P")
_T = TypeVar("_T")

_OPS = {
    "draw_": reference.noise.draw_,
    "stochastic_round_": reference.noise.stochastic_round_,
    "fused_step_": reference.optim.fused_step_,
    "sum_of_squares": reference.optim.sum_of_squares,
    "nm_select_": reference.sparsity.nm_select_,
    "masked_blend_": reference.sparsity.masked_blend_,
    "transposable_": reference.sparsity.transposable_,
    "transposable_nm_": reference.sparsity.transposable_nm_,
    "pack24_": reference.sparsity.pack24_,
    "unpack24_": reference.sparsity.unpack24_,
    "ghost_norm_": reference.privacy.ghost_norm_,
    "sample_squares_": reference.privacy.sample_squares_,
    "embedding_norm_": reference.privacy.embedding_norm_,
    "scale_rows_": reference.privacy.scale_rows_,
    "affine_sample_grads_": reference.privacy.affine_sample_grads_,
    "conv_sample_grads_": reference.privacy.conv_sample_grads_,
    "lazy_rows_": reference.lazy.lazy_rows_,
    "lazy_append_": reference.lazy.lazy_append_,
    "exact_accumulate_": reference.exact.exact_accumulate_,
    "exact_noise_": reference.exact.exact_noise_,
    "topk_tokens_": reference.token_merging.topk_tokens_,
    "bipartite_match_": reference.token_merging.bipartite_match_,
    "gather_tokens_": reference.token_merging.gather_tokens_,
    "token_segments_": reference.token_merging.token_segments_,
    "merge_tokens_": reference.token_merging.merge_tokens_,
    "merge_plan_": reference.token_merging.merge_plan_,
    "attention_lse_": reference.tokens.attention_lse_,
    "attention_colsum_": reference.tokens.attention_colsum_,
    "attention_pagerank_": reference.tokens.attention_pagerank_,
    "sinkhorn_": reference.transport.sinkhorn_,
    "plan_": reference.transport.plan_,
    "plan_sums_": reference.transport.plan_sums_,
    "newton_direction_": reference.transport.newton_direction_,
    "schur_matrix_": reference.transport.schur_matrix_,
    "wasserstein_rows_": reference.sliced.wasserstein_rows_,
    "rows_": reference.sampling.rows_,
    "gram_": reference.sampling.gram_,
    "quantile_": reference.sampling.quantile_,
}

native: Any
"""Where the library finds its operators: `torch.ops.dither`, or the reference where nothing was compiled."""

if _C is None:
    native = SimpleNamespace(**_OPS)
else:
    native = torch.ops.dither
    _library = torch.library.Library("dither", "IMPL")

    def _complete(name: str) -> None:
        op = getattr(torch.ops.dither, name).default
        written = {i: a.name for i, a in enumerate(op._schema.arguments) if a.alias_info and a.alias_info.is_write}

        def bump(keyset: Any, *args: Any) -> Any:
            """Count in-place writes, so that autograd notices a stale saved tensor (as it does for aten's own)."""
            for i in written:
                if args[i] is not None:
                    torch.autograd.graph.increment_version(args[i])
            with torch._C._AutoDispatchBelowADInplaceOrView():
                return op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)

        def nothing(*args: Any) -> None:
            """On meta and fake tensors there is nothing to write; on others it would be missing."""
            for i, argument in written.items():
                for t in args[i] if isinstance(args[i], (list, tuple)) else [args[i]]:
                    if t is not None and t.device.type != "meta":
                        raise ValueError(f"{name}: {argument} is on {t.device}, expected meta like the other tensors")

        if written:
            _library.impl(name, bump, "ADInplaceOrView", with_keyset=True)
        if not op._schema.returns:
            _library.impl(name, nothing, "Meta")
        _library.impl(name, _OPS[name], "CompositeExplicitAutograd")

    for _name in _OPS:
        _complete(_name)
    torch.library.register_fake("dither::sum_of_squares", lambda tensors: tensors[0].new_empty((), dtype=torch.float64))
    if "DITHER_CPU_CAPABILITY" in os.environ:
        _C.set_cpu_capability(os.environ["DITHER_CPU_CAPABILITY"])


def write(name: str, written: Any, *args: Any) -> None:
    """`native.<name>(*args)`, of whose arguments `written` are the ones that autograd may have saved.

    What the dispatcher would do in Python on the way to the kernel is done here, in half the time.
    """
    op = getattr(native, name)
    if _C is None or torch.compiler.is_compiling():
        op(*args)
        return
    torch.autograd.graph.increment_version(written)
    with torch._C._AutoDispatchBelowADInplaceOrView():
        getattr(op, "default", op)(*args)


def uncompiled(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """`torch.compiler.disable(function)`, which imports the compiler, as large as torch, only where something compiles."""
    disabled = torch._disable_dynamo(function)

    @functools.wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        return disabled(*args, **kwargs) if torch.compiler.is_compiling() else function(*args, **kwargs)

    return run


def kernel(name: str) -> Callable[..., None]:
    """`native.<name>` for calls whose written tensors are new: autograd has saved none of them, and versions stay."""
    op = getattr(native, name)
    if _C is None or torch.compiler.is_compiling():
        return op  # type: ignore[no-any-return]
    call, below = getattr(op, "default", op), torch._C._AutoDispatchBelowADInplaceOrView

    def run(*args: Any) -> None:
        with below():
            call(*args)

    return run


def row(table: list[list[float]], draw: int, limit: float | None) -> Callable[..., bool] | None:
    """row(out, inputs, seeds, numel, samples): `rows_` of a [rows, columns] table, without the dispatcher, if `direct` says so.

    For new outputs and inputs that were contiguous, of one shape, on the CPU. False, with nothing done, where someone set the
    data of an input since: `rows_` says what is wrong with it. None where nothing was compiled.
    """
    return None if _C is None else _C.row(table, draw, limit)  # type: ignore[no-any-return]


def direct() -> bool:
    """Whether kernels may be called without the dispatcher: nothing traces, transforms or watches the operators."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch.autograd._profiler_enabled()
    )


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """`function.apply(*args)`, which outside of torch.func spends most of its time on defaults that are not there."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


def build_info() -> dict[str, Any]:
    """How the extension was built and what it runs on.

    Returns a dict with `version`, `compiled` (False where `dither.reference` does the work), `compiler`,
    `cpu_instruction_sets` (in the binary), `cpu_usable` (on this machine), `cpu_capability` (in use; forced with the
    environment variable `DITHER_CPU_CAPABILITY=default|avx2|avx512`), `cuda_architectures` ("" for a CPU-only build) and
    `torch`.
    """
    from . import __version__

    info: dict[str, Any] = {"version": __version__, "compiled": _C is not None, "torch": torch.__version__}
    if _C is not None:
        info.update(_C.build_info())
    return info
