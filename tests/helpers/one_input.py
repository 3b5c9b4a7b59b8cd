"""Models whose q, k and v read one input."""

import peft
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from loft_rs import LoftConfig


class Attention(nn.Module):
    def __init__(self, width: int = 24):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, w) for w in (width, 12, 12, width))
        self.detour = None

    def forward(self, x):
        q, k = self.q(x), self.k(x)
        v = self.v(x if self.detour is None else self.detour(x))
        return x + self.o(q * torch.cat([k, v], -1))


class Model(nn.Module):
    def __init__(self, checkpointing=None):
        super().__init__()
        self.blocks = nn.ModuleList(Attention() for _ in range(2))
        self.checkpointing = checkpointing

    def forward(self, x):
        for block in self.blocks:
            x = block(x) if self.checkpointing is None else checkpoint(block, x, use_reentrant=self.checkpointing)
        return x


def build(checkpointing=None, dtype=torch.float64, **options):
    torch.manual_seed(0)
    base = Model(checkpointing).to(dtype)
    config = LoftConfig(r=6, target_modules=["q", "k", "v", "o"], support="random", init_weights=False, **options)
    model = peft.get_peft_model(base, config)
    for layer in model.modules():
        if hasattr(layer, "placement"):
            layer.placement = "add"
    return model


def blocks(model):
    return model.base_model.model.blocks


def set_apart(model):
    """Let every layer run on its own."""
    for block in blocks(model):
        block._loft_root.groups.clear()


def passes(model, count=3, joint=True, x=None):
    """Output and gradients of the last of `count` passes."""
    if not joint:
        set_apart(model)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    for _ in range(count):
        optimiser.step()
        model.zero_grad()
        given = torch.randn(5, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
        y = model(given)
        (y**2).sum().backward()
    return y.detach(), given.grad, [p.grad.clone() for p in model.parameters() if p.requires_grad]
