"""What the tests of convert/ share: a small model, PEFT adapters of every method and setting, and
how they are compared.
"""

from __future__ import annotations

import json

import peft
import pytest
import torch
from peft import BOFTConfig, HRAConfig, OFTConfig, PsoftConfig
from peft.tuners.boft import layer as boft_layer
from safetensors.torch import load_file, save_file
from torch import nn

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
X = torch.randn(24, 64, generator=torch.Generator().manual_seed(3))


class TorchBlockDiagonal:
    """What BOFT's CUDA extension does. Where it cannot be built, PEFT silently runs one butterfly
    factor.
    """

    @staticmethod
    def forward(blocks):
        return [torch.stack([torch.block_diag(*factor) for factor in blocks])]

    @staticmethod
    def backward(grad, blocks):
        n, count, b, _ = blocks.shape
        return [grad.view(n, count, b, count, b).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).contiguous()]


@pytest.fixture(scope="module")
def extension():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(boft_layer, "_FBD_CUDA", TorchBlockDiagonal)
        yield


class Net(nn.Module):
    """A wide, a tall and a square layer, with and without bias, and a head."""

    def __init__(self, widths=(64, 96, 32), decay=0.0):
        super().__init__()
        torch.manual_seed(0)
        n, wide, narrow = widths
        self.up, self.mid, self.same = (
            nn.Linear(n, wide),
            nn.Linear(wide, narrow, bias=False),
            nn.Linear(narrow, narrow),
        )
        self.head = nn.Linear(narrow, 5)
        if decay:  # a spectrum on which a subspace iteration converges
            for layer in (self.up, self.mid, self.same):
                u, s, vh = torch.linalg.svd(layer.weight.data, full_matrices=False)
                layer.weight.data = u * s * decay ** torch.arange(len(s)) @ vh

    def forward(self, x):
        x = torch.tanh(self.mid(torch.tanh(self.up(x))))
        return self.head(x + self.same(x))


LAYERS = ["up", "mid", "same"]
SHARED = {"target_modules": LAYERS, "init_weights": False}


def trained(config, base=None, steps=2):
    """A PEFT adapter after some steps of Adam from a random start, in evaluation mode."""
    torch.manual_seed(1)
    model = peft.get_peft_model(base or Net(), config)
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.03)
    for _ in range(steps):
        model(X).square().sum().backward()
        optimiser.step()
        optimiser.zero_grad()
    return model.eval()


def output(model, x=X):
    with torch.no_grad():
        return model.eval()(x)


def loaded(folder, base=None):
    return peft.PeftModel.from_pretrained(base or Net(), str(folder))


def apart(a, b):
    """Largest difference over the scale of the output."""
    return float((a - b).abs().max() / b.abs().max())


def saved(config, folder, base=None):
    model = trained(config, base)
    model.save_pretrained(folder)
    return model


def edit(folder, *, tensors=None, **fields):
    """Change an adapter on disk: fields of its config, tensors by name (None removes)."""
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({k: v for k, v in (config | fields).items() if v != "gone"}))
    if tensors is not None:
        held = load_file(folder / WEIGHTS) | tensors
        save_file({k: v for k, v in held.items() if v is not None}, folder / WEIGHTS)


CONFIGS = {
    **{
        f"oft {b}{' exact' if exact else ''}": lambda b=b, exact=exact: OFTConfig(
            oft_block_size=b, use_cayley_neumann=not exact, **SHARED
        )
        for b in (4, 8, 20, 32, 64)
        for exact in (False, True)
    },
    "oft shared": lambda: OFTConfig(oft_block_size=8, block_share=True, **SHARED),
    "oft shared exact": lambda: OFTConfig(oft_block_size=8, block_share=True, use_cayley_neumann=False, **SHARED),
    "oft by count": lambda: OFTConfig(r=4, oft_block_size=0, use_cayley_neumann=False, **SHARED),
    "oft 3 terms": lambda: OFTConfig(oft_block_size=8, num_cayley_neumann_terms=3, **SHARED),
    "oft 7 terms": lambda: OFTConfig(oft_block_size=8, num_cayley_neumann_terms=7, **SHARED),
    **{
        f"boft {b} x {m}": lambda b=b, m=m: BOFTConfig(boft_block_size=b, boft_n_butterfly_factor=m, **SHARED)
        for b, m in ((4, 1), (8, 1), (4, 2), (8, 2), (4, 3), (8, 3))
    },
    "boft by count": lambda: BOFTConfig(boft_block_size=0, boft_block_num=4, boft_n_butterfly_factor=2, **SHARED),
    **{
        f"hra {r}{' GS' if gs else ''}": lambda r=r, gs=gs: HRAConfig(r=r, apply_GS=gs, **SHARED)
        for r in (2, 5, 8, 32)
        for gs in (False, True)
    },
    "psoft": lambda: PsoftConfig(r=16, **SHARED),
    "psoft 32": lambda: PsoftConfig(r=32, psoft_alpha=7, **SHARED),
    "psoft a": lambda: PsoftConfig(r=8, psoft_mag_b=False, **SHARED),
    "psoft b": lambda: PsoftConfig(r=8, psoft_mag_a=False, **SHARED),
    "psoft plain": lambda: PsoftConfig(r=8, psoft_mag_a=False, psoft_mag_b=False, **SHARED),
    "psoft neumann": lambda: PsoftConfig(r=16, use_cayley_neumann=True, **SHARED),
    "psoft 4 terms": lambda: PsoftConfig(r=16, use_cayley_neumann=True, num_cayley_neumann_terms=4, **SHARED),
    "psoft free": lambda: PsoftConfig(r=8, psoft_orth=False, **SHARED),
}
