"""A small PEFT model, its logits, and a few steps of training."""

from __future__ import annotations

import peft
import torch
from reference import make_llama, token_batches

from loft_rs import LoftConfig

QUIET = {"target_modules": "all-linear", "r": 4}


def build(config=None, base=None, **options):
    return peft.get_peft_model(base or make_llama(), config or LoftConfig(**QUIET | options))


def train(model, steps=3, lr=0.05, classes=False):
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    model.train()
    for batch in token_batches(steps, classes=classes):
        model(**batch).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return model.eval()


def logits(model, seed=7, classes=False):
    with torch.no_grad():
        return model.eval()(**token_batches(1, seed=seed, classes=classes)[0]).logits
