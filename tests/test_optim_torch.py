"""dither's optimizers among the tools of torch: checkpoints, hooks, schedulers, scaling, compilation, averaging."""

import copy
import inspect
import io
import math
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

from dither import optim
from optim_table import ROWS

Lib = Any  # torch.optim or dither.optim

# name: class, arguments, names of the states
PAIRS: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "sgd": ("SGD", {"lr": 0.1, "weight_decay": 0.1}, set()),
    "momentum": ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1}, {"momentum_buffer"}),
    "nesterov": ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}, {"momentum_buffer"}),
    "adam": ("Adam", {"lr": 0.1, "weight_decay": 0.1}, {"exp_avg", "exp_avg_sq"}),
    "adamw": ("AdamW", {"lr": 0.1, "weight_decay": 0.1, "betas": (0.8, 0.9)}, {"exp_avg", "exp_avg_sq"}),
    "amsgrad": ("AdamW", {"lr": 0.1, "amsgrad": True}, {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}),
    "adamax": ("Adamax", {"lr": 0.1, "weight_decay": 0.1}, {"exp_avg", "exp_inf"}),
    "nadam": (
        "NAdam",
        {"lr": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": True},
        {"exp_avg", "exp_avg_sq", "mu_product"},
    ),
    "adagrad": ("Adagrad", {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.1}, {"sum"}),
    "rmsprop": ("RMSprop", {"lr": 0.1, "weight_decay": 0.1}, {"square_avg"}),
    "rmsprop all": (
        "RMSprop",
        {"lr": 0.1, "momentum": 0.5, "centered": True},
        {"square_avg", "momentum_buffer", "grad_avg"},
    ),
}
FUSED = {"SGD", "Adam", "AdamW", "Adagrad"}  # torch has fused CPU kernels of
pairs = pytest.mark.parametrize("pair", PAIRS)


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((4, 3), (), (5,), (2, 3, 2))]


def train(opt: torch.optim.Optimizer, steps: Iterable[int]) -> list[Tensor]:
    """Steps with given gradients; the parameters after them."""
    ps = [p for group in opt.param_groups for p in group["params"]]
    for t in steps:
        generator = torch.Generator().manual_seed(t)
        for p in ps:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        opt.step()
    return [p.detach().clone() for p in ps]


def trained(make: Callable[..., Any], steps: int = 3, dtype: torch.dtype = torch.float32, **arguments: Any) -> Any:
    opt = make(parameters(dtype), **arguments)
    train(opt, range(steps))
    return opt


def continued(
    make: Callable[..., Any], start: torch.optim.Optimizer, state: dict[str, Any] | None = None, **arguments: Any
) -> Any:
    """An optimizer of copies of the parameters of another, with its state."""
    ps = [nn.Parameter(p.detach().clone()) for group in start.param_groups for p in group["params"]]
    opt = make(ps, **arguments)
    opt.load_state_dict(state or start.state_dict())
    return opt


def tensors_of(state_dict: dict[str, Any]) -> dict[tuple[Any, str], Any]:
    return {(i, name): value for i, state in state_dict["state"].items() for name, value in state.items()}


