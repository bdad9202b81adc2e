"""The emulator of CUDA on the CPU must give the right answers, and must expose what would go wrong on a GPU."""

import ctypes
import math
import os
import pathlib
import re
import shutil
import subprocess
from collections.abc import Callable

import pytest

ROOT = pathlib.Path(__file__).parents[1]
CASES = ROOT / "tests" / "emulator" / "cases"
FLAGS = ["-std=c++20", "-O2", f"-I{ROOT / 'csrc' / 'common'}", f"-I{CASES.parent}"]
ASAN = ["-O1", "-g1", "-fsanitize=address,bounds", "-fno-sanitize-recover=bounds"]
ORDERS = [0, 1, 2, 3]
Build = Callable[..., pathlib.Path]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Compile one of the cases, once for each set of flags."""
    folder = tmp_path_factory.mktemp("emulator")
    built: dict[tuple[str, ...], pathlib.Path] = {}

    def compiled(case: str, *flags: str) -> pathlib.Path:
        key = (case, *flags)
        if key not in built:
            output = folder / str(len(built))
            subprocess.run(["g++", *FLAGS, *flags, "-x", "c++", CASES / f"{case}.cu", "-o", output], check=True)
            built[key] = output
        return built[key]

    return compiled


def run(program: pathlib.Path, *arguments: str, order: int = 0) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"DITHER_EMU_ORDER": str(order), "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run([program, *arguments], env=env, capture_output=True, text=True, timeout=60)


def verdicts(program: pathlib.Path, order: int) -> dict[str, str]:
    return dict(line.split() for line in run(program, order=order).stdout.splitlines())


@pytest.mark.parametrize("flags", [(), ("-DFIBERS_UCONTEXT",), ("-O0",), ("-O3",)], ids=" ".join)
def test_right_kernels_are_right_in_every_order(build: Build, flags: tuple[str, ...]) -> None:
    results = [verdicts(build("races", *flags), order) for order in ORDERS]
    assert len(results[0]) == 6
    assert all(set(result.values()) == {"right"} for result in results), results


def test_races_are_exposed(build: Build) -> None:
    right, broken = verdicts(build("races"), 0), [verdicts(build("races", "-DBROKEN"), order) for order in ORDERS]
    for kernel in right:
        assert "wrong" in [result[kernel] for result in broken], kernel


@pytest.fixture(scope="module")
def answers(build: Build) -> dict[str, list[list[float]]]:
    result = run(build("answers"), order=2)
    assert result.returncode == 0, result.stderr
    table: dict[str, list[list[float]]] = {}
    for name, *values in map(str.split, result.stdout.splitlines()):
        table.setdefault(name, []).append([float(value) for value in values])
    return table


def test_shuffles(answers: dict[str, list[list[float]]]) -> None:
    threads = range(64)
    warp, lane = [t // 32 * 32 for t in threads], [t % 32 for t in threads]
    neighbour = [t ^ 1 for t in threads]
    assert answers["shuffle"] == [
        [10 * (w + 3) for w in warp],
        [10 * (w + 3) for w in warp],
        [10 * (t ^ 5) for t in threads],
        [10 * (t + 4 if x + 4 < 32 else t) for t, x in zip(threads, lane)],
        [10 * (t - 4 if x >= 4 else t) for t, x in zip(threads, lane)],
        neighbour,
        neighbour,
        neighbour,
        [t ^ 7 if x < 8 else -(t + 1 if x < 31 else t) for t, x in zip(threads, lane)],
    ]


def test_votes(answers: dict[str, list[list[float]]]) -> None:
    thirds = sum(1 << t for t in range(32) if t % 3 == 0)
    assert answers["votes"] == [[thirds, 2**31 - 1, 0b1010, 11 * 100 + 4 * 10 + 0]]


def test_lanes_that_do_not_exist_give_poison(answers: dict[str, list[list[float]]]) -> None:
    (got,) = answers["partial_warp"]
    assert got[:28] == list(range(4, 32)) and got[28:36] == [28, 29, 30, 31, 36, 37, 38, 39]
    assert all(map(math.isnan, got[36:]))


def test_atomics(answers: dict[str, list[list[float]]]) -> None:
    assert (answers["atomics"], answers["bits"], answers["sum"]) == ([[199, 200]], [[2**32 - 1]], [[100]])


def test_dimensions(answers: dict[str, list[list[float]]]) -> None:
    assert answers["dimensions"] == [[100 * block + thread for block in range(12) for thread in range(24)]]


def test_uninitialised_shared_memory_is_nan(answers: dict[str, list[list[float]]]) -> None:
    assert answers["written"] == [[1.0] * 64]
    assert [len(values) for values in answers["unwritten"]] == [64, 64, 1]
    assert all(math.isnan(value) for values in answers["unwritten"] for value in values)
    assert answers["host"] == [[7]]


def test_impossible_launches_are_refused(answers: dict[str, list[list[float]]]) -> None:
    assert answers["errors"] == [[0, 9, 9, 9, 1]]


PLACE = r"waits at \S*divergent\.cu:\d+"
DIVERGENT = {
    "branch": f"divergent barrier: thread 0 {PLACE}, thread 16 has returned",
    "two_places": f"divergent barrier: thread 0 {PLACE}, thread 16 {PLACE}",
    "loop": f"divergent barrier: thread 0 {PLACE}, thread 16 has returned",
    "shuffle": f"divergent barrier: thread 0 {PLACE}, thread 16 {PLACE}",
    "mask": "thread (16|63) is not in its own mask",
}


def test_uniform_barriers_pass(build: Build) -> None:
    result = run(build("divergent"), "uniform")
    assert (result.returncode, result.stdout, result.stderr) == (0, "done\n", "")


@pytest.mark.parametrize("name", DIVERGENT)
@pytest.mark.parametrize("order", [0, 1])
def test_divergent_barriers_abort(build: Build, name: str, order: int) -> None:
    result = run(build("divergent"), name, order=order)
    assert result.returncode < 0 and not result.stdout
    assert re.match(rf"cuda_on_cpu: block \({order},0,0\): {DIVERGENT[name]}\n", result.stderr), result.stderr


def test_exceptions_do_not_leave_a_fiber(build: Build) -> None:
    result = run(build("divergent"), "throws")
    assert result.returncode < 0 and "terminate called" in result.stderr


BOUNDS = {
    "global_read": "AddressSanitizer: heap-buffer-overflow",
    "global_write": "AddressSanitizer: heap-buffer-overflow",
    "dynamic_read": "AddressSanitizer: heap-buffer-overflow",
    "dynamic_write": "AddressSanitizer: heap-buffer-overflow",
    "static_write": "runtime error: index 64 out of bounds",
    "local_write": "runtime error: index 4 out of bounds",
}


@pytest.mark.parametrize("order", ORDERS)
def test_healthy_kernel_passes_the_sanitizers(build: Build, order: int) -> None:
    result = run(build("bounds", *ASAN), "healthy", order=order)
    assert (result.returncode, result.stdout) == (0, "right\n")
    assert "AddressSanitizer" not in result.stderr and "runtime error" not in result.stderr


@pytest.mark.parametrize("name", BOUNDS)
def test_out_of_bounds_is_caught(build: Build, name: str) -> None:
    result = run(build("bounds", *ASAN), name)
    assert result.returncode != 0 and BOUNDS[name] in result.stderr


@pytest.fixture(scope="module")
def library(build: Build) -> ctypes.CDLL:
    """One case compiled twice, with functions named *_a and *_b."""
    objects = [build("library", "-fPIC", "-c", f"-DNAME(function)=function##_{unit}") for unit in "ab"]
    output = objects[0].with_suffix(".so")
    subprocess.run(["g++", "-shared", *objects, "-o", output], check=True)
    return ctypes.CDLL(str(output))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("unit", "ab")
def test_units_of_a_library_share_a_kernel(
    library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, unit: str, order: int
) -> None:
    monkeypatch.setenv("DITHER_EMU_ORDER", str(order))
    total, unwritten = library[f"sum_{unit}"], library[f"unwritten_{unit}"]
    total.restype, unwritten.restype = ctypes.c_double, ctypes.c_float
    assert total() == 2016 and math.isnan(unwritten())


def test_order_is_read_at_each_launch(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, override, last in (("0", -1, 3), ("1", -1, 0), ("1", 0, 3), ("0", 1, 0), ("0", -1, 3)):
        monkeypatch.setenv("DITHER_EMU_ORDER", variable)
        assert library.last_block_a(override) == last
