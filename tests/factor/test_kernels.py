"""The Triton kernels: on a GPU where there is one, and anywhere in Triton's interpreter, against
float64.
"""

import os
import subprocess
import sys

import pytest
import torch

from loft_rs.factor import kernels as block_kernels
from loft_rs.transform import kernels as solve_kernels
from loft_rs.transform.skew import skew
from loft_rs.transform.transforms import Cayley

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
    delta, inverse = solve_kernels.cayley(theta, r)
    a = skew(theta.double(), r)
    z = torch.linalg.inv(a + torch.eye(r, dtype=a.dtype, device=device))
    d = -2 * a @ z
    return float((delta - d).norm() / d.norm()), float((inverse - z).norm() / z.norm())


TURNS = """
import torch
from test_kernels import turn_errors
for rows, n, b, permuted in ((5, 32, 16, False), (70, 64, 16, True), (130, 64, 32, True), (64, 128, 64, False)):
    print(*turn_errors(rows, n, b, permuted, torch.float32, "cpu"))
"""


def turn_errors(rows: int, n: int, b: int, permuted: bool, dtype: torch.dtype, device: str) -> list[float]:
    """Errors of `rotate_blocks`, and of both results of `rotate_blocks_backward`, relative to the
    norms, against float64.
    """
    generator = torch.Generator().manual_seed(rows)
    x, g = (torch.randn(rows, n, generator=generator).to(device, dtype) for _ in range(2))
    d = (0.3 * torch.randn(n // b, b, b, generator=generator)).to(device, dtype)
    order = torch.randperm(n, generator=generator).to(device) if permuted else None
    found = [block_kernels.rotate_blocks(x, d.mT, order), *block_kernels.rotate_blocks_backward(g, x, d, order, True)]
    assert block_kernels.rotate_blocks_backward(g, x, d, order, False)[0] is None
    place = torch.arange(n, device=device) if order is None else order
    whole = torch.block_diag(*d.double()) + torch.eye(n, dtype=torch.float64, device=device)
    xp, gp = x.double()[:, place], g.double()[:, place]
    blocks = torch.stack([gp[:, i : i + b].mT @ xp[:, i : i + b] for i in range(0, n, b)])
    back = place.argsort()
    wanted = [(xp @ whole.mT)[:, back], (gp @ whole)[:, back], blocks]
    return [float((a.double() - w).norm() / w.norm()) for a, w in zip(found, wanted, strict=True)]


def in_interpreter(script: str) -> list[tuple[float, ...]]:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the kernels themselves are tested here")
    here = os.path.dirname(__file__)
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([here, *sys.path])}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr
    return [tuple(map(float, line.split())) for line in run.stdout.splitlines()]


def test_cayley_in_the_interpreter():
    found = in_interpreter(CHECK)
    assert len(found) == 16
    # Each entry is rounded to float32 once.
    assert all(max(d, z) <= torch.finfo(torch.float32).eps for _, _, d, z in found), found


def test_turns_in_the_interpreter():
    found = in_interpreter(TURNS)
    assert len(found) == 4
    assert all(max(errors) <= 1e-6 for errors in found), found


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("b", block_kernels.BLOCK_SIZES)
@pytest.mark.parametrize("permuted", [False, True])
def test_turns_on_a_gpu(b, permuted, dtype):
    assert block_kernels.rotates(torch.zeros(2, b, device="cuda", dtype=dtype), b)
    assert not block_kernels.rotates(torch.zeros(0, b, device="cuda", dtype=dtype), b)
    for rows, n in ((5, b), (1000, 4 * b)):
        turned, back, product = turn_errors(rows, n, b, permuted, dtype, "cuda")
        assert max(turned, back) <= torch.finfo(dtype).eps * (b**0.5 if dtype == torch.float32 else 1)
        assert product <= 1e-6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("r", [2, 7, 64, 100, 128])
@pytest.mark.parametrize("norm", [1e-6, 0.1, 10.0])
def test_cayley_on_a_gpu(r, norm):
    assert solve_kernels.available(torch.zeros(1, r * (r - 1) // 2, device="cuda"), r)
    assert max(errors(r, norm, "cuda")) <= torch.finfo(torch.float32).eps


def test_what_the_kernel_does_not_serve_goes_the_torch_way():
    assert not solve_kernels.available(torch.zeros(1, 6), 4)
    assert Cayley().delta(torch.zeros(1, 6), 4)[0].shape == (1, 4, 4)
