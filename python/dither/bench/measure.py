"""Time a kernel, what a user would call instead, and the roof, in turns: A B C, B C A, C A B, ..."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .. import ops


@dataclass(frozen=True)
class Setting:
    device: torch.device
    quick: bool
    threads: int

    @property
    def rounds(self) -> int:
        return 3 if self.quick else 15

    def scaled(self, numel: int) -> int:
        return numel // 10 if self.quick else numel


@dataclass
class Contest:
    """What is timed for one case.

    bytes: the least that must be read and written. roof: a loop that moves just these. memory: whether peaks are taken.
    """

    subject: Callable[[], object]
    peers: dict[str, Callable[[], object]]
    bytes: int
    elements: int
    roof: Callable[[], object] | None = None
    memory: bool = False


def reading(*tensors: torch.Tensor, times: int = 1) -> Callable[[], None]:
    """A roof that reads contiguous tensors, so many times."""

    def run() -> None:
        for t in tensors * times:
            ops.native.triad_([], [t.view(-1)], 0, 1)

    return run


@dataclass(frozen=True)
class Case:
    """A row of the table. `prepare` allocates; what it made is freed after the row."""

    family: str
    name: str
    size: str
    prepare: Callable[[], Contest]
    threads: int | None = None  # default: those of the setting
    rounds: int | None = None  # at most; default: those of the setting


@dataclass
class Row:
    """Seconds are medians; ratios are medians over rounds of the quotient within a round, so that drift cancels."""

    family: str
    name: str
    size: str
    threads: int
    bytes: int
    elements: int
    seconds: float
    cold_seconds: float
    spread: float  # (third quartile - first quartile) / median
    roof_seconds: float | None = None
    of_roof: float | None = None  # the roof's time / ours
    peer_seconds: dict[str, float] = field(default_factory=dict)
    speedups: dict[str, float] = field(default_factory=dict)  # the peer's time / ours
    peak_bytes: int | None = None  # see `peak_bytes`
    peer_peak_bytes: dict[str, int | None] = field(default_factory=dict)


def measure(case: Case, setting: Setting) -> Row:
    """Run a case: every contender in turns with its data as the last call left it, then the subject with cold caches."""
    threads = case.threads or setting.threads
    torch.set_num_threads(threads)
    try:
        contest = case.prepare()
        runs = {"": contest.subject, **contest.peers, **({"roof": contest.roof} if contest.roof else {})}
        rounds = min(case.rounds or setting.rounds, setting.rounds)
        hot = _turns(runs, setting, rounds, flush=None)
        cold = _turns({"": contest.subject}, setting, rounds, flush=_Flush(setting.device))
        peaks = {name: peak_bytes(run, setting.device) for name, run in runs.items() if contest.memory and name != "roof"}
    finally:
        torch.set_num_threads(setting.threads)
    size = contest.bytes, contest.elements
    del contest, runs
    gc.collect()
    ours = hot.pop("")
    middle, (low, _, high) = statistics.median(ours), statistics.quantiles(ours, n=4)
    row = Row(case.family, case.name, case.size, threads, *size, middle, statistics.median(cold[""]), (high - low) / middle)
    for name, times in hot.items():
        ratio = statistics.median(t / own for t, own in zip(times, ours))
        if name == "roof":
            row.roof_seconds, row.of_roof = statistics.median(times), ratio
        else:
            row.peer_seconds[name], row.speedups[name] = statistics.median(times), ratio
    row.peak_bytes = peaks.pop("", None)
    row.peer_peak_bytes = peaks
    return row


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """The most memory that run() holds beyond what was there before, its result included: of torch's allocator on a GPU,
    elsewhere resident memory of this process, which pages that were free already and are used again escape (of two runs the one
    with less, to the precision of the system's counters, some 0.1 MB). None where the system does not tell."""
    gc.collect()
    found = []
    for _ in range(1 if device.type == "cuda" else 2):
        try:
            before = reset_peak(device)
        except (AttributeError, OSError, TypeError):
            return None
        run()
        found.append(max(peak(device) - before, 0))
    return min(found)


def reset_peak(device: torch.device) -> int:
    """Give free memory back and forget the peak; the bytes that are held."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    else:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    return peak(device)


def peak(device: torch.device) -> int:
    """The most bytes held since `reset_peak`: of torch's allocator on a GPU, elsewhere resident memory of this process."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024


def turns(names: Iterable[str], rounds: int) -> Iterator[str]:
    """A B C, B C A, C A B, ..."""
    order = list(names)
    for _ in range(rounds):
        yield from order
        order = order[1:] + order[:1]


def _turns(
    runs: dict[str, Callable[[], object]], setting: Setting, rounds: int, flush: Callable[[], object] | None
) -> dict[str, list[float]]:
    names = list(runs)
    times: dict[str, list[float]] = {name: [] for name in runs}
    clock = _cuda_seconds if setting.device.type == "cuda" else _seconds
    for name in names * 2:
        runs[name]()  # warm
    for name in turns(names, rounds):
        if flush:
            flush()
        elif len(names) > 1:
            runs[name]()  # its own data, not its neighbour's, is what the caches hold
        times[name].append(clock(runs[name]))
    return times


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _cuda_seconds(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


_FLUSHED = 1 << 28  # bytes


class _Flush:
    """Rewrite more memory than any cache holds."""

    def __init__(self, device: torch.device) -> None:
        self.memory = torch.zeros(_FLUSHED, dtype=torch.uint8, device=device)

    def __call__(self) -> None:
        self.memory.add_(1)
