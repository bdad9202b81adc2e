"""The memory roof, the measurement and its reports. No time is asserted."""

import json
import pathlib
import runpy
import sys

import pytest
import torch

from dither import bench, sampling
from dither.bench import Case, Contest, Setting, measure
from dither.bench.measure import peak_bytes
from dither.bench.scripts import Worker

SCRIPTS = pathlib.Path(__file__).parents[1] / "bench"
SHAPES = [(1, 0), (1, 1), (2, 1), (3, 2), (4, 1), (0, 1), (0, 2), (5, 0), (5, 3)]


@pytest.mark.parametrize("written, read", SHAPES)
@pytest.mark.parametrize("dtypes", [(torch.int32,), (torch.int64, torch.int32)], ids=["one width", "two widths"])
def test_the_roof_rewrites_every_word(backend, written, read, dtypes):
    numels = (20_000, 64, 4096)

    def tensors(lists, first):
        types = [dtypes[(first + k) % len(dtypes)] for k in range(lists)]
        return [torch.full((n,), 7, dtype=t, device=backend.device) for t in types for n in numels]

    changed, kept = tensors(written, 0), tensors(read, written)
    before = [t.clone() for t in changed]
    backend.ops.triad_(changed, kept, written, read)
    for t, b in zip(changed, before):
        assert (t.view(torch.int32) != b.view(torch.int32)).all()
    assert all((t == 7).all() for t in kept)


