"""Where no kernels were compiled, and on devices without them, dither.reference does the work."""

import subprocess
import sys

import pytest
import torch

import dither

TRAINING = """
torch.manual_seed(0)
p = torch.nn.Parameter(torch.randn(5, 3))
opt = dither.optim.AdamW([p], lr=0.1, max_norm=1.0, noise_eta=0.01, seed=3, skip_nonfinite=True)
for t in range(3):
    p.grad = torch.ones(5, 3) * (t + 1)
    opt.step()
"""
WITHOUT_KERNELS = f"""
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "._C" else find_spec(name, package)
import torch, dither
assert dither.build_info()["compiled"] is False
{TRAINING}
print(" ".join(f"{{v:.6f}}" for v in p.detach().flatten().tolist()))
print(" ".join(f"{{v:.5f}}" for v in dither.noise.normal(4, seed=1, stream=2).tolist()))
"""


def test_the_package_works_without_its_extension():
    run = subprocess.run([sys.executable, "-c", WITHOUT_KERNELS], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    params, normals = ([float(v) for v in line.split()] for line in run.stdout.splitlines())
    trained = {"torch": torch, "dither": dither}
    exec(TRAINING, trained)
    p = trained["p"]
    torch.testing.assert_close(torch.tensor(params), p.detach().flatten(), atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.tensor(normals), dither.noise.normal(4, seed=1, stream=2), atol=1e-4, rtol=0)


def test_meta_tensors_trace_without_work():
    x = torch.empty(2**40, device="meta")
    assert dither.noise.normal_(x, seed=1) is x


def test_tensors_beside_meta_tensors_are_not_left_unwritten():
    q = torch.randn(1, 2, 8, 4)
    with pytest.raises(ValueError, match="attention_lse_: out is on cpu, expected meta"):
        dither.ops.native.attention_lse_(q, q.to("meta"), None, False, 1.0, torch.empty(1, 2, 8))
