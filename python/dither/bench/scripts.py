"""What the scripts of bench/ share: their arguments, contenders in processes of their own, and the files they write."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from .report import write_json, write_markdown


def parser(doc: str) -> argparse.ArgumentParser:
    """With --device and --out. `doc`: the script's docstring."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of dither")
    made.add_argument("--out", type=Path, metavar="STEM", help="write STEM.json and STEM.md")
    return made


def notes(doc: str) -> list[str]:
    """The paragraphs of a script's docstring after its first line and its usage."""
    return [" ".join(part.split()) for part in doc.split("\n\n")[2:]]


def matching(names: Iterable[str], words: Sequence[str] | None) -> list[str]:
    """Names with one of the words in them; without words, all."""
    return [name for name in names if not words or any(word.lower() in name.lower() for word in words)]


def write(stem: Path, title: str, about: dict[str, Any], lines: Iterable[str], **found: Any) -> None:
    """STEM.json of what was found, STEM.md of the lines, the conditions in both."""
    write_json(Path(f"{stem}.json"), about, **found)
    write_markdown(Path(f"{stem}.md"), title, about, lines)


def timer(device: str) -> Callable[[], float]:
    """What reads CPU seconds of this process; on a GPU wall seconds, after waiting for it."""

    def wall() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return wall if device == "cuda" else time.process_time


class Worker:
    """A process of Python that answers questions; its side is `serve`."""

    def __init__(self, *arguments: object, **environment: str) -> None:
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (a pipe that nobody reads may fill up)
        pipe, settings = subprocess.PIPE, {**os.environ, "PYTHONWARNINGS": "ignore", **environment}
        command = [sys.executable, *map(str, arguments)]
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self.errors, text=True, env=settings)

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            raise ChildProcessError("".join(self.errors.read().strip().splitlines()[-1:]))
        return line

    def ready(self) -> None:
        """Waits until it serves. ChildProcessError, with the last line of its stderr: it ended before."""
        self._line()

    def ask(self, *question: object) -> Any:
        """The answer. ChildProcessError as `ready`."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
        return json.loads(self._line())

    def end(self) -> int:
        """Its exit status."""
        with self.errors, contextlib.suppress(BrokenPipeError), self.process:
            pass
        return self.process.returncode


def serve(answer: Callable[..., object]) -> None:
    """In a worker: answer every line of arguments."""
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(*json.loads(line))), flush=True)
