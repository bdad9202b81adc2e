"""POT's own tests of entropic transport, run with its solvers replaced by dither's."""

import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parents[1] / "bench" / "pot_conformance.py"
NOT_FETCHED = 3


def test_pots_own_tests_pass():
    """A part of them, about 30 s and as many for the download; `python bench/pot_conformance.py` runs the rest."""
    pytest.importorskip("ot")
    chosen = "variants or test_sinkhorn2 or test_sinkhorn_multi_b or last_step or detach"
    command = [sys.executable, str(SCRIPT), "--installed", "--files", "test_bregman.py", "test_solvers.py", "-k", chosen]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == NOT_FETCHED:
        pytest.skip(f"POT's source distribution cannot be fetched: {done.stderr.strip()[-300:]}")
    assert done.returncode == 0, done.stdout + done.stderr
    together = next(line for line in done.stdout.splitlines() if line.startswith("| together"))
    assert int(together.split("|")[4]) > 20, together
