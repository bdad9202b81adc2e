"""The command line: info, arguments, errors, extras that are missing."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import dither
from dither import _extras
from dither.cli import main

EXTRAS = {
    "sklearn": "scikit-learn",
    "matplotlib": "matplotlib",
    "rich": "rich",
    "tqdm": "tqdm",
    "dp_accounting": "dp-accounting",
}

# info, help, arguments


def test_info_and_help_import_no_extras():
    code = f"""
import runpy, sys
import torch, numpy
before = set(sys.modules)
for arguments in ["info"], ["--help"], ["demo", "--help"]:
    sys.argv[1:] = arguments
    try:
        runpy.run_module("dither", run_name="__main__")
    except SystemExit as end:
        assert not end.code
print("imported:", sorted({{name.split(".")[0] for name in set(sys.modules) - before}} & {set(EXTRAS)}))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("usage: python -m dither") == 2 and "imported: []" in run.stdout


def test_info(capsys):
    assert main(["info"]) == 0
    facts = dict(re.split(r"  +", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert facts["version"] == dither.__version__ and facts["torch"] == torch.__version__
    assert facts["torch threads"] == str(torch.get_num_threads())
    assert facts["cuda available"] == ("yes" if torch.cuda.is_available() else "no")
    for name, value in dither.build_info().items():
        if isinstance(value, list):
            assert facts[name.replace("_", " ")] == ", ".join(value)


@pytest.mark.parametrize("arguments", ["", "fly", "info now", "demo --seeds 0", "demo --device tpu", "bench --threads x"])
def test_bad_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments.split())
    assert end.value.code == 2 and "usage: python -m dither" in capsys.readouterr().err


# bench


def fake_bench(monkeypatch: pytest.MonkeyPatch, action: Any) -> None:
    monkeypatch.setitem(sys.modules, "dither.bench", SimpleNamespace(main=action))


def test_a_reader_that_stops_is_no_error():
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as pipe:
        run = subprocess.run([sys.executable, "-m", "dither", "samplers"], stdout=pipe, stderr=subprocess.PIPE, text=True)
    assert (run.returncode, run.stderr) == (141, "")


def test_bench_dispatch(monkeypatch):
    calls = []
    fake_bench(monkeypatch, lambda families, **keywords: calls.append((families, keywords)))
    assert main(["bench"]) == 0
    options = ["--json", "a.json", "--markdown", "b.md", "--device", "cpu", "--threads", "2"]
    assert main(["bench", "noise", "optim", "--quick", *options]) == 0
    nothing = {"json": None, "markdown": None, "quick": False, "device": None, "threads": None}
    everything = {"json": Path("a.json"), "markdown": Path("b.md"), "quick": True, "device": "cpu", "threads": 2}
    assert calls == [([], nothing), (["noise", "optim"], everything)]


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ValueError("family is 'x', expected 'noise'"), 2, "family is 'x', expected 'noise'"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (FileNotFoundError(2, "No such file or directory", "no/a.json"), 1, "[Errno 2] No such file or directory: 'no/a.json'"),
    ],
)
def test_errors_are_one_line(error, status, message, monkeypatch, capsys):
    def fail(families: list[str], **options: Any) -> None:
        raise error

    fake_bench(monkeypatch, fail)
    assert main(["bench", "x"]) == status
    assert capsys.readouterr().err == f"dither bench: {message}\n"


# extras


@pytest.mark.parametrize("package", EXTRAS)
def test_a_missing_extra_is_one_line(package, monkeypatch, capsys, tmp_path):
    for module in EXTRAS:
        pytest.importorskip(module)
    for name in [*sys.modules, package]:
        if name.split(".")[0] == package:
            monkeypatch.setitem(sys.modules, name, None)
        elif name.startswith("dither.demo"):
            monkeypatch.delitem(sys.modules, name)
    assert main(["demo", "--out", str(tmp_path / "out")]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err == f"dither demo: this needs {EXTRAS[package]}: pip install 'dither[demo]'\n"


def test_require(monkeypatch, tmp_path):
    assert _extras.require("json.decoder", extra="demo") is sys.modules["json.decoder"]
    with pytest.raises(_extras.MissingExtra, match=r"this needs nowhere: pip install 'dither\[x\]'"):
        _extras.require("nowhere.at.all", extra="x")
    (tmp_path / "broken_package.py").write_text("import nowhere")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="nowhere") as broken:
        _extras.require("broken_package", extra="x")
    assert not isinstance(broken.value, _extras.MissingExtra), "it is installed: the traceback is of use"
