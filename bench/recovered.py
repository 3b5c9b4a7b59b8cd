"""OFT, BOFT, HRA and PSOFT beside PEFT's own: the same outputs from the same checkpoint, and how
orthogonal the rotations are.

    outputs         a PEFT adapter with random parameters on three float32 linears, saved, converted and loaded as LOFT. Largest
                    difference of the outputs over their largest entry: of the converted adapter,
                    merged, and converted back to PEFT
    orthogonality   largest |sigma - 1| of R in float32, in float64, at generators of a given 2-norm: PEFT's, the converted
                    adapter's, and that of the method's LOFT config (`LoftConfig.oft(...)`, ...,
                    which solves exactly) at the same numbers

BOFT's CUDA extension, without which PEFT silently runs one butterfly factor, is replaced by
`torch.block_diag`. Tables are printed; each row is kept in `--out` as soon as it is there.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import torch
from common import Report, machine
from peft import BOFTConfig, HRAConfig, OFTConfig, PsoftConfig
from peft.tuners.boft import layer as boft_layer
from torch import Tensor, nn

from loft_rs import LoftConfig, convert_adapter

PACKAGES = ["torch", "peft", "loft_rs"]
WIDTH, BLOCK, RANK = 256, 32, 64
NORMS = (0.1, 0.5, 1.0, 2.0)


class BlockDiagonal:
    """BOFT's extension, forward alone."""

    @staticmethod
    def forward(blocks: Tensor) -> list[Tensor]:
        return [torch.stack([torch.block_diag(*factor) for factor in blocks])]


