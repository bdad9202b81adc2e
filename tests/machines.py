"""Another number of threads, another instruction set, for a while."""

import contextlib
from collections.abc import Iterator

import torch

import dither


@contextlib.contextmanager
def machine(threads: int | None = None, capability: str | None = None, flush: bool = False) -> Iterator[None]:
    """flush: denormal numbers count as 0 where the processor is asked, as a library loaded before may have it."""
    before = torch.get_num_threads(), dither.build_info()["cpu_capability"]
    try:
        torch.set_num_threads(threads or before[0])
        dither._C.set_cpu_capability(capability or before[1])
        assert dither.build_info()["cpu_capability"] == (capability or before[1])
        assert not flush or torch.set_flush_denormal(True)
        yield
    finally:
        torch.set_num_threads(before[0])
        dither._C.set_cpu_capability(before[1])
        torch.set_flush_denormal(False)
