"""pilot.py under side="auto": which side a pilot decides for, and that it stays."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from reference import make_llama, token_batches
from test_calibration import X
from test_pilot import SHORT, build, perceptron
from torch import nn

from loft_rs import Pilot, calibrate, refresh
from loft_rs.tuner.model import adapted_layers


class TwoLinears(nn.Module):
    """A tall and a wide layer, of which only one side's rotations can make what the task asks for."""

    def __init__(self):
        super().__init__()
        draw = torch.Generator().manual_seed(1)
        self.tall, self.wide = (nn.Linear(n, m, bias=False) for n, m in ((12, 48), (48, 12)))
        for layer in (self.tall, self.wide):
            m, n = layer.weight.shape
            with torch.no_grad():
                layer.weight.copy_(torch.randn(m, n, generator=draw) / n**0.5)
        for name in ("tall", "wide"):
            weight = getattr(self, name).weight.detach()
            m, n = weight.shape
            target = weight + torch.randn(m, 1, generator=draw) @ torch.randn(1, n, generator=draw) / 12
            self.register_buffer(f"{name}_target", target)

    def forward(self, x):
        errors = [self.tall(x[:, :12]) - x[:, :12] @ self.tall_target.mT, self.wide(x) - x @ self.wide_target.mT]
        return {"loss": sum(error.square().mean() for error in errors)}


def test_an_open_side_is_the_one_on_which_a_rotation_makes_more_of_the_change():
    base = TwoLinears()
    draw = torch.Generator().manual_seed(2)
    batches = [{"x": torch.randn(64, 48, generator=draw)} for _ in range(8)]
    names = ["tall", "wide"]
    reports = {
        side: calibrate(build(copy.deepcopy(base), target_modules=names, r=4, side=side), batches, pilot=Pilot(steps=8))
        for side in ("input", "output", "auto")
    }
    energies = {side: {name: s.energy for name, s in report.layers.items()} for side, report in reports.items()}
    # Outside W0's column space, or row space, a rotation of the smaller side makes nothing.
    assert {name: s.side for name, s in reports["auto"].layers.items()} == {"tall": "output", "wide": "input"}
    for name, side in (("tall", "output"), ("wide", "input")):
        other = "input" if side == "output" else "output"
        assert energies[side][name] > energies[other][name]
        assert reports["auto"].sides[name][side] == reports["auto"].layers[name].energy
        assert reports["auto"].sides[name][side] > reports["auto"].sides[name][other] > 0


def test_an_open_side_is_decided_once_and_kept(tmp_path):
    batches = token_batches(3)
    model = build(side="auto", seed=1)
    report = calibrate(model, batches, pilot=SHORT)
    sides = {name: layer.loft_side["default"] for name, layer in adapted_layers(model)[1].items()}
    assert (
        sides == {name: max(each, key=each.get) for name, each in report.sides.items()}
        and len(set(sides.values())) == 2
    )
    assert {name: s.side for name, s in report.layers.items()} == sides
    assert calibrate(build(side="auto", seed=1), batches, pilot=SHORT, memory=report.memory.total).sides == report.sides
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.05)
    wanted = model.eval()(**batches[0]).logits
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(make_llama(), tmp_path, is_trainable=True)
    assert torch.equal(loaded.eval()(**batches[0]).logits, wanted)
    again = refresh(loaded, batches, pilot=SHORT)
    assert {name: s.side for name, s in again.layers.items()} == sides and not again.sides
    torch.testing.assert_close(loaded.eval()(**batches[0]).logits, wanted, rtol=1e-4, atol=1e-5)
    partly = perceptron(target_modules=["a", "b", "unused"], side="auto")
    with pytest.warns(UserWarning, match="no calibration batch .* unused: a random support was put there"):
        report = calibrate(partly, [{"x": X}], pilot=SHORT)
    assert report.layers["unused"].side == "input" and report.layers["a"].method == "pilot"
