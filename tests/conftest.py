"""One fixture runs every kernel test on each implementation: the CPU kernels, the CUDA sources on CPU fibers, and CUDA."""

import fcntl
import functools
import os
import pathlib
import runpy
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import dither
from two_ranks import two_ranks as two_ranks

ROOT = pathlib.Path(__file__).parents[1]
NAMES = ("cpu", "emulated_cuda", "cuda")

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu", action="store_true", help="only the tests that run on a GPU")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of tests that run on a GPU, the name says so, or why they are skipped without one."""
    if config.getoption("--gpu"):
        rules = [(item, "".join(str(mark.kwargs.get("reason")) for mark in item.iter_markers("skipif"))) for item in items]
        items[:] = [i for i, why in rules if "GPU" in why or ("cuda" in i.name and "emulated_cuda" not in i.name)]


@functools.cache
def emulator() -> Any:
    """Build (incrementally) the CUDA kernels for CPU fibers and load them as torch.ops.dither_emu."""
    import pybind11

    build = ROOT / "build" / "emulator"
    defines = {
        "DITHER_EMULATOR": "ON",
        "DITHER_CUDA": "OFF",
        "Python_EXECUTABLE": sys.executable,
        "TORCH_ROOT": pathlib.Path(torch.__file__).parent,
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    beside = {**os.environ, "PATH": os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])}  # cmake and ninja
    run = functools.partial(subprocess.run, check=True, stdout=subprocess.DEVNULL, env=beside)
    flags = [f"-D{name}={value}" for name, value in defines.items()]
    build.mkdir(parents=True, exist_ok=True)
    with open(build / "lock", "w") as lock:  # several pytest processes may come here together
        fcntl.flock(lock, fcntl.LOCK_EX)
        run(["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", *flags])
        run(["cmake", "--build", build, "--target", "dither_emu"])
    torch.ops.load_library(next(build.glob("libdither_emu*.so")))
    return torch.ops.dither_emu


@dataclass
class Backend:
    name: str
    ops: Any  # the operator namespace
    device: str


@pytest.fixture(params=NAMES)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """The operators and device under test; the Python API of dither runs on them too."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    emulated = request.param == "emulated_cuda"
    ops = emulator() if emulated else torch.ops.dither
    monkeypatch.setattr(dither.ops, "native", ops)
    if emulated:
        monkeypatch.setattr("dither.tokens.attention._KEPT", -1)  # for the CPU alone
    return Backend(request.param, ops, "cuda" if request.param == "cuda" else "cpu")


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run_script(
    one_thread: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[str, str]]:
    """Runs a script as `python PATH ARGUMENTS` does, in this process, which has torch; what went to stdout and stderr."""

    def run(path: pathlib.Path, *arguments: object) -> tuple[str, str]:
        if not path.exists():
            pytest.skip("not in a checkout")
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        with warnings.catch_warnings(record=True) as given:
            warnings.simplefilter("always")
            runpy.run_path(str(path), run_name="__main__")
        out, err = capsys.readouterr()
        hidden = DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning  # as Python does
        return out, err + "".join(f"{w.message}\n" for w in given if not issubclass(w.category, hidden))

    return run
