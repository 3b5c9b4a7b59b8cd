"""tuner/: LOFT as a PEFT method - building, saving, several adapters, merging, resuming, refusing
what does not fit.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from reference import basis_of, make_bert, make_llama, token_batches
from safetensors.torch import load_file, save_file
from tuned import QUIET, build, logits, train

import loft_rs
from loft_rs import LoftConfig
from loft_rs.inspection import inspect_adapter
from loft_rs.tuner import Linear
from loft_rs.tuner.adapters import adapted_layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("support", ["principal", "random", "coordinate", "skewgrad"])
def test_step_zero_is_the_base_model_bit_for_bit(dtype, side, support):
    base = make_llama(dtype)
    before = logits(base)
    model = build(base=base, side=side, support=support)
    assert torch.equal(logits(model), before)
    layer = next(m for m in model.modules() if isinstance(m, Linear))
    assert layer.loft_theta["default"].dtype == torch.float32 and layer.loft_support["default"].dtype == dtype


def test_only_the_transforms_train_and_they_are_counted():
    model = build(r=6)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 14 and all(n.endswith("loft_theta.default") for n in trained)
    assert model.get_nb_trainable_parameters()[0] == 14 * 15
    assert build(r=6, transform="free").get_nb_trainable_parameters()[0] == 14 * 36


@pytest.mark.parametrize("transform", ["cayley", "exp", "free"])
@pytest.mark.parametrize("side", ["input", "output"])
def test_save_and_load_are_exact(tmp_path, transform, side):
    model = train(build(transform=transform, side=side))
    assert not torch.equal(logits(model), logits(make_llama()))
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(make_llama(), str(tmp_path))
    assert torch.equal(logits(loaded), logits(model))
    assert not any(p.requires_grad for p in loaded.parameters())
    lean = peft.PeftModel.from_pretrained(make_llama(), str(tmp_path), low_cpu_mem_usage=True)
    assert torch.equal(logits(lean), logits(model))


def test_saving_twice_gives_the_same_bytes(tmp_path):
    model = build(target_modules=["q_proj", "v_proj", "down_proj", "gate_proj"], exclude_modules=["lm_head"])
    model.save_pretrained(tmp_path / "a")
    peft.PeftModel.from_pretrained(make_llama(), str(tmp_path / "a")).save_pretrained(tmp_path / "b")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (
        config["target_modules"] == ["down_proj", "gate_proj", "q_proj", "v_proj"]
        and config["loft_format_version"] == 2
    )


def test_loading_never_selects_a_support_again(tmp_path, monkeypatch):
    train(build()).save_pretrained(tmp_path)
    monkeypatch.setattr("loft_rs.tuner.supports.select_support", None)
    peft.PeftModel.from_pretrained(make_llama(), str(tmp_path))


def test_auto_model_knows_loft(tmp_path):
    base = make_llama()
    base.save_pretrained(tmp_path / "base")
    from transformers import AutoModelForCausalLM

    model = train(build(base=AutoModelForCausalLM.from_pretrained(tmp_path / "base"), task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "adapter")
    code = (
        "import loft_rs, sys, torch; assert 'peft' not in sys.modules\n"
        "from peft import AutoPeftModelForCausalLM\n"
        f"m = AutoPeftModelForCausalLM.from_pretrained({str(tmp_path / 'adapter')!r})\n"
        "torch.save(m(torch.arange(8)[None]).logits, sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "out.pt")], check=True, timeout=300)
    with torch.no_grad():
        wanted = model(torch.arange(8)[None]).logits
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), wanted, atol=1e-6, rtol=1e-6)


def test_several_adapters_switch_disable_and_delete():
    model = build()
    base = logits(model)
    train(model)
    first = logits(model)
    model.add_adapter(
        "second", LoftConfig(**QUIET | {"r": 6, "transform": "exp", "side": "output", "target_modules": ["q_proj"]})
    )
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    assert torch.equal(logits(model), base)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all("second" in n for n in trained)
    second = logits(train(model))
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.delete_adapter("second")
    assert torch.equal(logits(model), first)
    assert not any("second" in key for key in model.state_dict())
    assert not torch.equal(first, second)


def test_two_active_adapters_act_as_merged_one_after_the_other():
    model = train(build())
    model.add_adapter("second", LoftConfig(**QUIET | {"r": 6, "side": "output"}))
    model.set_adapter("second")
    train(model)
    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    model.base_model.merge_adapter(["default", "second"])
    torch.testing.assert_close(logits(model), both, atol=1e-5, rtol=1e-5)
    model.base_model.unmerge_adapter()
    torch.testing.assert_close(logits(model), both, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_and_unmerge_restore_every_bit(dtype):
    model = train(build(base=make_llama(dtype)))
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if "base_layer" in n}
    for _ in range(20):
        model.merge_adapter()
        model.unmerge_adapter()
    for name, parameter in model.named_parameters():
        if name in weights:
            assert torch.equal(parameter, weights[name])


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
def test_a_refused_merge_changes_nothing(call):
    model = train(build())
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    theta = adapted_layers(model)[1]["model.layers.1.mlp.down_proj"].loft_theta["default"]
    with torch.no_grad():
        theta[0] = float("nan")
    with pytest.raises(ValueError, match="would write NaN or Inf into the base weight; nothing was changed"):
        getattr(model, call)(safe_merge=True)
    for name, parameter in model.named_parameters():
        assert parameter is theta or torch.equal(parameter, weights[name])
    with pytest.raises(ValueError, match=r"merging needs supports, but adapter 'default' has none yet in .*calibrate"):
        getattr(build(support="gradsvd"), call)()


def test_merge_and_unload_is_a_plain_model():
    model = train(build())
    wanted = logits(model)
    merged = model.merge_and_unload(safe_merge=True)
    assert not any(isinstance(m, Linear) for m in merged.modules())
    torch.testing.assert_close(logits(merged), wanted, atol=1e-5, rtol=1e-5)


def test_rank_pattern_layers_to_transform_and_regex():
    model = build(rank_pattern={"q_proj": 8, r".*\.down_proj": 2}, r=4)
    ranks = {
        name.rpartition(".")[2]: layer.adapters["default"].rank for name, layer in adapted_layers(model)[1].items()
    }
    assert (ranks["q_proj"], ranks["down_proj"], ranks["k_proj"]) == (8, 2, 4)
    one = build(target_modules=["q_proj", "v_proj"], layers_to_transform=[1])
    assert sorted(adapted_layers(one)[1]) == ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]
    regex = build(target_modules=r".*\.(gate|up)_proj")
    assert {name.rpartition(".")[2] for name in adapted_layers(regex)[1]} == {"gate_proj", "up_proj"}


def test_a_rank_that_does_not_fit_is_lowered_in_one_warning():
    with pytest.warns(UserWarning, match=r"r was lowered .*k_proj \(24 -> 16\).*v_proj \(24 -> 16\)") as caught:
        model = build(r=24, target_modules=["q_proj", "k_proj", "v_proj"])
    assert len([w for w in caught if "lowered" in str(w.message)]) == 1
    assert {layer.adapters["default"].rank for layer in adapted_layers(model)[1].values()} == {16, 24}


def test_modules_to_save_train_and_are_saved(tmp_path):
    model = build(base=make_bert(), task_type="SEQ_CLS", target_modules=["query", "value"])
    train(model, classes=True)
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert any("classifier" in key for key in keys)
    loaded = peft.PeftModel.from_pretrained(make_bert(), str(tmp_path))
    assert torch.equal(logits(loaded, classes=True), logits(model, classes=True))


@pytest.mark.parametrize("support", ["principal", "skewgrad"])
def test_transformers_own_adapter_calls_work(tmp_path, support):
    from transformers.integrations.peft import MIN_PEFT_VERSION
    from transformers.utils.peft_utils import check_peft_version

    try:
        check_peft_version(MIN_PEFT_VERSION)
    except ValueError:
        pytest.skip(f"this transformers wants peft {MIN_PEFT_VERSION} for its own adapter calls")
    base = make_llama()
    base.add_adapter(LoftConfig(**QUIET | {"support": support}), adapter_name="mine")
    loft_rs.calibrate(base, token_batches(2))  # P is not what would be chosen without data
    train(base)
    wanted = logits(base)
    base.save_pretrained(tmp_path)
    fresh = make_llama()
    fresh.load_adapter(str(tmp_path), adapter_name="mine", is_trainable=True)
    train(fresh, steps=1, lr=0.0)
    assert torch.equal(logits(fresh), wanted)


def test_trainer_resumes_to_the_same_weights(tmp_path):
    from transformers import Trainer, TrainingArguments

    def run(output, **options):
        torch.manual_seed(0)
        model = build()
        arguments = TrainingArguments(
            output_dir=str(output),
            per_device_train_batch_size=2,
            learning_rate=0.02,
            report_to=[],
            save_strategy="steps",
            save_steps=3,
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            **options,
        )
        data = [{"input_ids": b["input_ids"][0], "labels": b["labels"][0]} for b in token_batches(16)]
        return model, Trainer(model, arguments, train_dataset=data)

    straight, trainer = run(tmp_path / "a", max_steps=6)
    trainer.train()
    resumed, trainer = run(tmp_path / "b", max_steps=6)
    trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    for (name, a), (_, b) in zip(straight.named_parameters(), resumed.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5, msg=name)


def test_gradient_checkpointing_trains_alike():
    plain, checked = build(), build()
    checked.enable_input_require_grads()
    checked.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    for model in (plain, checked):
        model.train()
        model(**token_batches(1)[0]).loss.backward()
    for (name, a), (_, b) in zip(plain.named_parameters(), checked.named_parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, atol=1e-7, rtol=1e-5, msg=name)


def test_deepcopy_trains_apart():
    model = build()
    twin = copy.deepcopy(model)
    before = logits(model)
    train(twin)
    assert torch.equal(logits(model), before) and not torch.equal(logits(twin), before)


def test_set_support_takes_names_and_suffixes_and_refuses_the_rest():
    model = build(target_modules=["q_proj"], layers_to_transform=[0, 1], support="gradsvd")
    first, second = basis_of(32, 4, 1), basis_of(32, 4, 2)
    loft_rs.set_support(model, {"model.layers.0.self_attn.q_proj": first, "layers.1.self_attn.q_proj": second})
    _, layers = adapted_layers(model)
    held = layers["model.layers.1.self_attn.q_proj"].loft_support["default"].numpy()
    np.testing.assert_allclose(held, second * np.sign((held * second).sum(0)), atol=1e-6)
    with pytest.raises(ValueError, match="layers.1.self_attn.q_proj: no support"):
        loft_rs.set_support(model, {"model.layers.0.self_attn.q_proj": first})
    with pytest.raises(ValueError, match=r"expected \(32, 4\), got \(32, 6\)"):
        loft_rs.set_support(model, {"layers.0.self_attn.q_proj": first, "layers.1.self_attn.q_proj": basis_of(32, 6)})
    output = loft_rs.select_support(basis_of(32, 32), 4, side="output")
    with pytest.raises(
        ValueError, match=r"layers\.1\.\S+: expected one for the input side, got one for the output side"
    ):
        loft_rs.set_support(model, {"layers.0.self_attn.q_proj": first, "layers.1.self_attn.q_proj": output})
    with pytest.raises(ValueError, match="lm_head: no such adapted module"):
        loft_rs.set_support(
            model, {"layers.0.self_attn.q_proj": first, "layers.1.self_attn.q_proj": second, "lm_head": first}
        )
    train(model)
    with pytest.raises(ValueError, match="set_support needs an untrained adapter"):
        loft_rs.set_support(model, {"layers.0.self_attn.q_proj": first, "layers.1.self_attn.q_proj": second})


def test_supports_from_a_file_set_ranks_and_bases(tmp_path):
    base = make_llama()
    weights = {n: m.weight for n, m in base.named_modules() if n.endswith("q_proj")}
    ranks = dict(zip(weights, (4, 6), strict=True))
    supports = loft_rs.select_support(None, ranks, weights=weights, method="principal")
    loft_rs.save_supports(tmp_path / "s.safetensors", supports)
    model = build(base=base, support=str(tmp_path / "s.safetensors"), target_modules=["q_proj"], r=4)
    _, layers = adapted_layers(model)
    for name, layer in layers.items():
        np.testing.assert_array_equal(layer.loft_support["default"].numpy(), supports[name].basis)
    train(model).save_pretrained(tmp_path / "adapter")
    (tmp_path / "s.safetensors").unlink()
    loaded = peft.PeftModel.from_pretrained(make_llama(), str(tmp_path / "adapter"))
    assert torch.equal(logits(loaded), logits(model))
    never_loaded = build(LoftConfig.from_pretrained(str(tmp_path / "adapter")))
    with pytest.raises(RuntimeError, match="was built from a saved config and never loaded"):
        logits(never_loaded)
    with pytest.raises(ValueError, match="no support"):
        loft_rs.save_supports(tmp_path / "s.safetensors", supports)
        build(support=tmp_path / "s.safetensors", target_modules=["q_proj", "v_proj"])
    loft_rs.save_supports(tmp_path / "one.safetensors", next(iter(supports.values())))
    with pytest.raises(ValueError, match="holds one support without a module name"):
        build(support=tmp_path / "one.safetensors", target_modules=["q_proj"])


def test_an_uncalibrated_support_refuses_to_train_but_runs():
    model = build(support="skewgrad")
    logits(model)
    model.train()
    with pytest.raises(RuntimeError, match=r"has no support yet.*loft_rs\.calibrate\(model, dataloader\)"):
        model(**token_batches(1)[0])


def test_whether_it_was_calibrated_survives_saving(tmp_path):
    model = build(support="skewgrad")
    with pytest.warns(
        UserWarning, match=r"without a support in model\.layers\.0\.mlp\.down_proj, .* and 11 more: call"
    ):
        model.save_pretrained(tmp_path / "before")
    loaded = peft.PeftModel.from_pretrained(make_llama(), str(tmp_path / "before"), is_trainable=True).train()
    with pytest.raises(RuntimeError, match="has no support yet"):
        loaded(**token_batches(1)[0])
    loft_rs.calibrate(model, token_batches(2))
    model.save_pretrained(tmp_path / "after")
    loaded = peft.PeftModel.from_pretrained(make_llama(), str(tmp_path / "after"), is_trainable=True).train()
    loaded(**token_batches(1)[0]).loss.backward()


def supports_of(model):
    return {name: layer.loft_support["default"].clone() for name, layer in adapted_layers(model)[1].items()}


@pytest.mark.parametrize("use", ["train", "calibrate", "merge", "export"])
@pytest.mark.parametrize("support", ["principal", "random"])
def test_a_saved_config_alone_builds_a_new_adapter(tmp_path, support, use):
    fresh = build(support=support)
    fresh.save_pretrained(tmp_path)
    config = peft.PeftConfig.from_pretrained(str(tmp_path))
    config.inference_mode = False  # PEFT saves it as True
    model = build(config)
    if use == "train":
        train(model, lr=0.0)
    elif use == "calibrate":
        for each in (fresh, model):
            loft_rs.calibrate(each, token_batches(2))
    elif use == "export":
        loft_rs.export_lora(model, tmp_path / "lora")
    else:
        model.merge_adapter()
    wanted = supports_of(fresh)
    for name, basis in supports_of(model).items():
        assert torch.equal(basis, wanted[name])


def test_a_copied_config_chooses_its_supports_when_the_model_is_built():
    config = LoftConfig(**QUIET)
    build(config)
    fields = {k: v for k, v in config.to_dict().items() if k != "peft_type"}
    for copied in (dataclasses.replace(config, seed=1), LoftConfig(**fields), copy.deepcopy(config)):
        layers = adapted_layers(build(copied))[1].values()
        assert all(layer.loft_support["default"].any() for layer in layers)


@pytest.mark.parametrize("tensors", [{}, {"a": torch.zeros(1)}])
def test_a_file_without_the_adapter_is_refused(tmp_path, tensors):
    build().save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="does not fit this model: it holds no tensor of adapter 'default'"):
        peft.PeftModel.from_pretrained(make_llama(), str(tmp_path))
    model = build()
    model.load_state_dict(make_llama().state_dict(), strict=False)  # an adapter that waits for nothing is left alone


def test_a_half_precision_adapter_is_orthogonal_in_full_precision_too(tmp_path):
    model = train(build(base=make_llama(torch.bfloat16)), lr=0.5)
    model.save_pretrained(tmp_path / "half")
    loaded = peft.PeftModel.from_pretrained(make_llama(), str(tmp_path / "half"))
    model.float().save_pretrained(tmp_path / "full")
    again = peft.PeftModel.from_pretrained(make_llama(), str(tmp_path / "full"))
    for each in (model, loaded, again):
        # E and C are float32, as in tests of the layer.
        assert loft_rs.orthogonality_error(each) <= 8 * torch.finfo(torch.float32).eps * 2
    for name in ("half", "full"):
        reports = inspect_adapter(tmp_path / name)
        assert max(report.orthogonality_error for report in reports) <= 8 * torch.finfo(torch.float32).eps * 2


def tampered(tmp_path, change):
    train(build(target_modules=["q_proj"])).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(k for k in tensors if k.endswith("layers.0.self_attn.q_proj.loft_support"))
    change(tensors, key)
    save_file(tensors, file)
    return lambda: peft.PeftModel.from_pretrained(make_llama(), str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, k: t.pop(k), "loft_support.default is missing"),
        (lambda t, k: t.update({k: t[k][:, :2].contiguous()}), r"loft_theta.default has shape \(6,\), expected \(1,\)"),
        (lambda t, k: t.update({k: t[k][:30].contiguous()}), r"has shape \(30, 4\), expected \(32, 4\)"),
        (lambda t, k: t.update({k: t[k] * float("nan")}), "holds NaN or Inf"),
        (lambda t, k: t.update({k: t[k] * 1.01}), r"is not orthonormal: \|\|P\^T P - I\|\|_2"),
        (lambda t, k: t.update({k.replace("q_proj", "k_proj"): t[k].clone()}), "belongs to no adapted module"),
    ],
)
def test_a_hostile_adapter_is_refused(tmp_path, change, message):
    load = tampered(tmp_path, change)
    with pytest.raises(ValueError, match=message), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load()


def test_a_truncated_adapter_and_a_newer_format_are_refused(tmp_path):
    build(target_modules=["q_proj"]).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Exception, match="(?i)incomplete|invalid|too small"):
        peft.PeftModel.from_pretrained(make_llama(), str(tmp_path))
    file.write_bytes(whole)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"loft_format_version": 99}))
    with pytest.raises(ValueError, match="loft_format_version is 99, but this loft_rs reads version 2;"):
        peft.PeftModel.from_pretrained(make_llama(), str(tmp_path))


def test_a_refused_load_leaves_a_loaded_model_as_it_was(tmp_path):
    load = tampered(tmp_path, lambda t, k: t.update({k: t[k] * float("nan")}))
    with pytest.raises(ValueError, match="holds NaN"):
        load()
    model = train(build(target_modules=["q_proj"]))
    before = logits(model)
    state = {
        f"base_model.model.{k}" if not k.startswith("base_model") else k: v
        for k, v in load_file(tmp_path / "adapter_model.safetensors").items()
    }
    with pytest.raises(ValueError, match="does not fit this model"):
        peft.set_peft_model_state_dict(model, state)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    "options",
    [{}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [1, 2]}, {"exclude_modules": ["q_proj"]}],
)
def test_a_failed_build_leaves_the_model_as_it_was(options):
    base = make_llama()
    names = [(n, type(m)) for n, m in base.named_modules()]
    with torch.no_grad():
        base.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.down_proj"):
        build(base=base, **options)
    assert [(n, type(m)) for n, m in base.named_modules()] == names
    assert all(p.requires_grad for p in base.parameters())
    first = build(base=make_llama(), target_modules=["q_proj"], modules_to_save=["lm_head"])
    with torch.no_grad():
        first.base_model.model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    state = [(n, p.requires_grad) for n, p in first.named_parameters()]
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.down_proj"):
        first.add_adapter(
            "other", LoftConfig(target_modules=["down_proj"], r=4, **{"modules_to_save": ["lm_head"]} | options)
        )
    assert [(n, p.requires_grad) for n, p in first.named_parameters()] == state
    model = build(base=make_llama())
    before = logits(model)
    with pytest.raises(ValueError, match="nowhere"):
        model.add_adapter("other", LoftConfig(target_modules=["nowhere"]))
    assert torch.equal(logits(model), before)


def test_a_meta_model_is_refused_by_name():
    with torch.device("meta"):
        base = make_llama()
    with pytest.raises(ValueError, match="on the meta device"):
        build(base=base)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r must be a positive, even integer, got 0"),
        ({"r": 4.0}, "r must be a positive, even integer, got 4.0"),
        ({"rank_pattern": {"q_proj": -2}}, r"rank_pattern\['q_proj'\] must be a positive"),
        ({"transform": "cayly"}, "transform must be one of"),
        ({"side": "left"}, "side must be one of"),
        ({"order": "pca"}, "order must be one of"),
        ({"r": 1}, "r must be at least 2: a cayley transform of rank 1 has nothing to train"),
        ({"support": "gradient"}, r"support must be one of .* or the path of a \.safetensors file"),
        ({"support": None}, r"support must be one of .* or the path of a \.safetensors file.*got None"),
        ({"seed": -1}, "seed must be an integer >= 0"),
        ({"layers_pattern": "layers"}, "layers_pattern needs layers_to_transform"),
        (
            {"layers_to_transform": [1], "target_modules": "all-linear"},
            "layers_to_transform needs target_modules to be a list",
        ),
    ],
)
def test_bad_configs_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        LoftConfig(**options)


def test_no_rank_pattern_and_paths_are_plain_values():
    config = LoftConfig(rank_pattern=None, support=Path("s.safetensors"))
    assert config.rank_pattern == {} and config.support == "s.safetensors"
    assert LoftConfig(r=1, transform="free").r == 1


def test_an_odd_rank_warns():
    with pytest.warns(UserWarning, match="r = 5 is odd: a skew transform gains nothing over rank 4"):
        LoftConfig(r=5)


def test_mixed_batches_are_refused_rather_than_ignored():
    model = build()
    with pytest.raises(ValueError, match="adapter_names .* is not supported by LOFT yet"):
        model(**token_batches(1)[0], adapter_names=["default"] * 4)


def test_import_is_light_and_registers_with_a_later_peft():
    code = (
        "import sys, loft_rs\n"
        "assert not {'torch', 'peft', 'transformers', 'numpy'} & set(sys.modules), 'heavy import'\n"
        "import peft\n"
        "from peft import PeftType\n"
        "from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as m\n"
        "assert m[PeftType.LOFT] is loft_rs.LoftConfig and PeftType('LOFT') is PeftType.LOFT and 'LOFT' in list(PeftType)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
    for first in (
        "import peft, loft_rs",
        "import loft_rs, importlib.util; assert importlib.util.find_spec('peft'); import peft",
        "import loft_rs; from transformers import Trainer; import peft",
        "from loft_rs import LoftConfig",
        "import loft_rs.tuner",
        "from loft_rs.tuner.layer import Linear",
    ):
        code = (
            f"{first}\nfrom peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as m\nassert 'LOFT' in [k.value for k in m]"
        )
        subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
