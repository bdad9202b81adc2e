#!/usr/bin/env bash
# All that a machine with a GPU should do, in under ten minutes, what matters most first: build for its GPU; run the tests of every
# family on it; compare the bits of CPU and CUDA; capture samplers as CUDA graphs, which must give the same bits, and time them;
# time the kernels of every family, private steps, and solvers of transport; run the demonstration on it.
# It installs nothing: torch, numpy, pybind11, cmake, ninja, nvcc, pytest, hypothesis and scipy must be there; peers are timed, and
# the demonstration is run, where their packages are installed.
#   PYTHON=python3 OUT=bench/results bash bench/gpu_visit.sh
# writes to $OUT the figures, <date>-<gpu>.json and .md, and the same of <date>-<gpu>-samplers, -private-steps and
# -transport-solvers; and logs: build.log, tests.log, bits.log, samplers.log, bench.log, steps.log, solvers.log, demo.log (git
# ignores these). Timings that are stopped for their time leave the rows that they had. The exit status is 0 if all
# of it succeeded.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-bench/results}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
SECONDS=0
failed=()

phase() { # name, most seconds, log, command...: stops at the end of the ten minutes in any case
    local name=$1 most=$2 log=$3 left=$((580 - SECONDS))
    shift 3
    [ "$left" -lt "$most" ] && most=$left
    if timeout --signal=INT --kill-after=10 "$most" "$@" >"$log" 2>&1; then
        echo "$name: done after $SECONDS s"
    else
        failed+=("$name")
        echo "$name: FAILED after $SECONDS s; the end of $log:"
    fi
    tail -n 12 "$log"
}

read -r arch gpu < <("$PYTHON" -c '
import torch
major, minor = torch.cuda.get_device_capability()
print(f"{major}.{minor}", torch.cuda.get_device_name().replace(" ", "-"))') || exit 1
echo "$gpu, compute capability $arch"
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$arch} PYTHONPATH=$PWD/python
PATH=$(dirname "$("$PYTHON" -c 'import sys; print(sys.executable)')"):$PATH # cmake and ninja may be packages
build() {
    cmake -S . -B build/gpu -G Ninja -DDITHER_CUDA=ON -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$PWD/python/dither" \
        -DPython_EXECUTABLE="$("$PYTHON" -c 'import sys; print(sys.executable)')" \
        -DTORCH_ROOT="$("$PYTHON" -c 'import torch; print(torch.__path__[0])')" \
        -Dpybind11_DIR="$("$PYTHON" -c 'import pybind11; print(pybind11.get_cmake_dir())')" &&
        cmake --build build/gpu --target _C
}
export -f build
export PYTHON
phase build 240 "$OUT/build.log" bash -c build
workers=$("$PYTHON" -c 'import xdist; print("-n 6")' 2>/dev/null)
# shellcheck disable=SC2086
phase tests 240 "$OUT/tests.log" "$PYTHON" -m pytest -q $workers --gpu
phase bits 90 "$OUT/bits.log" "$PYTHON" bench/compare_bits.py
result="$OUT/$(date +%F)-$gpu"
phase samplers 60 "$OUT/samplers.log" "$PYTHON" bench/samplers.py --device cuda --cuda-graph --rounds 5 --out "$result-samplers"
phase bench 240 "$OUT/bench.log" "$PYTHON" -m dither bench --device cuda --json "$result.json" --markdown "$result.md"
phase steps 90 "$OUT/steps.log" "$PYTHON" bench/private_steps.py --device cuda --models 784 28 transformer --out "$result-private-steps"
phase solvers 75 "$OUT/solvers.log" "$PYTHON" bench/transport_solvers.py --device cuda --sizes 1000 --regs 1e-2 1e-3 \
    --instances U P2 --contenders dither POT --cap 3 --no-steps --out "$result-transport-solvers"
if "$PYTHON" -c 'import sklearn, matplotlib, rich, tqdm, dp_accounting' 2>/dev/null; then
    phase demo 120 "$OUT/demo.log" "$PYTHON" -m dither demo --quick --device cuda --out build/dither-demo
fi
echo "after $SECONDS s: ${#failed[@]} failed ${failed[*]}"
[ "${#failed[@]}" -eq 0 ]