@pytest.mark.parametrize(
    "written, read, lists, message",
    [
        (1, 0, (0, 0), "got 0 lists, expected 1 to 8"),
        (9, 0, (9, 0), "got 9 lists, expected 1 to 8"),
        (2, 1, (1, 1), "got 2 and 1 tensors, expected 2 and 2"),
    ],
)
def test_the_roof_refuses(backend, written, read, lists, message):
    if backend.device == "cuda":
        pytest.skip("the same checks")
    with pytest.raises(RuntimeError, match=f"triad_: {message}"):
        backend.ops.triad_([torch.zeros(8)] * written, [torch.zeros(8)] * read, *lists)
    with pytest.raises(RuntimeError, match="triad_: tensor 0 of list 1 must be contiguous with 8 elements"):
        backend.ops.triad_([torch.zeros(8)], [torch.zeros(4)], 1, 1)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(sys.modules[measure.__module__], "_FLUSHED", 64)
    monkeypatch.setattr(Setting, "scaled", lambda self, numel: max(1, numel // 10_000))


def test_contenders_take_turns(tiny):
    calls = []
    contest = Contest(lambda: calls.append("a"), {"b": lambda: calls.append("b")}, bytes=8, elements=2)
    row = measure(Case("noise", "x", "2", lambda: contest), Setting(torch.device("cpu"), quick=True, threads=1))
    warm, rounds, cold = calls[:4], calls[4:16], calls[16:]
    assert warm == ["a", "b", "a", "b"]
    assert rounds == [*"aabb", *"bbaa", *"aabb"]  # each once untimed, then timed
    assert set(cold) == {"a"}
    assert row.bytes == 8 and row.elements == 2 and row.threads == 1 and row.of_roof is None
    assert row.speedups["b"] > 0 and row.seconds > 0 and row.cold_seconds > 0


def test_threads_are_those_of_the_case_and_restored(tiny):
    before, seen = torch.get_num_threads(), []
    contest = Contest(lambda: seen.append(torch.get_num_threads()), {}, bytes=1, elements=1)
    measure(Case("noise", "x", "1", lambda: contest, threads=1), Setting(torch.device("cpu"), quick=True, threads=before))
    assert set(seen) == {1} and torch.get_num_threads() == before


@pytest.mark.skipif(sys.platform != "linux", reason="reads memory from /proc")
def test_peaks_of_memory(tiny):
    """Of what is held at once: 64 MB, then as much again, of which half is given back before the last; of nothing."""
    cpu = torch.device("cpu")

    def twice():
        a = torch.ones(16 << 20)
        a = a + a
        del a
        torch.ones(16 << 20)

    found = peak_bytes(twice, cpu)
    if found is None:
        pytest.skip("the system does not tell")
    assert 0.95 * (128 << 20) < found < 1.05 * (128 << 20)  # measured: 1.00
    assert peak_bytes(lambda: None, cpu) < 1 << 20
    contest = Contest(lambda: torch.ones(4 << 20), {"b": twice}, bytes=8, elements=2, memory=True)
    row = measure(Case("noise", "x", "2", lambda: contest), Setting(cpu, quick=True, threads=1))
    assert row.peak_bytes == pytest.approx(16 << 20, rel=0.1) and row.peer_peak_bytes["b"] == pytest.approx(128 << 20, rel=0.1)


@pytest.mark.parametrize("family", bench._FAMILIES)
def test_a_family_end_to_end(family, tiny, tmp_path, capsys):
    report = bench.main([family], tmp_path / "a" / "b.json", tmp_path / "b.md", quick=True, threads=1)
    written = json.loads((tmp_path / "a" / "b.json").read_text())
    assert len(written["rows"]) == len(report.rows) > 10 and written["threads"] == 1
    table = (tmp_path / "b.md").read_text()
    out = capsys.readouterr().out
    for row in report.rows:
        assert row.family == family and row.seconds > 0
        assert row.of_roof is None if "training step" in row.name else row.of_roof > 0
        assert row.name in out and f"| {row.name}" in table
    assert any(row.speedups for row in report.rows)
    if family == "tokens" and report.rows[0].peak_bytes is not None:
        assert "MB" in table and all(set(row.peer_peak_bytes) == set(row.speedups) for row in report.rows)


@pytest.mark.skipif(sys.platform != "linux", reason="reads memory from /proc")
def test_private_steps_of_processes_in_turns(run_script, tmp_path):
    options = ["--models", "LSTM", "--contenders", "fast", "plain", "--threads", "1", "--quick", "--out"]
    _, err = run_script(SCRIPTS / "private_steps.py", *options, tmp_path / "steps")
    assert err == ""
    (row,) = json.loads((tmp_path / "steps.json").read_text())["rows"]
    assert list(row["seconds"]) == ["dither, fast noise", "plain", "plain, tuned"] and row["clock"] == "cpu"
    assert row["of_plain"]["plain"] == 1 and min(*row["megabytes"].values(), *row["seconds"].values()) > 0
    assert (tmp_path / "steps.md").read_text().count("LSTM") == 4  # the command, three rows


@pytest.mark.skipif(sys.platform != "linux", reason="limits CPU time")
def test_transport_solvers_in_turns(run_script, tmp_path):
    options = [
        "--sizes",
        "40",
        "--regs",
        "0.1",
        "--instances",
        "U",
        "--contenders",
        "dither newton",
        "--rounds",
        "2",
        "--no-steps",
    ]
    run_script(SCRIPTS / "transport_solvers.py", *options, "--out", tmp_path / "solvers")
    rows = json.loads((tmp_path / "solvers.json").read_text())["rows"]
    assert [row["tol"] for row in rows] == [1e-6, 1e-9]
    for row in rows:
        (entry,) = row["found"].values()
        assert entry["error"] <= row["tol"] and len(entry["seconds"]) == 2
    assert (tmp_path / "solvers.md").read_text().count("| U | 40 |") == 2


def test_trainers_in_turns(run_script, tmp_path):
    run_script(SCRIPTS / "trainer.py", "--steps", "3", "--rounds", "1", "--out", tmp_path / "trainer")
    rows = json.loads((tmp_path / "trainer.json").read_text())["rows"]
    assert len(rows) == 3 and all(us > 0 for row in rows for us in row["microseconds"].values())
    assert (tmp_path / "trainer.md").read_text().count(" us | ") >= 6


def test_samplers_in_turns(run_script, tmp_path):
    pytest.importorskip("diffusers")
    options = ["--samplers", "DPM++2M", "k: euler", "--steps", "6", "--rounds", "2", "--out"]
    _, err = run_script(SCRIPTS / "samplers.py", *options, tmp_path / "samplers")
    assert "left out" not in err
    rows = json.loads((tmp_path / "samplers.json").read_text())["rows"]
    found = [(row["sampler"], row["shape"][0]) for row in rows if not row["sampler"].startswith("k:")]
    assert found == [("DPM++2M", 4), ("SDE-DPM++2M", 4), ("DPM++2M", 1), ("SDE-DPM++2M", 1)]
    for row in rows:
        assert row["of_dither"]["dither"] == 1 and min(row["microseconds"].values()) > 0
        assert (row["differs"] is None) == (row["sampler"] in ("SDE-DPM++2M", "k: euler_ancestral"))
        assert row["differs"] is None or row["differs"] < 1e-4
    assert (tmp_path / "samplers.md").read_text().count("| DPM++2M | ") == 2


def test_runs_that_devices_are_compared_by():
    """On a GPU they would fail one by one."""
    if not (script := SCRIPTS / "compare_bits.py").exists():
        pytest.skip("not in a checkout")
    compare = runpy.run_path(str(script))
    for name in sampling.SAMPLERS.keys() - compare["SPECIAL"]:
        (x,) = compare["runs"](name, compare["OPTIONS"].get(name, {}), "cpu")
        assert x.isfinite().all(), name
    assert all(len(compare["chosen"](dtype, "cpu")) == 6 for dtype in compare["FLOATS"])


def test_a_worker_that_fails_says_why():
    worker = Worker("-c", "1 / 0")
    with pytest.raises(ChildProcessError, match=r"^ZeroDivisionError: division by zero$"):
        worker.ready()
    assert worker.end() == 1


def test_bad_arguments():
    with pytest.raises(ValueError, match="family is 'noize', expected one of noise, optim"):
        bench.main(["noize"])
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device is 'cuda', expected 'cpu': torch finds no GPU"):
            bench.main([], device="cuda")
