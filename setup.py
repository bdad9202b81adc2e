"""Drive CMake from pip. Torch is found where pip installs, so build isolation needs no second torch."""

import os
import platform
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
# Where one of these differs from the last build in the tree, it is built afresh: CMake keeps what it found, and pip removes the
# tools of an isolated build, which PATH names.
ASKED = ("PATH", "CXX", "CXXFLAGS", "CUDACXX", "CUDAFLAGS", "CUDAHOSTCXX", "CUDA_HOME", "LDFLAGS", "TORCH_CUDA_ARCH_LIST")
# Elsewhere the package installs without kernels and runs dither.reference.
HAS_KERNELS = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")


def torch_root() -> Path:
    paths = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path]
    for root in [Path(p) / "torch" for p in dict.fromkeys(paths) if p]:
        if (root / "lib" / "libtorch_cpu.so").exists():
            found = re.search(r"__version__ = '(\d+)\.(\d+)", (root / "version.py").read_text())
            if found and (int(found[1]), int(found[2])) < (2, 10):
                sys.exit(
                    f"dither needs torch >= 2.10 and found {found[1]}.{found[2]} in {root}.\nRun `pip install -U torch` first."
                )
            return root
    sys.exit(
        "dither builds against the torch you already have, and found none.\n"
        "Run `pip install torch` first (with uv, or for a torch elsewhere: `pip install --no-build-isolation .`)."
    )


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        import pybind11

        torch = torch_root()
        out = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        build = Path(os.environ.get("DITHER_BUILD_DIR", Path(self.build_temp) / "cmake")).resolve()
        configure = [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={out}",
            f"-DTORCH_ROOT={torch}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            *os.environ.get("CMAKE_ARGS", "").split(),
        ]
        if os.environ.get("DITHER_CCACHE"):
            configure += [f"-DCMAKE_{language}_COMPILER_LAUNCHER=ccache" for language in ("CXX", "CUDA")]
        settings = repr([*configure, (torch / "version.py").read_text(), *map(os.environ.get, ASKED)])
        last = build / "CMakeFiles" / "settings"  # beside the objects: --fresh removes both
        same = last.exists() and last.read_text() == settings
        subprocess.check_call(["cmake", *([] if same else ["--fresh"]), "-S", ROOT, "-B", build, "-G", "Ninja", *configure])
        last.write_text(settings)
        jobs = os.environ.get("MAX_JOBS")
        subprocess.check_call(["cmake", "--build", build, "--target", "_C", *(["-j", jobs] if jobs else [])])


extensions = [Extension("dither._C", sources=[])] if HAS_KERNELS else []
setup(ext_modules=extensions, cmdclass={"build_ext": CMakeBuild})
