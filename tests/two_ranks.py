"""Checks that two processes of torch.distributed (gloo, on this machine) run together.

CHECKS = {}

@check(CHECKS)
def sums(mesh): ...

@needs_two_ranks
@pytest.mark.parametrize("name", CHECKS)
def test_two_ranks(two_ranks, name):
    two_ranks(name)
"""

import datetime
import faulthandler
import importlib
import multiprocessing
import os
import pathlib
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

PATIENCE = 240  # seconds
Check = Callable[[Any], None]
needs_two_ranks = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="no gloo"
)


def check(checks: dict[str, Check]) -> Callable[[Check], Check]:
    def register(f: Check) -> Check:
        checks[f.__name__] = f
        return f

    return register


def work(rank: int, folder: str, module: str) -> None:
    """Every check of a test module, in a folder of their own; what goes wrong is written to files."""
    os.chdir(folder)
    with open(f"stuck.{rank}", "w") as stuck:
        faulthandler.dump_traceback_later(PATIENCE - 10, file=stuck)
        try:
            run(rank, folder, module)
        except BaseException:
            stuck.write(traceback.format_exc())
        faulthandler.cancel_dump_traceback_later()


def run(rank: int, folder: str, module: str) -> None:
    torch.set_num_threads(1)
    dist = torch.distributed
    patience = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2, timeout=patience)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for name, f in importlib.import_module(module).CHECKS.items():
        torch.manual_seed(rank)  # ranks differ, unless a check makes them agree
        try:
            f(mesh)
            said = ""
        except BaseException:  # torch's CheckpointException is no Exception
            said = traceback.format_exc()
        pathlib.Path(f"{name}.{rank}").write_text(said)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], None]]:
    """Asserts that a check has ended well on both ranks; all of a module's run when the first is asked for."""
    folder = tmp_path_factory.mktemp("ranks")
    spawn = multiprocessing.get_context("spawn")
    ranks = [spawn.Process(target=work, args=(rank, str(folder), request.module.__name__), daemon=True) for rank in range(2)]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + PATIENCE
    for process in ranks:
        process.join(max(0.0, deadline - time.monotonic()))
        process.kill()

    def ended(name: str) -> None:
        for rank in range(2):
            file = folder / f"{name}.{rank}"
            assert file.exists(), f"rank {rank} did not end: {(folder / f'stuck.{rank}').read_text()}"
            assert not file.read_text(), f"rank {rank}: {file.read_text()}"

    yield ended
