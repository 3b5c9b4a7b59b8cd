"""What a refreshed adapter is saved, loaded, merged, exported and inspected as."""

from __future__ import annotations

import numpy as np
import peft
import pytest
import torch
from reference import logits, make_llama, train
from refreshed import EPS, apart, build, refreshed
from safetensors.torch import load_file, save_file

import loft_rs
from loft_rs import LoftConfig, refresh
from loft_rs.inspection import inspect_adapter, text_table
from loft_rs.layer.merging import factor_of
from loft_rs.tuner.adapters import adapted_layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", ["input", "output"])
def test_save_and_load_are_exact(tmp_path, side, dtype):
    model = refreshed(make_llama(dtype), side=side)
    model.save_pretrained(tmp_path / "a")
    for options in ({}, {"low_cpu_mem_usage": True}):
        loaded = peft.PeftModel.from_pretrained(make_llama(dtype), str(tmp_path / "a"), **options)
        assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "b")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_state_brings_its_own_size(tmp_path):
    model, plain = refreshed(), build()
    train(plain)
    model.save_pretrained(tmp_path / "refreshed")
    plain.save_pretrained(tmp_path / "plain")
    wanted = logits(model), logits(plain)
    model.load_adapter(str(tmp_path / "plain"), "default")
    plain.load_adapter(str(tmp_path / "refreshed"), "default")
    assert torch.equal(logits(plain), wanted[0]) and torch.equal(logits(model), wanted[1])
    assert plain.peft_config["default"].frozen_ranks and not model.peft_config["default"].frozen_ranks
    twin = build()
    twin.load_state_dict(plain.state_dict())
    assert torch.equal(logits(twin), wanted[0])


def test_a_loader_that_fills_tensors_one_by_one_finds_room(tmp_path):
    model = refreshed()
    model.save_pretrained(tmp_path)
    fresh = peft.get_peft_model(make_llama(), LoftConfig.from_pretrained(str(tmp_path)))
    state = fresh.state_dict()
    with torch.no_grad():
        for key, value in load_file(tmp_path / "adapter_model.safetensors").items():
            state[f"{key}.default"].copy_(value)
    assert torch.equal(logits(fresh), logits(model))


def test_transformers_own_loader_fills_it(tmp_path):
    from transformers.integrations.peft import MIN_PEFT_VERSION
    from transformers.utils.peft_utils import check_peft_version

    try:
        check_peft_version(MIN_PEFT_VERSION)
    except ValueError:
        pytest.skip(f"this transformers wants peft {MIN_PEFT_VERSION} for its own adapter calls")
    base = make_llama()
    base.add_adapter(LoftConfig(target_modules="all-linear", r=4, support="random"), adapter_name="mine")
    train(base)
    refresh(base)
    train(base)
    base.save_pretrained(tmp_path)
    fresh = make_llama()
    fresh.load_adapter(str(tmp_path), adapter_name="mine")
    assert torch.equal(logits(fresh), logits(base))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, k: t.pop(k), "loft_frozen_basis.default is missing"),
        (lambda t, k: t.update({k: t[k] * 1.1}), r"loft_frozen_basis.default is not orthonormal"),
        (lambda t, k: t.update({k: t[k][:30].contiguous()}), r"has shape \(30, \d+\), expected \(32, 1 to 32\)"),
        (lambda t, k: t.update({k: t[k] * float("nan")}), "holds NaN or Inf"),
        (lambda t, k: t.update({k: t[k][:, :2].contiguous()}), r"loft_frozen_delta.default has shape"),
    ],
)
def test_a_hostile_frozen_factor_is_refused(tmp_path, change, message):
    refreshed(target_modules=["q_proj"]).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors, next(k for k in tensors if k.endswith("layers.0.self_attn.q_proj.loft_frozen_basis")))
    save_file(tensors, file)
    with pytest.raises(ValueError, match=message):
        peft.PeftModel.from_pretrained(make_llama(), str(tmp_path))


@pytest.mark.parametrize("side", ["input", "output"])
def test_merge_unmerge_and_lora(tmp_path, side):
    model = refreshed(side=side)
    wanted = logits(model)
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if "base_layer" in n}
    for _ in range(5):
        model.merge_adapter()
        assert apart(logits(model), wanted) <= 1e-5
        model.unmerge_adapter()
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters() if n in weights)
    factors = loft_rs.lora_factors(model)
    assert {a.shape[0] for a, _ in factors.values()} == {12}  # two refreshes of rank 4 and the present support
    errors = loft_rs.export_lora(model, tmp_path)
    assert not any(errors.values())
    lora = peft.PeftModel.from_pretrained(make_llama(), str(tmp_path))
    assert apart(logits(lora), wanted) <= 1e-5
    assert apart(logits(model.merge_and_unload()), wanted) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", ["input", "output"])
def test_inspection_sees_the_product(tmp_path, side, dtype):
    model = refreshed(make_llama(dtype), side=side, r=4)
    model.save_pretrained(tmp_path)
    reports = inspect_adapter(tmp_path)
    _, layers = adapted_layers(model)
    assert len(reports) == len(layers)
    for report, layer in zip(sorted(reports, key=lambda r: r.name), [layers[n] for n in sorted(layers)], strict=True):
        factor = factor_of(layer.adapters["default"]).reduced(1e-7)
        k = torch.eye(factor.rank, dtype=torch.float64) + factor.delta
        angles = np.degrees(np.angle(torch.linalg.eigvals(k).numpy()))
        angles = np.sort(angles[angles > 0.01])[::-1]
        np.testing.assert_allclose(report.angles[: len(angles)], angles, atol=0.01)
        assert (report.rank, report.frozen_rank) == (4, layer.adapters["default"].frozen_rank)
        assert (
            report.orthogonality_error <= 20 * EPS
            and abs(report.orthogonality_error - factor.orthogonality_error()) < 1e-5
        )
    assert "4 + 8" in text_table(reports)


def test_a_refreshed_adapter_is_no_psoft(tmp_path):
    refreshed(support="principal", order="natural").save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match="frozen"):
        loft_rs.convert_adapter(tmp_path / "a", tmp_path / "b", base_model=make_llama())
