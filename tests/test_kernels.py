"""The Triton kernels: on a GPU where there is one, and anywhere in Triton's interpreter, against float64."""

import os
import subprocess
import sys

import pytest
import torch

from loft_rs import kernels
from loft_rs.transform import Cayley, skew

CHECK = """
import torch
from test_kernels import errors
for r in (2, 3, 16, 33):
    for norm in (1e-12, 1e-6, 1.0, 30.0):
        print(r, norm, *errors(r, norm, "cpu"))
"""


def errors(r: int, norm: float, device: str) -> tuple[float, float]:
    """Relative errors of D and Z."""
    theta = norm * torch.randn(3, r * (r - 1) // 2, generator=torch.Generator().manual_seed(r)).to(device)
    delta, inverse = kernels.cayley(theta, r)
    a = skew(theta.double(), r)
    z = torch.linalg.inv(a + torch.eye(r, dtype=a.dtype, device=device))
    d = -2 * a @ z
    return float((delta - d).norm() / d.norm()), float((inverse - z).norm() / z.norm())


def test_the_kernel_in_the_interpreter():
    pytest.importorskip("triton")
    here = os.path.dirname(__file__)
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([here, *sys.path])}
    run = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr
    found = [tuple(map(float, line.split())) for line in run.stdout.splitlines()]
    assert len(found) == 16
    # Each entry is rounded to float32 once.
    assert all(max(d, z) <= torch.finfo(torch.float32).eps for _, _, d, z in found), found


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("r", [2, 7, 64, 100, 128])
@pytest.mark.parametrize("norm", [1e-6, 0.1, 10.0])
def test_the_kernel_on_a_gpu(r, norm):
    assert kernels.available(torch.zeros(1, r * (r - 1) // 2, device="cuda"), r)
    assert max(errors(r, norm, "cuda")) <= torch.finfo(torch.float32).eps


def test_what_the_kernel_does_not_serve_goes_the_torch_way():
    assert not kernels.available(torch.zeros(1, 6), 4)
    assert Cayley().delta(torch.zeros(1, 6), 4)[0].shape == (1, 4, 4)
