"""What the build says where torch is missing or too old, and which GPUs it builds for."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).parents[1]
SETUP = """
import sys, sysconfig, pathlib, runpy
import setuptools.command.build_ext, pybind11
sysconfig.get_path = lambda name: {where!r}
sys.path = [p for p in sys.path if not (pathlib.Path(p) / "torch").exists()]
sys.argv = ["setup.py", "build_ext", "--build-temp", {where!r}, "--build-lib", {where!r}]
runpy.run_path("setup.py")
"""


def build(where):
    code = SETUP.format(where=str(where))
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


def test_without_torch(tmp_path):
    pytest.importorskip("setuptools")
    run = build(tmp_path)
    assert run.returncode != 0
    assert run.stderr.strip().splitlines()[-2:] == [
        "dither builds against the torch you already have, and found none.",
        "Run `pip install torch` first (with uv, or for a torch elsewhere: `pip install --no-build-isolation .`).",
    ]


def test_with_an_old_torch(tmp_path):
    pytest.importorskip("setuptools")
    library = tmp_path / "torch" / "lib" / "libtorch_cpu.so"
    library.parent.mkdir(parents=True)
    library.touch()
    (tmp_path / "torch" / "version.py").write_text("__version__ = '2.9.1+cpu'\n")
    run = build(tmp_path)
    assert run.returncode != 0
    assert run.stderr.strip().splitlines()[-2:] == [
        f"dither needs torch >= 2.10 and found 2.9 in {tmp_path / 'torch'}.",
        "Run `pip install -U torch` first.",
    ]


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
@pytest.mark.parametrize("source", sorted(ROOT.glob("csrc/*/*.isa.cpp")), ids=lambda p: p.parent.name + "/" + p.name)
def test_kernels_compile_elsewhere(source, tmp_path):
    """As on a processor without x86 intrinsics, and with nothing of the standard library but the integer types."""
    names = [f"{sign}int{bits}_t" for sign in ("", "u") for bits in (8, 16, 32, 64)] + ["uintptr_t", "intptr_t"]
    types = "".join(f"using {name} = __{name[:-2].upper()}_TYPE__;\n" for name in names)
    (tmp_path / "cstdint").write_text("#pragma once\n" + types)
    flags = [
        "-std=c++20",
        "-fsyntax-only",
        "-U__x86_64__",
        "-nostdinc",
        "-nostdinc++",
        f"-I{tmp_path}",
        "-DDITHER_ISA=baseline",
    ]
    run = subprocess.run(["g++", *flags, "-w", source], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.skipif(not (shutil.which("nvcc") or pathlib.Path("/usr/local/cuda/bin/nvcc").exists()), reason="no nvcc")
@pytest.mark.parametrize(
    "asked, built",
    [
        (None, {"sm_80", "sm_90", "sm_100", "sm_120", "compute_120"}),
        ("8.6;9.0a 10.0+PTX", {"sm_86", "sm_90a", "sm_100", "compute_100"}),
    ],
)
def test_architectures(tmp_path, asked, built):
    import pybind11

    beside = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    environment = {**os.environ, "PATH": beside, "TORCH_CUDA_ARCH_LIST": asked or ""}
    flags = [
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DTORCH_ROOT={pathlib.Path(torch.__file__).parent}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]
    subprocess.run(
        ["cmake", "-S", ROOT, "-B", tmp_path, "-G", "Ninja", "-DDITHER_CUDA=ON", *flags],
        check=True,
        env=environment,
        stdout=subprocess.DEVNULL,
    )
    codes = re.findall(r",code=\[?([\w,]+)", (tmp_path / "build.ninja").read_text())
    assert set(",".join(codes).split(",")) == built


CMAKE = """#!/bin/sh
[ "$1" = --build ] && exit
[ "$1" = --fresh ] && rm -rf "$DITHER_BUILD_DIR/CMakeFiles" && echo afresh || echo again
mkdir -p "$DITHER_BUILD_DIR/CMakeFiles"
"""


def test_a_second_build_keeps_objects_of_the_same_settings(tmp_path):
    pytest.importorskip("setuptools")
    (tmp_path / "cmake").write_text(CMAKE)
    (tmp_path / "cmake").chmod(0o755)
    kept = {**os.environ, "PATH": os.pathsep.join([str(tmp_path), os.environ["PATH"]]), "DITHER_BUILD_DIR": str(tmp_path / "b")}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-temp", str(tmp_path), "--build-lib", str(tmp_path)]
    said = [
        subprocess.run(command, cwd=ROOT, env=kept | more, check=True, capture_output=True, text=True).stdout.split()
        for more in ({}, {}, {"CXXFLAGS": "-g"}, {"CXXFLAGS": "-g"}, {"CMAKE_ARGS": "-DDITHER_CUDA=OFF"})
    ]
    assert said == [["afresh"], ["again"], ["afresh"], ["again"], ["afresh"]]