def assert_same_bits(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


# ---- signatures and keywords


@pytest.mark.parametrize("name", sorted({name for name, _, _ in PAIRS.values()}))
def test_signature(name):
    ours, theirs = inspect.signature(getattr(optim, name)).parameters, inspect.signature(getattr(torch.optim, name)).parameters
    positional = [p.name for p in ours.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == list(theirs)[: len(positional)], "the same order of arguments"
    required = [p.name for p in ours.values() if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    assert required == ["params"]
    defaults = getattr(optim, name)([nn.Parameter(torch.zeros(1))]).defaults
    for p in list(theirs.values())[1:]:
        assert defaults[p.name] == p.default, p.name
        if p.name in ours:
            assert ours[p.name].default == p.default, p.name
    assert set(getattr(torch.optim, name)([nn.Parameter(torch.zeros(1))]).defaults) <= set(defaults)


@pairs
@pytest.mark.parametrize("keyword", [{"foreach": True}, {"fused": True}, {"capturable": True}, {"maximize": True}], ids=str)
def test_keywords_of_torch(pair, keyword):
    name, arguments, _ = PAIRS[pair]
    plain = {} if "capturable" in keyword or (keyword.get("fused") and name not in FUSED) else keyword
    ours = train(getattr(optim, name)(parameters(), **arguments, **keyword), range(3))
    torch.testing.assert_close(ours, train(getattr(torch.optim, name)(parameters(), **arguments, **plain), range(3)))


REFUSED: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("Adam", {"differentiable": True}, ValueError, "no backward"),
    ("Adam", {"nonsense": 1}, TypeError, "unexpected keyword 'nonsense'"),
    ("Adam", {"lr": -1.0}, ValueError, "lr is -1"),
    ("Adam", {"lr": float("nan")}, ValueError, "lr is nan"),
    ("Adam", {"betas": (0.9, 1.0)}, ValueError, r"betas\[1\] is 1"),
    ("Adam", {"state_dtype": torch.int8}, ValueError, "state_dtype is torch.int8"),
    ("SGD", {"nesterov": True}, ValueError, "nesterov"),
    ("RMSprop", {"momentum": -0.1}, ValueError, "momentum is -0.1"),
    ("SGLD", {"temperature": 0.0}, ValueError, "temperature 0"),
]


@pytest.mark.parametrize("name, arguments, error, message", REFUSED, ids=lambda x: str(x))
def test_arguments_are_checked(name, arguments, error, message):
    with pytest.raises(error, match=message):
        getattr(optim, name)(parameters(), **arguments)
    if error is ValueError and name not in ("SGD", "SGLD"):  # in one group too; these two compare arguments of the class
        with pytest.raises(error, match=message):
            getattr(optim, name)([{"params": parameters(), **arguments}])


# ---- checkpoints


@pairs
def test_state_has_the_names_of_torch(pair):
    name, arguments, slots = PAIRS[pair]
    state = trained(getattr(optim, name), **arguments).state_dict()["state"]
    theirs = trained(getattr(torch.optim, name), **arguments).state_dict()["state"]
    assert list(state) == [0, 1, 2, 3]
    for i, (p, of_p) in enumerate(zip(parameters(), state.values())):
        tensors = {k for k, v in of_p.items() if isinstance(v, Tensor)}
        assert tensors == slots | {"step"} and tensors >= {k for k, v in theirs.get(i, {}).items() if v is not None}
        assert of_p["step"].shape == () and of_p["step"] == 3 and of_p["stream"] == i
        assert all(of_p[k].shape == p.shape and of_p[k].dtype == p.dtype for k in slots - {"mu_product"})


VARIANTS = [(pair, how) for pair in PAIRS for how in ("for", "foreach", "fused") if how != "fused" or PAIRS[pair][0] in FUSED]


@pytest.mark.parametrize("pair, how", VARIANTS)
def test_checkpoints_move_both_ways(pair, how):
    """Three steps of one library, then three of each from the same checkpoint."""
    name, arguments, _ = PAIRS[pair]
    variant = {"foreach": False} if how == "for" else {how: True}
    ours, theirs = getattr(optim, name), getattr(torch.optim, name)
    for first in (ours, theirs):
        start = trained(first, **arguments, **(variant if first is theirs else {}))
        a, b = (continued(lib, start, lr=7.0, **(variant if lib is theirs else {})) for lib in (ours, theirs))
        torch.testing.assert_close(train(a, range(3, 6)), train(b, range(3, 6)))
        a, b = (tensors_of(opt.state_dict()) for opt in (a, b))
        for key, value in b.items():
            if isinstance(value, Tensor) and not (name == "SGD" and key[1] == "step"):  # torch's SGD counts no steps
                torch.testing.assert_close(a[key], value, check_dtype=False)


STEPS: dict[str, Callable[[Tensor], Any]] = {
    "number": float,
    "integer": int,
    "one element": lambda step: step.view(1),
    "float64": Tensor.double,
    "int64": Tensor.long,
}


@pytest.mark.parametrize("form", STEPS)
@pytest.mark.parametrize("pair", ["adamw", "nadam", "adagrad"])
def test_step_of_any_form(pair, form):
    name, arguments, _ = PAIRS[pair]
    start = trained(getattr(torch.optim, name), **arguments)
    state = copy.deepcopy(start.state_dict())
    for of_p in state["state"].values():
        of_p["step"] = STEPS[form](of_p["step"])
        if form == "float64" and "mu_product" in of_p:
            of_p["mu_product"] = of_p["mu_product"].double()
    opt = continued(getattr(optim, name), start, state)
    assert all(st["step"].shape == () and st["step"] == 3 for st in opt.state.values())
    torch.testing.assert_close(train(opt, range(3, 6)), train(start, range(3, 6)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("state_dtype", [None, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_states_keep_their_dtype(dtype, state_dtype):
    expected = state_dtype or (dtype if dtype == torch.float64 else torch.float32)
    arguments = {"amsgrad": True, "grokfast_lamb": 0.5, "noise_eta": 0.01, "stochastic_rounding": True, "seed": 5}
    opt = optim.AdamW(parameters(dtype), state_dtype=state_dtype, **arguments)
    for p in opt.param_groups[0]["params"]:
        opt.set_mask(p, torch.rand(p.shape) < 0.7)
    train(opt, range(3))
    other = continued(optim.AdamW, opt)
    dtypes = dict.fromkeys(("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), expected)
    dtypes["grokfast_ema"] = torch.float64 if dtype == torch.float64 else torch.float32
    for (name, a), b in zip(tensors_of(opt.state_dict()).items(), tensors_of(other.state_dict()).values()):
        assert_same_bits(a, b)
        assert not isinstance(a, Tensor) or a.data_ptr() != b.data_ptr()
        if name[1] in dtypes:
            assert a.dtype == b.dtype == dtypes[name[1]]
    assert other.state_dict()["state"][2]["mask"].dtype == torch.uint8
    assert other.param_groups[0]["seed"] == 5 and other.param_groups[0]["state_dtype"] == state_dtype
    assert_same_bits(train(other, range(3, 6)), train(opt, range(3, 6)))


def test_states_of_bfloat16_in_torch():
    """torch keeps bfloat16 states: they stay so here, and ours become so there."""
    start = trained(torch.optim.AdamW, dtype=torch.bfloat16)
    ours = continued(optim.AdamW, start)
    assert {st["exp_avg"].dtype for st in ours.state.values()} == {torch.bfloat16}
    torch.testing.assert_close(train(ours, [3]), train(start, [3]))
    theirs = continued(torch.optim.AdamW, trained(optim.AdamW, dtype=torch.bfloat16))
    assert {st["exp_avg"].dtype for st in theirs.state.values()} == {torch.bfloat16}
    train(theirs, [3])


FOREIGN = [
    (torch.optim.SGD, {"momentum": 0.9}, optim.AdamW),
    (torch.optim.Adam, {}, optim.SGD),
    (torch.optim.Adam, {}, optim.NAdam),
    (torch.optim.Adam, {}, optim.Adamax),
    (torch.optim.Adam, {}, optim.Lion),
    (torch.optim.Adam, {}, optim.Ano),
    (torch.optim.AdamW, {}, optim.ADOPT),
    (torch.optim.AdamW, {}, optim.AdaBelief),
    (torch.optim.RAdam, {}, optim.Adam),
    (torch.optim.Adadelta, {}, optim.RMSprop),
    (torch.optim.RMSprop, {}, optim.Adagrad),
    (torch.optim.Adagrad, {}, optim.RMSprop),
    (optim.Lion, {}, optim.Adam),
    (optim.ADOPT, {}, optim.Adam),
    (optim.DiffGrad, {}, optim.Adam),
    (optim.Adamax, {}, optim.DiffGrad),
    (optim.SGLD, {}, optim.SGD),
]


def change(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """A change of a state_dict at a path; None removes."""

    def apply(state: dict[str, Any]) -> None:
        *way, last = [int(k) if k.isdigit() else k for k in path.split("/")]
        for key in way:
            state = state[key]
        if value is None:
            del state[last]
        else:
            state[last] = value

    return apply


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "no state": (change("state", None), "no 'state'"),
    "no groups": (change("param_groups", None), "no 'param_groups'"),
    "lacks a slot": (change("state/1/exp_avg_sq", None), r"params\[1\] holds \['exp_avg', .*expected 'exp_avg_sq'"),
    "lacks step": (change("state/2/step", None), r"params\[2\] .*expected 'step'"),
    "wrong shape": (change("state/2/exp_avg", torch.zeros(4)), r"params\[2\] has 'exp_avg' of shape \[4\], expected \[5\]"),
    "same size": (change("state/0/exp_avg_sq", torch.zeros(3, 4)), r"'exp_avg_sq' of shape \[3, 4\], expected \[4, 3\]"),
    "not a tensor": (change("state/0/exp_avg", {}), "'exp_avg' of shape dict"),
    "wrong mask": (change("state/0/mask", torch.zeros(1, dtype=torch.uint8)), r"'mask' of shape \[1\], expected \[2\]"),
    "wrong average": (change("state/0/grokfast_ema", torch.zeros(1)), "'grokfast_ema' of shape"),
    "too few": (change("param_groups/0/params/3", None), "doesn't match the size"),
    "too many groups": (lambda state: state["param_groups"].append({**state["param_groups"][0]}), "number of parameter groups"),
    "not of this class": (change("param_groups/0/amsgrad", None), "lacks 'amsgrad'"),
    "step of many": (change("state/0/step", torch.zeros(3)), r"params\[0\] has 'step' tensor"),
    "step of text": (change("state/0/step", "x"), r"params\[0\] has 'step' 'x', expected one finite number"),
    "step nan": (change("state/1/step", math.nan), r"params\[1\] has 'step' nan, expected one finite number >= 0"),
    "integer slot": (change("state/0/exp_avg", torch.zeros(4, 3, dtype=torch.int64)), "'exp_avg' of torch.int64"),
    "stream": (change("state/0/stream", -1), "'stream' -1, expected 0 <= stream"),
}


def assert_refuses(opt: torch.optim.Optimizer, state: dict[str, Any], message: str) -> None:
    """The optimizer refuses the state and goes on as if nothing had been."""
    before, twin = copy.deepcopy(opt.state_dict()), continued(type(opt), opt)
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(state)
    after = opt.state_dict()
    assert before["param_groups"] == after["param_groups"]
    assert_same_bits(tensors_of(before), tensors_of(after))
    assert not opt._optimizer_load_state_dict_pre_hooks and not opt._optimizer_load_state_dict_post_hooks
    assert_same_bits(train(opt, [9]), train(twin, [9]))


@pytest.mark.parametrize("source, arguments, target", FOREIGN, ids=lambda x: getattr(x, "__name__", ""))
def test_state_of_another_optimizer_is_refused(source, arguments, target):
    message = f"{target.__name__}.load_state_dict: .* expected"
    assert_refuses(trained(target, noise_eta=0.1), trained(source, **arguments).state_dict(), message)


@pytest.mark.parametrize("case", BROKEN)
def test_broken_state_is_refused(case):
    spoil, message = BROKEN[case]
    state = copy.deepcopy(trained(optim.AdamW).state_dict())
    spoil(state)
    assert_refuses(trained(optim.AdamW), state, message)


def test_entries_that_the_user_adds_to_a_group_survive():
    """Even under the names of hyperparameters of other optimizers, or of arguments of a subclass."""

    class Named(optim.SGD):
        def __init__(self, params, lr=1e-3, name="x"):
            super().__init__(params, lr)

    assert Named
    for entries in ({"lr_decay": 0.9}, {"name": "head", "momentum": 0.5}):
        start = optim.AdamW([{"params": parameters(), **entries}])
        train(start, range(2))
        for other in (optim.AdamW(parameters()), optim.AdamW([{"params": parameters(), **entries}])):
            other.load_state_dict(start.state_dict())
            assert entries.items() <= other.param_groups[0].items()
            assert_same_bits(tensors_of(other.state_dict()), tensors_of(start.state_dict()))


def test_amsgrad_stays_amsgrad():
    """torch.optim.Adam's checkpoints say amsgrad False; only those with the largest averages fit."""
    opt = optim.AMSGrad(parameters())
    opt.load_state_dict(trained(torch.optim.Adam, amsgrad=True).state_dict())
    opt.param_groups[0]["amsgrad"] = False
    before = [st["max_exp_avg_sq"].clone() for st in opt.state.values()]
    train(opt, [3])
    assert any(not torch.equal(b, st["max_exp_avg_sq"]) for b, st in zip(before, opt.state.values()))
    assert_refuses(trained(optim.AMSGrad), trained(torch.optim.Adam).state_dict(), "expected 'max_exp_avg_sq'")


def test_nadam_through_torch_in_float64():
    start = trained(torch.optim.NAdam, dtype=torch.float64)
    start.load_state_dict(start.state_dict())  # casts mu_product
    train(continued(optim.NAdam, start), [3])


def test_masks_go_through_torch():
    """torch turns the bits into numbers of the parameter's dtype."""
    for dtype in (torch.float32, torch.bfloat16):
        start = trained(optim.AdamW, dtype=dtype)
        for p in start.param_groups[0]["params"]:
            start.set_mask(p, torch.rand(p.shape) < 0.6)
        back = continued(optim.AdamW, continued(torch.optim.AdamW, start))
        for a, b in zip(start.state.values(), back.state.values()):
            assert torch.equal(a["mask"], b["mask"]) and b["mask"].dtype == torch.uint8


def test_checkpoint_of_torch_keeps_the_extras_of_each_group():
    a, b = parameters(), parameters()
    start = torch.optim.AdamW([{"params": a[:2]}, {"params": a[2:], "lr": 0.5}])
    train(start, range(3))
    opt = optim.AdamW([{"params": b[:2], "noise_eta": 0.1, "seed": 3}, {"params": b[2:], "clip_value": 0.5}])
    opt.load_state_dict(start.state_dict())
    first, second = opt.param_groups
    assert (first["noise_eta"], first["seed"], first["lr"], first["clip_value"]) == (0.1, 3, 1e-3, None)
    assert (second["noise_eta"], second["seed"], second["lr"], second["clip_value"]) == (0.0, None, 0.5, 0.5)
    assert [st["stream"] for st in opt.state.values()] == [0, 1, 2, 3], "torch numbers nothing"
    train(opt, range(3, 5))


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_interrupted_run_has_the_same_bits(row, dtype, tmp_path):
    """Gradient noise, stochastic rounding, masks, clipping and a schedule; through files."""
    mask = torch.arange(12).view(4, 3) % 3 != 0
    file = tmp_path / "checkpoint"

    def run(parts: list[range]) -> list[Tensor]:
        ps = parameters(dtype)
        for part in parts:
            torch.manual_seed(part.start)  # the noise's seed is drawn in the first part and kept
            extras = {"noise_eta": 0.01, "stochastic_rounding": True, "max_norm": 1.0, "grokfast_lamb": 0.5}
            opt = ROWS[row]([{"params": ps[:1]}, {"params": ps[1:], "weight_decay": 0.2}], **extras)
            scheduler = schedulers.StepLR(opt, 2, 0.5)
            if part.start:
                saved = torch.load(file, weights_only=True)
                opt.load_state_dict(saved["opt"])
                scheduler.load_state_dict(saved["scheduler"])
            else:
                opt.set_mask(ps[0], mask)
            for t in part:
                train(opt, [t])
                scheduler.step()
            torch.save({"ps": ps, "opt": opt.state_dict(), "scheduler": scheduler.state_dict()}, file)
            ps = [nn.Parameter(p) for p in torch.load(file, weights_only=True)["ps"]]
        return [p.detach() for p in ps]

    first, straight = parameters(dtype)[0].detach(), run([range(6)])
    assert_same_bits(run([range(2), range(2, 3), range(3, 6)]), straight)
    assert_same_bits(straight[0][~mask], first[~mask])
    assert not torch.equal(straight[0][mask], first[mask])


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "torch.save": lambda x: torch.load(io.BytesIO(saved_bytes(x)), weights_only=False),
}


def saved_bytes(x: Any) -> bytes:
    file = io.BytesIO()
    torch.save(x, file)
    return file.getvalue()


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("how", COPIES)
def test_copies(row, how):
    opt = ROWS[row](parameters(), noise_eta=0.1)
    opt.set_mask(opt.param_groups[0]["params"][0], torch.rand(4, 3) < 0.5)
    train(opt, range(2))
    model, twin = COPIES[how]((opt.param_groups[0]["params"], opt))
    assert all(a is b for a, b in zip(model, twin.param_groups[0]["params"])), "the copy steps the copied parameters"
    assert_same_bits(train(twin, range(2, 4)), train(opt, range(2, 4)))
    assert repr(twin) == repr(opt)


def test_states_that_the_user_adds_survive():
    opt = trained(optim.AdamW)
    p = opt.param_groups[0]["params"][0]
    opt.state[p]["mine"] = torch.arange(3)
    opt.param_groups[0]["tag"] = "x"
    other = continued(optim.AdamW, opt)
    (state, *_), (group,) = other.state.values(), other.param_groups
    assert state["mine"].tolist() == [0, 1, 2] and state["mine"].dtype == torch.int64 and group["tag"] == "x"


def test_hooks():
    calls: list[str] = []

    def note(name: str, result: Any = None) -> Callable[..., Any]:
        return lambda *_: (calls.append(name), result)[1]

    opt = optim.AdamW(parameters(torch.bfloat16))
    handles = [opt.register_step_pre_hook(note("before step")), opt.register_step_post_hook(note("after step"))]
    train(opt, [0])
    handles += [opt.register_state_dict_pre_hook(note("before save")), opt.register_state_dict_post_hook(note("after save"))]
    state = opt.state_dict()

    def replace(_: Any, given: dict[str, Any]) -> dict[str, Any]:
        calls.append("before load")
        assert given is not state and given["state"] is state["state"]
        return {**given, "state": {i: {**st, "step": torch.tensor(41.0)} for i, st in given["state"].items()}}

    def look(loaded: optim.AdamW) -> None:
        calls.append("after load")
        assert all(st["exp_avg"].dtype == torch.float32 and st["step"] == 41 for st in loaded.state.values())
        for st in loaded.state.values():
            st["exp_avg"].fill_(2)

    handles += [opt.register_load_state_dict_pre_hook(replace), opt.register_load_state_dict_post_hook(look)]
    opt.load_state_dict(state)
    assert calls == ["before step", "after step", "before save", "after save", "before load", "after load"]
    assert all((st["exp_avg"] == 2).all() for st in opt.state.values()), "what the hook did stays"
    for handle in handles:
        handle.remove()
    train(opt, [1])
    opt.load_state_dict(opt.state_dict())
    assert len(calls) == 6


# ---- training as torch.optim does


def data(seed: int = 1, n: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=generator)
    return x, torch.sin(x[:, :3])


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3))


def loss_of(model: nn.Module, seed: int = 1) -> Tensor:
    x, y = (each.to(next(model.parameters()).dtype) for each in data(seed))
    return (model(x) - y).square().mean()


def fit(
    model: nn.Module, opt: torch.optim.Optimizer, seeds: Iterable[int], after: Callable[[Tensor], Any] = lambda _: None
) -> None:
    for seed in seeds:
        opt.zero_grad()
        loss = loss_of(model, seed)
        loss.backward()
        opt.step()
        after(loss.detach())


def values(model: nn.Module) -> list[Tensor]:
    return [t.detach().clone() for t in model.state_dict().values()]


Scenario = Callable[[Lib], list[Tensor]]
SCENARIOS: dict[str, Scenario] = {}


def scenario(f: Scenario) -> Scenario:
    """A run whose result must not depend on the library."""
    SCENARIOS[f.__name__] = f
    return f


@scenario
def tensor_lr(lib):
    model, lr = network(), torch.tensor(0.1)
    opt = lib.Adam(model.parameters(), lr=lr)
    fit(model, opt, range(3))
    lr.fill_(0.01)
    fit(model, opt, range(3))
    opt.param_groups[0]["lr"] = 0.05
    fit(model, opt, range(3))
    return values(model)


@scenario
def tensor_betas_and_decay(lib):
    model = network()
    betas = (torch.tensor(0.8), torch.tensor(0.9))
    fused = {"foreach": False} if lib is torch.optim else {}
    fit(model, lib.AdamW(model.parameters(), torch.tensor(0.1), betas, weight_decay=0.1, **fused), range(3))
    return values(model)


@scenario
def group_added_later(lib):
    model = network()
    opt = lib.AdamW(model[0].parameters(), lr=0.1)
    fit(model, opt, range(3))
    opt.add_param_group({"params": model[2].parameters(), "lr": 0.01, "weight_decay": 0.5})
    opt.add_param_group({"params": model[3].weight})
    fit(model, opt, range(3))
    return values(model)


@scenario
def named_parameters(lib):
    model = network()
    opt = lib.SGD(list(model.named_parameters()), lr=0.1, momentum=0.9)
    fit(model, opt, range(2))
    state = opt.state_dict()
    assert state["param_groups"][0]["param_names"] == [name for name, _ in model.named_parameters()]
    opt = lib.SGD(list(model.named_parameters()), lr=0.1, momentum=0.9)
    opt.load_state_dict(state)
    fit(model, opt, range(2))
    return values(model)


@scenario
def groups_of_names(lib):
    model = network()
    decayed = {"params": [(k, p) for k, p in model.named_parameters() if p.ndim > 1], "weight_decay": 0.1}
    opt = lib.AdamW([decayed, {"params": [(k, p) for k, p in model.named_parameters() if p.ndim == 1]}], weight_decay=0)
    fit(model, opt, range(3))
    return values(model)


@scenario
def closure(lib):
    model = network()
    opt = lib.NAdam(model.parameters(), lr=0.05)

    def evaluate() -> Tensor:
        opt.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    return [opt.step(evaluate).detach() for _ in range(3)] + values(model)


@scenario
def accumulated_gradients(lib):
    model = network()
    opt = lib.AdamW(model.parameters(), lr=0.05)
    for i in range(9):
        (loss_of(model, i) / 3).backward()
        if i % 3 == 2:
            opt.step()
            opt.zero_grad(set_to_none=i < 4)
    return values(model)


@scenario
def several_optimizers(lib):
    model = network()
    a, b = lib.SGD(model[0].parameters(), lr=0.1, momentum=0.9), lib.AdamW(model[3].parameters(), lr=0.05)
    for seed in range(4):
        a.zero_grad(), b.zero_grad()
        loss_of(model, seed).backward()
        a.step(), b.step()
    return values(model)


@scenario
def optimizer_in_backward(lib):
    model = network()
    each = {p: lib.AdamW([p], lr=0.05) for p in model.parameters()}

    def step(p: Tensor) -> None:
        each[p].step()
        each[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    for seed in range(4):
        loss_of(model, seed).backward()
    assert all(p.grad is None for p in model.parameters())
    return values(model)


@scenario
def averaged_models(lib):
    model = nn.Sequential(nn.BatchNorm1d(6), network())
    opt = lib.RMSprop(model.parameters(), lr=0.01)
    swa, ema = AveragedModel(model), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    scheduler = SWALR(opt, swa_lr=0.05, anneal_epochs=3)
    fit(model, opt, range(5), lambda _: (swa.update_parameters(model), ema.update_parameters(model), scheduler.step()))
    update_bn([data(i)[0] for i in range(3)], swa)
    return values(model) + values(swa) + values(ema)


@scenario
def frozen_and_unused(lib):
    model = network()
    model[0].weight.requires_grad_(False)
    unused = nn.Parameter(torch.ones(3))
    opt = lib.Adam([*model.parameters(), unused], lr=0.1, weight_decay=0.1)
    opt.step()  # no gradient anywhere
    fit(model, opt, range(2))
    assert model[0].weight not in opt.state and unused not in opt.state
    model[0].weight.requires_grad_(True)
    fit(model, opt, range(2))
    return [*values(model), unused.detach()]


@scenario
def replaced_data(lib):
    model = network()
    opt = lib.Adam(model.parameters(), lr=0.1)
    fit(model, opt, range(2))
    for p in model.parameters():
        p.data = p.data * 0.5
    model[0].weight.data = model[0].weight.data.t().contiguous().t()  # other strides
    fit(model, opt, range(2))
    return values(model)


@scenario
def replaced_data_without_states(lib):
    model = network()
    opt = lib.SGD(model.parameters(), lr=0.1)
    fit(model, opt, range(2))
    model[0].weight.data = torch.ones(6, 8).t()
    fit(model, opt, range(2))
    return values(model)


def images(memory_format: torch.memory_format) -> Scenario:
    def run(lib: Lib) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 2)).to(memory_format=memory_format)
        opt = lib.AdamW(model.parameters(), lr=0.01, amsgrad=True)
        x = torch.randn(2, 3, 6, 6)
        for changed in (None, torch.channels_last, torch.contiguous_format):
            if changed:
                model.to(memory_format=changed)
            for _ in range(2):
                opt.zero_grad()
                model(x).square().mean().backward()
                opt.step()
        return values(model)

    return run


SCENARIOS["channels first and last"] = images(torch.contiguous_format)
SCENARIOS["channels last and first"] = images(torch.channels_last)


@scenario
def scaled(lib):
    """float16-style loss scaling with overflows, two optimizers, one of them unscaled by hand."""
    model = network()
    a, b = lib.SGD(model[0].parameters(), lr=0.1, momentum=0.9), lib.AdamW(model[3].parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    scales = []
    for seed in range(8):
        a.zero_grad(), b.zero_grad()
        scaler.scale(loss_of(model, seed)).backward()
        if seed == 3:
            model[0].weight.grad[0, 0] = torch.inf
        if seed == 5:
            model[3].bias.grad[0] = torch.nan
        scaler.unscale_(b)
        nn.utils.clip_grad_norm_(model[3].parameters(), 0.5)
        scaler.step(a), scaler.step(b)
        scaler.update()
        scales.append(torch.tensor(scaler.get_scale()))
    for opt in (a, b):
        assert (lib is torch.optim and opt is a) or all(st["step"] == 7 for st in opt.state.values())
        assert not hasattr(opt, "grad_scale") and not hasattr(opt, "found_inf")
    return scales + values(model)


@scenario
def clipped_under_a_scaler(lib):
    model = network()
    ours = lib is optim
    opt = lib.AdamW(model.parameters(), lr=0.1, **({"max_norm": 0.1, "clip_value": 0.03} if ours else {}))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for seed in range(4):
        opt.zero_grad()
        scaler.scale(loss_of(model, seed)).backward()
        if not ours:
            scaler.unscale_(opt)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            nn.utils.clip_grad_value_(model.parameters(), 0.03)
        scaler.step(opt)
        scaler.update()
    return values(model)


@pytest.mark.parametrize("name", SCENARIOS)
def test_trains_as_torch(name):
    torch.testing.assert_close(SCENARIOS[name](optim), SCENARIOS[name](torch.optim))


@pytest.mark.parametrize("capture_backward", [False, True])
def test_compiled_training_step(capture_backward):
    """The model and the loss in one graph, the step behind a graph break."""

    def run(compile_: bool) -> list[Tensor]:
        model = network()
        opt = optim.AdamW(model.parameters(), lr=0.05, noise_eta=0.01, seed=1)
        scheduler = schedulers.ExponentialLR(opt, 0.9)

        def whole(x: Tensor, y: Tensor) -> Tensor:
            opt.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            opt.step()
            return loss.detach()

        def only_step(x: Tensor, y: Tensor) -> Tensor:
            loss = (model(x) - y).square().mean()
            opt.step()
            return loss

        train_step, losses = only_step if not capture_backward else whole, []
        if compile_:
            torch._dynamo.reset()
            train_step = torch.compile(train_step, backend="aot_eager")
        for seed in range(4):
            if not capture_backward:
                opt.zero_grad()
                loss_of(model, seed).backward()
            losses.append(train_step(*data(seed)).detach())
            scheduler.step()
        return losses + values(model)

    torch.testing.assert_close(run(True), run(False))


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "StepLR": lambda opt: schedulers.StepLR(opt, 2, 0.5),
    "CosineAnnealingLR": lambda opt: schedulers.CosineAnnealingLR(opt, 5),
    "CosineAnnealingWarmRestarts": lambda opt: schedulers.CosineAnnealingWarmRestarts(opt, 3),
    "OneCycleLR": lambda opt: schedulers.OneCycleLR(opt, max_lr=0.1, total_steps=10),
    "CyclicLR": lambda opt: schedulers.CyclicLR(opt, 0.01, 0.1, 2),
    "LambdaLR": lambda opt: schedulers.LambdaLR(opt, lambda t: 1 / (1 + t)),
    "ReduceLROnPlateau": lambda opt: schedulers.ReduceLROnPlateau(opt, patience=0, threshold=0.5),
    "SequentialLR": lambda opt: schedulers.SequentialLR(
        opt, [schedulers.LinearLR(opt, 0.1, total_iters=3), schedulers.CosineAnnealingLR(opt, 5)], [3]
    ),
    "ChainedScheduler": lambda opt: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(opt, 0.5, 3), schedulers.ExponentialLR(opt, 0.8)]
    ),
}


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("pair", ["momentum", "adamw", "rmsprop all"])
@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
def test_schedulers(name, pair, tensor):
    """Learning rates and, with OneCycleLR and CyclicLR, momenta: as torch's; also after a checkpoint in the middle."""
    cls, arguments, _ = PAIRS[pair]
    lr = torch.tensor(0.05) if tensor else 0.05

    def run(lib: Lib) -> tuple[list[float], list[Tensor]]:
        model, lrs, saved = network().double(), [], None
        for seeds in (range(4), range(4, 8)):
            opt = getattr(lib, cls)(model.parameters(), **{**arguments, "lr": copy.deepcopy(lr)})
            scheduler = SCHEDULERS[name](opt)
            if saved:
                opt.load_state_dict(saved[0])
                scheduler.load_state_dict(saved[1])

            def after(loss: Tensor, opt: Any = opt, scheduler: Any = scheduler) -> None:
                scheduler.step(*[loss] * (name == "ReduceLROnPlateau"))
                lrs.append(float(opt.param_groups[0]["lr"]))

            fit(model, opt, seeds, after)
            saved = copy.deepcopy((opt.state_dict(), scheduler.state_dict()))
        return lrs, values(model)

    (lrs, ours), (torch_lrs, theirs) = run(optim), run(torch.optim)
    assert lrs == pytest.approx(torch_lrs) and len(set(lrs)) > 1
    torch.testing.assert_close(ours, theirs)


# ---- noise, dtypes and layouts


def test_no_gradient_no_step():
    opt = optim.SGLD(parameters(), max_norm=1.0, noise_eta=1.0)
    before = [p.detach().clone() for p in opt.param_groups[0]["params"]]
    opt.step()
    assert opt.step(lambda: 3.0) == 3.0
    assert_same_bits([p.detach() for p in opt.param_groups[0]["params"]], before)
    assert not opt.state and opt.param_groups[0]["seed"] is None


@pytest.mark.parametrize("to, tolerance", [(torch.float64, 1e-6), (torch.bfloat16, 5e-2), (torch.float16, 5e-3)], ids=str)
def test_module_changes_its_dtype(to, tolerance):
    """The states stay as they are and serve the parameters in their new dtype."""
    plain, model = network(), network()
    for m, dtype in ((plain, torch.float32), (model, to)):
        opt = optim.AdamW(m.parameters(), lr=0.01)
        for t in range(6):
            if t == 3:
                m.to(dtype)
            opt.zero_grad()
            loss_of(m, t).backward()
            opt.step()
        assert {st["exp_avg"].dtype for st in opt.state.values()} == {torch.float32}
        assert {p.dtype for p in m.parameters()} == {dtype}
    torch.testing.assert_close(values(model), values(plain), rtol=tolerance, atol=tolerance, check_dtype=False)


def test_states_wider_than_the_parameters_are_refused():
    model = network().double()
    opt = optim.AdamW(model.parameters())
    fit(model, opt, [1])
    model.float()
    before = values(model)
    loss_of(model).backward()
    with pytest.raises(RuntimeError, match="float64, expected float32"):
        opt.step()
    assert_same_bits(values(model), before)
    loaded = continued(optim.AdamW, opt)  # loading narrows them
    assert {st["exp_avg"].dtype for st in loaded.state.values()} == {torch.float32}


def test_data_of_another_shape_is_refused():
    opt = trained(optim.AdamW)
    p = opt.param_groups[0]["params"][0]
    p.data = torch.zeros(5, 3)
    with pytest.raises(RuntimeError, match="shape"):
        train(opt, [3])


@pytest.mark.parametrize("row", ["SGD", "AdamW", "Lion"])
@pytest.mark.parametrize("when", ["before", "first", "later"])
def test_noise_and_masks_ignore_the_memory_format(row, when):
    """Noise and masks follow the logical order: a layout that changes at any time changes no bit."""
    mask = torch.arange(3 * 4 * 2 * 2).view(3, 4, 2, 2) % 3 != 0

    def run(changes: bool, **extras: Any) -> Tensor:
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(3, 4, 2, 2))
        opt = ROWS[row]([p], seed=5, **extras)

        def change() -> None:
            p.data = p.data.contiguous(memory_format=torch.channels_last)

        if changes and when == "before":
            change()
        if not extras:
            opt.set_mask(p, mask)
        if changes and when == "first":
            change()
        train(opt, range(2))
        if changes and when == "later":
            change()
        train(opt, range(2, 4))
        if not extras:
            opt = continued(ROWS[row], opt, seed=5)
            train(opt, range(4, 6))
        return opt.param_groups[0]["params"][0].detach().contiguous()

    assert_same_bits(run(True, noise_eta=0.1, stochastic_rounding=True), run(False, noise_eta=0.1, stochastic_rounding=True))
    if row == "SGD" or when != "later":  # states of other strides and a mask are refused
        assert_same_bits(run(True), run(False))


def test_numbers_of_noise():
    """A stream is the place of a parameter in the order of registration, and stays its own."""
    ps = parameters()
    opt = optim.SGLD(ps[:3], seed=1)
    ps[1].requires_grad_(False)
    for p in (ps[0], ps[2]):
        p.grad = torch.zeros_like(p)
    opt.step()
    opt.add_param_group({"params": ps[3:]})
    train(opt, [0])
    assert [opt.state[p]["stream"] for p in ps] == [0, 1, 2, 3]
    other = optim.SGLD(list(reversed(ps)))
    state = opt.state_dict()
    state = {
        "state": {i: state["state"][3 - i] for i in range(3)},  # the last has none
        "param_groups": [{**state["param_groups"][0], "params": [0, 1, 2, 3]}],
    }
    other.load_state_dict(state)
    train(other, [1])
    assert [other.state[p]["stream"] for p in ps] == [4, 1, 2, 3], "never one that is taken"


# ---- torch.distributed.checkpoint.state_dict


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("row", ["SGLD", "SGD momentum", "AdamW", "NAdam"])
def test_state_by_name(row, flatten):
    """Streams go with the names: the order of parameters may change between the runs."""
    options = dcp.StateDictOptions(flatten_optimizer_state_dict=flatten)
    extras = {"noise_eta": 0.1, "stochastic_rounding": True}
    model, other = network().bfloat16(), network().bfloat16()

    opt = ROWS[row](model.parameters(), **extras)
    fit(model, opt, range(3))
    file = saved_bytes((dcp.get_model_state_dict(model), dcp.get_optimizer_state_dict(model, opt, options=options)))
    weights, state = torch.load(io.BytesIO(file), weights_only=True)
    assert ("state.0.weight.stream" if flatten else "state") in state
    torch.manual_seed(9)
    twin = ROWS[row](reversed(list(other.parameters())), **extras)
    dcp.set_model_state_dict(other, weights)
    dcp.set_optimizer_state_dict(other, twin, state, options=options)
    assert twin.param_groups[0]["seed"] == opt.param_groups[0]["seed"]
    for i, (p, q) in enumerate(zip(model.parameters(), other.parameters())):
        assert opt.state[p]["stream"] == twin.state[q]["stream"] == i
    fit(model, opt, range(3, 6)), fit(other, twin, range(3, 6))
    assert_same_bits(values(model), values(other))


def test_a_fresh_state_by_name_leaves_the_parameters():
    """torch makes the states with a step of zero gradients and lr 0."""
    for row, make in ROWS.items():
        model = network()
        opt = make(model.parameters(), noise_eta=0.1, stochastic_rounding=True, max_norm=1.0)
        before = values(model)
        dcp.get_optimizer_state_dict(model, opt)
        assert_same_bits(values(model), before)
        assert opt.param_groups[0]["lr"] == make.lr, row
