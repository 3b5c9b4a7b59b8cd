"""Float64 references, straight from the definitions, and the small models and batches the tests
share.
"""

from __future__ import annotations

import numpy as np
import torch

from loft_rs.transform.skew import skew


def exact_transform(name: str, theta: torch.Tensor, r: int) -> torch.Tensor:
    """T in theta's dtype, straight from the definition, differentiable."""
    eye = torch.eye(r, dtype=theta.dtype)
    if name == "free":
        return eye + theta
    name, _, option = name.partition("+")
    if option == "halves":
        a = torch.zeros(r, r, dtype=theta.dtype)
        a = torch.cat([a[: r - r // 2], torch.cat([theta, a[r - r // 2 :, r - r // 2 :]], 1)])
        theta = a[tuple(torch.tril_indices(r, r, -1))]
    elif option:
        inner = exact_transform(name, theta[: -2 * r], r)
        return torch.diag(1 + theta[-r:]) @ inner @ torch.diag(1 + theta[-2 * r : -r])
    a = skew(theta, r)
    name, _, terms = name.partition(":")
    if terms:
        return (eye - a) @ sum(torch.linalg.matrix_power(-a, k) for k in range(int(terms) + 1))
    return torch.linalg.solve(eye + a, eye - a, left=False) if name == "cayley" else torch.linalg.matrix_exp(a)


def basis_of(n: int, r: int, seed: int = 0) -> np.ndarray:
    """A random orthonormal (n, r)."""
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((n, r)))[0]


def make_llama(dtype: torch.dtype = torch.float32, **options):
    """A Llama with random weights: nothing tied, no biases, grouped-query attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes | options)).to(dtype)


def make_bert():
    """A BERT classifier with random weights and a fresh head; biases everywhere, a pooler."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=61,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    return BertForSequenceClassification(config)


def token_batches(count: int, *, size: int = 4, length: int = 12, classes: bool = False, seed: int = 0) -> list[dict]:
    """Batches of random tokens with labels: the tokens themselves, or a class of two."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        ids = torch.randint(0, 61, (size, length), generator=generator)
        labels = torch.randint(0, 2, (size,), generator=generator) if classes else ids
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return batches


def adam(model, lr=0.05):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)


def train(model, optimiser=None, steps=3, seed=0):
    optimiser = optimiser or adam(model)
    model.train()
    for batch in token_batches(steps, seed=seed):
        model(**batch).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return optimiser


def logits(model, seed=7):
    with torch.no_grad():
        return model.eval()(**token_batches(1, seed=seed)[0]).logits.double()


def own(layer):
    """The layer's adapter called "default"."""
    return layer.adapters["default"]


def unchanged(model, before):
    """Asserts that a state holds what it held, to the bit."""
    assert model.state_dict().keys() == before.keys()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], equal_nan=True, atol=0, rtol=0)


def own_hooks(model):
    """Asserts that the only forward hooks are the two of each module where passes begin;
    `module._loft_hooks` names them.
    """
    for module in model.modules():
        before, after = vars(module).get("_loft_hooks", (None, None))
        assert list(module._forward_pre_hooks) == ([] if before is None else [before])
        assert list(module._forward_hooks) == ([] if after is None else [after])
    assert any("_loft_hooks" in vars(module) for module in model.modules())


def untouched(model, before):
    """Asserts that a state holds what it held, and that calibration has left no tap and no hook of
    its own.
    """
    from loft_rs.tuner.adapters import adapted_layers

    unchanged(model, before)
    assert all(layer.tap is None for layer in adapted_layers(model)[1].values())
    own_hooks(model)