class Net(nn.Module):
    """A wide, a tall and a square linear, with and without bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.mid, self.same = nn.Linear(256, 384), nn.Linear(384, 128, bias=False), nn.Linear(128, 128)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.mid(torch.tanh(self.up(x))))
        return x + self.same(x)


def configs() -> dict[tuple[str, str], Callable[..., peft.PeftConfig]]:
    """(method, setting) -> a config with more fields."""
    made: dict[tuple[str, str], Callable[..., peft.PeftConfig]] = {}
    for b in (4, 8, 32, 64, 20):
        note = " (PEFT adjusts it)" if b == 20 else ""
        made["OFT", f"block {b}{note}"] = lambda b=b, **o: OFTConfig(oft_block_size=b, **o)
        made["OFT", f"block {b}, exact{note}"] = lambda b=b, **o: OFTConfig(
            oft_block_size=b, use_cayley_neumann=False, **o
        )
    made["OFT", "block 8, shared"] = lambda **o: OFTConfig(oft_block_size=8, block_share=True, **o)
    made["OFT", "8 blocks"] = lambda **o: OFTConfig(r=8, oft_block_size=0, **o)
    made["OFT", "block 32, coft"] = lambda **o: OFTConfig(oft_block_size=32, coft=True, eps=0.3, **o)
    for b in (4, 8, 32):
        for m in (1, 2, 3):
            if m < 3 or b < 32:
                made["BOFT", f"block {b}, {m} factors"] = lambda b=b, m=m, **o: BOFTConfig(
                    boft_block_size=b, boft_n_butterfly_factor=m, **o
                )
    for r in (2, 8, 32):
        for gs in (False, True):
            made["HRA", f"r {r}{', Gram-Schmidt' if gs else ''}"] = lambda r=r, gs=gs, **o: HRAConfig(
                r=r, apply_GS=gs, **o
            )
    for r in (8, RANK):
        made["PSOFT", f"r {r}"] = lambda r=r, **o: PsoftConfig(r=r, **o)
    made["PSOFT", "r 64, series"] = lambda **o: PsoftConfig(r=RANK, use_cayley_neumann=True, **o)
    made["PSOFT", "r 64, no magnitudes"] = lambda **o: PsoftConfig(r=RANK, psoft_mag_a=False, psoft_mag_b=False, **o)
    made["PSOFT", "r 64, free"] = lambda **o: PsoftConfig(r=RANK, psoft_orth=False, **o)
    made["PSOFT", "r 64, lowrank, wide layer"] = lambda **o: PsoftConfig(
        r=RANK, psoft_svd="lowrank", **o | {"target_modules": ["mid"]}
    )
    return made


def output(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(x)


def outputs(report: Report) -> None:
    report.open("outputs")
    x = torch.randn(512, 256, generator=torch.Generator().manual_seed(1))
    base = Net()
    for (method, setting), config in configs().items():
        torch.manual_seed(2)
        options = {"target_modules": ["up", "mid", "same"], "init_weights": False}
        model = peft.get_peft_model(copy.deepcopy(base), config(**options))
        wanted = output(model, x)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(f"{folder}/peft")
            convert_adapter(f"{folder}/peft", f"{folder}/loft", base)
            converted = peft.PeftModel.from_pretrained(copy.deepcopy(base), f"{folder}/loft")
            found = {"converted": output(converted, x), "merged": output(converted.merge_and_unload(), x)}
            if "lowrank" not in setting:  # PEFT's basis on the way back is that of the full SVD
                convert_adapter(f"{folder}/loft", f"{folder}/back", base)
                found["back"] = output(peft.PeftModel.from_pretrained(copy.deepcopy(base), f"{folder}/back"), x)
        found = {"adapter_moves": output(base, x), **found}
        scale = wanted.abs().max()
        report.add(
            method=method, setting=setting, **{k: float((v - wanted).abs().max() / scale) for k, v in found.items()}
        )
    report.close("outputs")
    report.table("outputs")


def of_norm(shape: tuple[int, ...], norm: float) -> Tensor:
    """Random skew matrices of a 2-norm."""
    a = torch.randn(*shape, generator=torch.Generator().manual_seed(3))
    a = a - a.mT
    return a * norm / torch.linalg.matrix_norm(a, 2)[..., None, None]


def upper(a: Tensor) -> Tensor:
    i, j = torch.triu_indices(a.shape[-1], a.shape[-1], 1)
    return a[..., i, j]


def set_oft(layer: nn.Module, norm: float) -> None:
    layer.oft_R["default"].weight.data = upper(of_norm((WIDTH // BLOCK, BLOCK, BLOCK), norm))


def set_boft(layer: nn.Module, norm: float) -> None:
    layer.boft_R["default"].data = of_norm((3, WIDTH // 8, 8, 8), norm)
    layer.boft_s["default"].data.fill_(1)


def set_hra(layer: nn.Module, norm: float) -> None:
    """Pairs of equal vectors, the start, and then as far away as `norm` of their length."""
    u = layer.hra_u["default"].data
    pairs = torch.randn(len(u), u.shape[1] // 2, generator=torch.Generator().manual_seed(3)).repeat_interleave(2, 1)
    u.copy_(pairs + norm * torch.randn(u.shape, generator=torch.Generator().manual_seed(4)))


def set_psoft(layer: nn.Module, norm: float) -> None:
    layer.psoft_R["default"].weight.data = upper(of_norm((RANK, RANK), norm))


PLAIN = {"target_modules": ["0"]}
ROTATIONS = {
    ("OFT", "block 32, series (default)"): (
        lambda: OFTConfig(**PLAIN),
        lambda: LoftConfig.oft(BLOCK, **PLAIN),
        set_oft,
    ),
    ("OFT", "block 32, exact"): (
        lambda: OFTConfig(use_cayley_neumann=False, **PLAIN),
        lambda: LoftConfig.oft(BLOCK, **PLAIN),
        set_oft,
    ),
    ("BOFT", "block 8, 3 factors"): (
        lambda: BOFTConfig(boft_block_size=8, boft_n_butterfly_factor=3, **PLAIN),
        lambda: LoftConfig.boft(8, 3, **PLAIN),
        set_boft,
    ),
    ("HRA", "r 8"): (lambda: HRAConfig(r=8, **PLAIN), lambda: LoftConfig.hra(8, **PLAIN), set_hra),
    ("PSOFT", "r 64, series, no magnitudes"): (
        lambda: PsoftConfig(r=RANK, psoft_mag_a=False, psoft_mag_b=False, use_cayley_neumann=True, **PLAIN),
        lambda: LoftConfig.psoft(RANK, magnitudes=False, **PLAIN),
        set_psoft,
    ),
    ("PSOFT", "r 64, exact, no magnitudes"): (
        lambda: PsoftConfig(r=RANK, psoft_mag_a=False, psoft_mag_b=False, **PLAIN),
        lambda: LoftConfig.psoft(RANK, magnitudes=False, **PLAIN),
        set_psoft,
    ),
}


def identity() -> nn.Module:
    base = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False))
    base[0].weight.data = torch.eye(WIDTH)
    return base


def error(model: nn.Module) -> float:
    """Largest |sigma - 1| of R, which is what an adapter makes of the identity."""
    rotation = model.merge_and_unload()[0].weight.detach().double()
    return float((torch.linalg.svdvals(rotation) - 1).abs().max())


def orthogonality(report: Report) -> None:
    report.open("orthogonality")
    for (method, setting), (config, ours, put) in ROTATIONS.items():
        for norm in NORMS:
            model = peft.get_peft_model(identity(), config())
            put(model.base_model.model[0], norm)
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(f"{folder}/peft")
                convert_adapter(f"{folder}/peft", f"{folder}/loft", identity())
                converted = peft.PeftModel.from_pretrained(identity(), f"{folder}/loft")
                native = peft.get_peft_model(identity(), ours())
                with torch.no_grad():
                    theta = converted.base_model.model[0].loft_theta["default"]
                    native.base_model.model[0].loft_theta["default"].copy_(theta)
            found = {"peft": error(model), "converted": error(converted), "loft": error(native)}
            report.add(method=method, setting=setting, norm=norm, **found)
    report.close("orthogonality")
    report.table("orthogonality")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "recovered.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    boft_layer._FBD_CUDA = BlockDiagonal
    warnings.filterwarnings("ignore", category=UserWarning)  # of a block size adjusted, of BOFT's extension, of coft
    report = Report(options.out, machine(options.threads, PACKAGES))
    outputs(report)
    orthogonality(report)


if __name__ == "__main__":
    main()
