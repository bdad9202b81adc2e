"""What a trainer writes down while it trains."""

from __future__ import annotations

import csv
import math
import os
from pathlib import Path
from typing import Any

from .._extras import require


class Log:
    """Rows of numbers: in `rows`, and, with a folder, in its log.csv and, on request, for TensorBoard.

    A row that has new columns rewrites the file with all of them.
    """

    def __init__(self, folder: Path | None, tensorboard: bool) -> None:
        self.rows: list[dict[str, float]] = []
        self._path = None if folder is None else folder / "log.csv"
        self._columns: list[str] = []
        self._board: Any = None
        if tensorboard and folder is not None:
            self._board = require("torch.utils.tensorboard", extra="train").SummaryWriter(str(folder))

    def add(self, row: dict[str, float]) -> None:
        self.rows.append(row)
        if self._board is not None:
            for name, value in row.items():
                if name != "step":
                    self._board.add_scalar(name, value, int(row["step"]))
        if self._path is None:
            return
        new = [name for name in row if name not in self._columns]
        self._columns += new
        if new:
            self._rewrite()
        else:
            with open(self._path, "a", newline="") as file:
                csv.DictWriter(file, self._columns).writerow(row)

    def cut(self, step: int) -> None:
        """What an earlier run wrote up to a step, that it goes on from there."""
        if self._path is None or not self._path.exists():
            return
        with open(self._path, newline="") as file:
            reader = csv.DictReader(file)
            self._columns = list(reader.fieldnames or [])
            read = [{name: float(value) for name, value in row.items() if value} for row in reader if all(row)]
        self.rows = [row for row in read if row.get("step", math.inf) <= step]
        self._rewrite()

    def _rewrite(self) -> None:
        assert self._path is not None
        self._path.parent.mkdir(parents=True, exist_ok=True)
        new = self._path.with_suffix(".new")
        with open(new, "w", newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(self.rows)
        os.replace(new, self._path)

    def close(self) -> None:
        if self._board is not None:
            self._board.flush()
