"""Models in mid-training, snapshots of them, and a Trainer."""

from __future__ import annotations

import copy

import peft
import torch
from reference import make_llama, token_batches, train

import loft_rs
from loft_rs import LoftConfig, refresh
from loft_rs.tuner.adapters import adapted_layers

EPS = torch.finfo(torch.float32).eps


def build(base=None, *, calibrated=True, **options):
    options = {"target_modules": "all-linear", "r": 4, "support": "skewgrad"} | options
    config = LoftConfig(**options)
    model = peft.get_peft_model(base or make_llama(), config)
    if calibrated and config.needs_calibration:
        loft_rs.calibrate(model, token_batches(2))
    return model


def refreshed(base=None, rounds=2, **options):
    model = build(base, **options)
    for i in range(rounds):
        train(model, seed=i)
        refresh(model, token_batches(2, seed=i) if model.peft_config["default"].needs_calibration else None)
    train(model, seed=rounds)
    return model.eval()


def apart(a, b):
    return float((a - b).abs().max() / b.abs().max())


def snapshot(model, optimiser=None):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    return state, grads, None if optimiser is None else copy.deepcopy(optimiser.state_dict())


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def quantise(model):
    """Bases whose weight no one may read: all that a quantised layer gives is its forward."""

    class Opaque(torch.nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
            self.register_buffer("weight", linear.weight.detach().clone())

        def forward(self, x):
            return torch.nn.functional.linear(x, self.weight, self.bias)

    for layer in adapted_layers(model)[1].values():
        layer.base_layer = Opaque(layer.base_layer)
    return model


def trainer(output, *, steps=9, model=None, callback=None, optimiser=None, arguments=(), **options):
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(0)
    callback = callback or loft_rs.LoftRefreshCallback(**{"every": 2, "batches": 2} | options)
    arguments = TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=2,
        learning_rate=0.02,
        report_to=[],
        save_strategy="steps",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        max_steps=steps,
        **{"save_steps": 5} | dict(arguments),
    )
    data = [{"input_ids": b["input_ids"][0], "labels": b["labels"][0]} for b in token_batches(20)]
    model = model or build()
    given = {"train_dataset": data, "eval_dataset": data[:4], "optimizers": (optimiser, None), "callbacks": [callback]}
    return model, callback, Trainer(model, arguments, **given)
