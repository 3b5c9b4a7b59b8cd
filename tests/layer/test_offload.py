"""Parameters that are elsewhere when a pass begins: offloaded by accelerate to the CPU's memory or
a disk, or on the meta device.
"""

import peft
import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from exact import KINDS, LINEARS, SUPPORTED, Net, assert_exact, build, error, layers_of, trained
from reference import make_llama
from torch import nn

import loft_rs
from loft_rs import LoftConfig

# Rounded differently, as an offloaded base layer makes its product in a call of its own: the few
# float32 roundings of test_forward_pass.py on both sides; in bfloat16 2^-9 in each of some ten.
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 2e-2}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIGS = {kind: KINDS[kind] for kind in ("cayley", "output", "oft", "boft", "hra")}
CONFIGS["tied"] = lambda **o: LoftConfig(tied=True, **SUPPORTED | o)
MODEL = "base_model.model.model"
CPU = torch.device("cpu")


def llama(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = peft.get_peft_model(make_llama(dtype), CONFIGS[kind](target_modules=TARGETS, init_weights=False))
    for layer in layers_of(model):
        for adapter in layer.adapters.values():
            if adapter.scale is not None:
                nn.init.normal_(adapter.scale, std=0.1)
    return model.eval()


def logits(model: nn.Module, mode=torch.no_grad) -> torch.Tensor:
    with mode():
        return model(input_ids=torch.arange(20).view(2, 10)).logits


def to_cpu(model, folder, buffers):
    cpu_offload(model, CPU, offload_buffers=buffers)


def to_disk(model, folder, buffers):
    disk_offload(model, folder, CPU, offload_buffers=buffers)


def dispatched(model, folder, buffers):
    parts = {f"{MODEL}.{name}": "cpu" for name in ("embed_tokens", "norm", "rotary_emb", "layers.0")}
    parts |= {f"{MODEL}.layers.1": "disk", "base_model.model.lm_head": "cpu"}
    dispatch_model(model, parts, main_device="cpu", offload_dir=folder, offload_buffers=buffers, force_hooks=True)


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("offload", [to_cpu, to_disk, dispatched])
@pytest.mark.parametrize("kind", CONFIGS)
def test_an_offloaded_model_computes_what_it_did_before(kind, offload, buffers, tmp_path):
    model = llama(kind)
    wanted, held = logits(model), {key: value.clone() for key, value in model.state_dict().items()}
    offload(model, tmp_path, buffers)
    there = [p.is_meta for p in trained(model)]
    assert any(there) and all(there) == (offload is not dispatched)
    for mode in (torch.no_grad, torch.no_grad, torch.inference_mode):
        assert error(logits(model, mode), wanted.double()) <= TOLERANCE[torch.float32]
        assert [p.is_meta for p in trained(model)] == there
    remove_hook_from_submodules(model)
    for key, value in model.state_dict().items():
        assert torch.equal(value, held[key]), key
    assert error(logits(model), wanted.double()) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("what", ["bfloat16", "narrowed"])
@pytest.mark.parametrize("offload", [to_cpu, to_disk])
def test_an_offloaded_model_with_a_rounded_support_or_a_frozen_factor(offload, what, tmp_path):
    model = llama("cayley", torch.bfloat16 if what == "bfloat16" else torch.float32)
    if what == "narrowed":
        loft_rs.narrow(model, 2)
    wanted = logits(model)
    offload(model, tmp_path, True)
    for _ in range(2):
        assert error(logits(model), wanted.double()) <= TOLERANCE[wanted.dtype]


def test_an_offloaded_model_generates():
    model = llama("cayley")
    ids = torch.arange(5)[None]
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "output_logits": True}

    def generated() -> torch.Tensor:
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "return_dict_in_generate": True}
        return torch.stack(model.generate(**given, **options).logits)

    wanted = generated()
    cpu_offload(model, CPU, offload_buffers=True)
    assert error(generated(), wanted.double()) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_model_that_a_hook_moves(kind):
    model = llama(kind)
    wanted = logits(model)
    model, hook = cpu_offload_with_hook(model, "cpu")
    for _ in range(2):
        assert error(logits(model), wanted.double()) <= TOLERANCE[torch.float32]
        hook.offload()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "psoft"])  # whose support is the base's
def test_a_model_made_on_the_meta_device_and_loaded_by_assignment(kind):
    source, x = build(kind), torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    options = {} if kind in ("oft", "boft", "hra") else {"support": "gradsvd"}  # one that nothing chooses yet
    with torch.device("meta"):
        model = peft.get_peft_model(Net(), KINDS[kind](target_modules=LINEARS, **options))
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    model.load_state_dict({key: value.clone() for key, value in source.state_dict().items()}, assign=True)
    with torch.no_grad():
        assert torch.equal(model(x), source(x))
    assert_exact(model, x, TOLERANCE[torch.float32] / 2)


def test_an_adapter_loaded_with_little_memory(tmp_path):
    source = llama("tied")
    source.save_pretrained(tmp_path)
    model = peft.PeftModel.from_pretrained(make_llama(), tmp_path, low_cpu_mem_usage=True).eval()
    assert torch.equal(logits(model), logits(source))
