"""export.py: the exact LoRA form, loaded by stock PEFT where loft_rs cannot be imported."""

from __future__ import annotations

import json
import subprocess
import sys

import peft
import pytest
import torch
from reference import make_bert, make_llama, token_batches
from tuned import build, logits, train

import loft_rs
from loft_rs.layer.merging import rotated_weight

STOCK = """
import sys
class Blocked:
    def find_spec(self, name, *_):
        if name.split(".")[0] == "loft_rs":
            raise ImportError("loft_rs is not here")
sys.meta_path.insert(0, Blocked())
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), sys.argv[2]).eval()
with torch.no_grad():
    torch.save(model(torch.arange(10)[None]).logits, sys.argv[3])
"""


@pytest.mark.parametrize("side", ["input", "output"])
def test_stock_peft_gives_the_loft_output_without_loft(tmp_path, side):
    make_llama().save_pretrained(tmp_path / "base")
    model = train(build(side=side, transform="exp", rank_pattern={"down_proj": 6}, r=4))
    loft_rs.export_lora(model, tmp_path / "lora")
    command = [sys.executable, "-c", STOCK, *(str(tmp_path / p) for p in ("base", "lora", "out.pt"))]
    subprocess.run(command, check=True, timeout=300)
    with torch.no_grad():
        wanted = model.eval()(torch.arange(10)[None]).logits
    assert (torch.load(tmp_path / "out.pt") - wanted).abs().max() <= 1e-5
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 6 and config["peft_type"] == "LORA" and not config["rank_pattern"]
    assert config["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )


def test_factors_are_the_rotation(tmp_path):
    model = train(build())
    for name, (a, b) in loft_rs.lora_factors(model).items():
        layer = model.base_model.model.get_submodule(name)
        torch.testing.assert_close(
            layer.base_layer.weight + b @ a, rotated_weight(layer, layer.applied()), atol=1e-6, rtol=1e-5
        )


def test_names_that_do_not_single_out_the_layers_are_written_in_full(tmp_path):
    model = build(target_modules=r".*layers\.1\.self_attn\.q_proj")
    loft_rs.export_lora(model, tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.1.self_attn.q_proj"]
    loaded = peft.PeftModel.from_pretrained(make_llama(), str(tmp_path / "lora"))
    assert torch.equal(logits(loaded), logits(make_llama()))


def test_the_same_adapter_writes_the_same_bytes(tmp_path):
    model = train(build())
    for name in ("a", "b"):
        loft_rs.export_lora(model, tmp_path / name)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_merged_model_still_exports_the_rotation_of_the_original():
    model = train(build())
    wanted = loft_rs.lora_factors(model)
    model.merge_adapter()
    for name, (a, b) in loft_rs.lora_factors(model).items():
        assert torch.equal(a, wanted[name][0]) and torch.equal(b, wanted[name][1])


def test_modules_to_save_are_refused_unless_dropped(tmp_path):
    model = build(base=make_bert(), task_type="SEQ_CLS", target_modules=["query"])
    with pytest.raises(ValueError, match=r"modules_to_save=.*drop_modules_to_save=True"):
        loft_rs.export_lora(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
    loft_rs.export_lora(model, tmp_path / "lora", drop_modules_to_save=True)
    tokens = build(trainable_token_indices=[3, 1], target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"trainable_token_indices=\[1, 3\].*drop_modules_to_save=True"):
        loft_rs.export_lora(tokens, tmp_path / "tokens")
    assert not (tmp_path / "tokens").exists()
    loft_rs.export_lora(tokens, tmp_path / "tokens", drop_modules_to_save=True)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        loft_rs.export_lora(model, tmp_path / "no" / "folder", drop_modules_to_save=True)


def test_a_loft_adapter_is_never_overwritten_but_another_lora_is(tmp_path):
    model = build(target_modules=["q_proj"])
    model.save_pretrained(tmp_path / "loft")
    kept = {file.name: file.read_bytes() for file in (tmp_path / "loft").iterdir()}
    with pytest.raises(ValueError, match="holds a LOFT adapter, which the LoRA would overwrite; give another folder"):
        loft_rs.export_lora(model, tmp_path / "loft")
    assert {file.name: file.read_bytes() for file in (tmp_path / "loft").iterdir()} == kept
    for _ in range(2):
        loft_rs.export_lora(model, tmp_path / "lora")


def test_an_adapter_without_supports_is_not_exported(tmp_path):
    model = build(support="skewgrad")
    with pytest.raises(ValueError, match=r"export_lora needs supports.*layers\.0.*loft_rs\.calibrate"):
        loft_rs.export_lora(model, tmp_path / "lora")
    with pytest.raises(ValueError, match="lora_factors needs supports"):
        loft_rs.lora_factors(model)
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("dtype", ["float16", torch.int8])
def test_a_dtype_that_is_none_is_named(tmp_path, dtype):
    with pytest.raises(ValueError, match="dtype must be a floating-point torch.dtype"):
        loft_rs.export_lora(build(target_modules=["q_proj"]), tmp_path / "lora", dtype=dtype)


def test_a_high_rank_warns_of_the_servers_limit(tmp_path):
    with pytest.warns(UserWarning, match="rank 18; vLLM accepts at most --max-lora-rank"):
        loft_rs.export_lora(build(r=18, target_modules=["q_proj"]), tmp_path / "lora")


def test_orthogonality_error_is_that_of_the_rotation():
    model = train(build(), lr=0.5)
    assert 0 < loft_rs.orthogonality_error(model) < 1e-6
    assert loft_rs.orthogonality_error(train(build(transform="free"))) > 1e-4
    assert token_batches(1)
