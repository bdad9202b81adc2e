"""The table of a benchmark run: on the terminal, as JSON and as Markdown."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..ops import build_info
from .measure import Row, Setting

_PEERS = ("pytorch-optimizer", "torch-optimizer", "adabelief-pytorch", "torch-adopt", "tomesd", "POT", "geomloss")
_NOTE = (
    "Medians; all contenders of a row were timed in turns within one run. GB/s: least bytes over time. Roof: a loop that moves "
    "the same bytes with next to no arithmetic; 100 % is its speed. Cold: caches flushed before every call. A number "
    "behind a peer is its time divided by dither's. Memory: the most that a call holds beyond its inputs, and, "
    "behind a peer, its own."
)


class Report:
    def __init__(self, setting: Setting) -> None:
        self.rows: list[Row] = []
        self.about = conditions(setting.device, "python -m dither", _PEERS, threads=setting.threads, quick=setting.quick)
        print(f"{self.about['device']}, {setting.threads} threads, torch {torch.__version__}", flush=True)
        if len(self.about["peers"]) < len(_PEERS):
            print(f"of the peers {', '.join(self.about['peers']) or 'none'} installed; all: pip install 'dither[bench]'")
        print(_line(_HEADERS), flush=True)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        print(_line(_cells(row)), flush=True)

    def write_json(self, path: Path) -> None:
        write_json(path, self.about, rows=[dataclasses.asdict(r) for r in self.rows])

    def write_markdown(self, path: Path) -> None:
        text = [_NOTE, "", *table(_HEADERS, map(_cells, self.rows))]
        write_markdown(path, f"Benchmarks, {self.about['date']}", self.about, text)


_HEADERS = ["case", "size", "time", "GB/s", "of roof", "cold", "memory", "peers"]
_WIDTHS = [-46, -11, 9, 6, 7, 9, 9]


def _line(cells: list[str]) -> str:
    aligned = [f"{c:<{-w}}" if w < 0 else f"{c:>{w}}" for c, w in zip(cells, _WIDTHS)]
    return " ".join([*aligned, " " + cells[-1]])


def _cells(row: Row) -> list[str]:
    return [
        row.name if row.threads > 1 else f"{row.name}, 1 thread",
        row.size,
        _time(row.seconds),
        f"{row.bytes / row.seconds / 1e9:.1f}" if row.bytes else "",
        f"{row.of_roof:.0%}" if row.of_roof else "",
        _time(row.cold_seconds),
        _memory(row.peak_bytes),
        ", ".join(" ".join(filter(None, cells)) for cells in _peers(row)),
    ]


def _peers(row: Row) -> list[list[str]]:
    return [[name, f"{ratio:.2f}x", _memory(row.peer_peak_bytes.get(name))] for name, ratio in row.speedups.items()]


def _memory(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:.1f} MB"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


def conditions(device: torch.device, program: str, packages: Iterable[str] = (), **more: Any) -> dict[str, Any]:
    """What one has to know of a run to read its figures; of `packages`, the versions of those that are installed."""
    return {
        "date": datetime.date.today().isoformat(),
        "device": device_name(device),
        "command": " ".join([program, *sys.argv[1:]]),
        "load": _load(),
        **more,
        "python": platform.python_version(),
        **build_info(),
        "peers": {name: found for name in packages if (found := version(name))},
    }


def _load() -> str:
    if not hasattr(os, "getloadavg"):  # not on Windows
        return ""
    return " ".join(f"{load:.1f}" for load in os.getloadavg()) + f" on {os.cpu_count()} cores, before the run"


def version(package: str) -> str | None:
    """Of a package; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def table(header: list[str], rows: Iterable[list[str]]) -> Iterator[str]:
    """Lines of a table in Markdown."""
    for cells in (header, ["---"] * len(header), *rows):
        yield "| " + " | ".join(cells) + " |"


def write_json(path: Path, about: dict[str, Any], **found: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**about, **found}, indent=1) + "\n")


def write_markdown(path: Path, title: str, about: dict[str, Any], lines: Iterable[str]) -> None:
    """A page: title, what is known of the run, lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    known = (f"- {name}: {value}" for name, value in about.items() if value not in ("", [], {}, None))
    path.write_text("\n".join([f"# {title}", "", *known, "", *lines]).rstrip() + "\n")


def device_name(device: torch.device) -> str:
    """What the hardware calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))]
    return names[0] if names else platform.processor() or platform.machine()
