"""Adapters in tests/golden, saved by the code before a pass had values of its own, still load,
compute, save and merge as they did.

base.safetensors: the base model and an input `x`; in each folder an adapter as `save_pretrained`
wrote it, and its output `y`.
"""

import json
import math
from pathlib import Path

import peft
import pytest
import torch
from exact import error, exact_twin, layers_of
from safetensors.torch import load_file
from torch import nn

import loft_rs
from loft_rs._format import FORMAT_VERSION, RETIRED_FIELDS, UNKNOWN_ENERGY
from loft_rs.inspection import inspect_adapter

GOLDEN = Path(__file__).parent / "golden"
NAMES = sorted(folder.name for folder in GOLDEN.iterdir() if folder.is_dir())
FULL_RANK = ["boft", "oft"]
# Two results of float32 arithmetic, a few products of 16 terms each. In bfloat16 each of some ten
# roundings in a row moves the output by up to 2^-9 of its size.
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 2e-2}
# Their configs are of version 1. What version 2 says otherwise, as (support, transform); its other
# fields are the same.
BLOCKS = {"name": "blocks", "factors": 1, "share": False, "output_scale": False}
MOVED = {
    "boft": (BLOCKS | {"factors": 2, "output_scale": True}, "cayley"),
    "halves": ({"name": "pilot", "steps": 32, "rank": None, "lr": 1e-3, "halves": True, "keep": False}, "cayley"),
    "hra": ({"name": "reflections", "gram_schmidt": False}, "cayley"),
    "magnitudes": ("principal", "cayley+magnitudes"),
    "oft": (BLOCKS, "cayley"),
    "psoft": ("principal", "cayley+magnitudes"),
}


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, w) for w in (16, 8, 8, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.o(self.q(x) * torch.cat([self.k(x), self.v(x)], -1))


def dtype_of(name: str) -> torch.dtype:
    return torch.bfloat16 if name.endswith("bf16") else torch.float32


def base(name: str) -> tuple[Attention, torch.Tensor]:
    """The base model in the adapter's dtype, and the input."""
    tensors = load_file(GOLDEN / "base.safetensors")
    x, model = tensors.pop("x"), Attention()
    model.load_state_dict(tensors)
    return model.to(dtype_of(name)), x.to(dtype_of(name))


def loaded(name: str, **options) -> tuple[peft.PeftModel, torch.Tensor]:
    model, x = base(name)
    return peft.PeftModel.from_pretrained(model, GOLDEN / name, **options), x


def file_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def assert_bits(got: dict[str, torch.Tensor], file: dict[str, torch.Tensor]) -> None:
    """The same keys, dtypes and bits, but for an unknown energy, which was NaN."""
    assert got.keys() == file.keys()
    for key, value in file.items():
        if ".loft_energy" in key:
            value = value.nan_to_num(UNKNOWN_ENERGY)
        assert got[key].dtype == value.dtype and torch.equal(got[key], value), key


def assert_output(got: torch.Tensor, name: str) -> None:
    y = load_file(GOLDEN / name / "output.safetensors")["y"]
    assert error(got, y.double()) <= TOLERANCE[dtype_of(name)]


def test_the_folders_are_all_there():
    assert len(NAMES) == 14 and {"cayley", "tied", "narrowed", "sides"} < set(NAMES)
    unknown = [name for name in NAMES if any(t.isnan().any() for t in file_of(GOLDEN / name).values())]
    assert unknown == ["free", "narrowed"]


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_it_loads_to_the_bit_and_computes_what_it_did(name, trainable):
    model, x = loaded(name, is_trainable=trainable)
    state = {key.replace(".default", ""): value for key, value in model.state_dict().items() if ".loft_" in key}
    assert_bits(state, file_of(GOLDEN / name))
    assert model.peft_config["default"].loft_format_version == 1
    for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        with mode():
            assert_output(model(x).detach(), name)
    assert error(model(x), exact_twin(model)(x.double())) <= TOLERANCE[dtype_of(name)]


@pytest.mark.parametrize("name", NAMES)
def test_saved_again_it_is_the_same_file_and_a_config_of_this_version(name, tmp_path):
    model, x = loaded(name)
    model.save_pretrained(tmp_path)
    assert_bits(file_of(tmp_path), file_of(GOLDEN / name))
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (tmp_path, GOLDEN / name)]
    old = configs[1].keys() & RETIRED_FIELDS.keys()
    assert old == RETIRED_FIELDS.keys() and not old & configs[0].keys()
    own = {
        key: value
        for key, value in configs[1].items()
        if key not in old and key not in ("auto_mapping", "base_model_name_or_path", "peft_version")
    }
    support, transform = MOVED.get(name, (own["support"], own["transform"]))
    own |= {"support": support, "transform": transform, "loft_format_version": FORMAT_VERSION}
    assert {key: configs[0][key] for key in own} == own
    again = peft.PeftModel.from_pretrained(base(name)[0], tmp_path)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    again.save_pretrained(tmp_path / "twice")
    texts = [(folder / "adapter_config.json").read_bytes() for folder in (tmp_path, tmp_path / "twice")]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("name", NAMES)
def test_it_is_inspected_before_and_after_it_is_saved_again(name, tmp_path):
    reports = inspect_adapter(GOLDEN / name)
    loaded(name)[0].save_pretrained(tmp_path)
    file = file_of(GOLDEN / name)
    for old, new in zip(reports, inspect_adapter(tmp_path), strict=True):
        held = file.get(f"{old.name}.loft_energy")
        assert math.isnan(old.energy) == (held is None or bool(held.isnan()))
        for field in ("name", "width", "rank", "transform", "side", "frozen_rank", "orthogonality_error"):
            assert getattr(old, field) == getattr(new, field)
        assert old.energy == new.energy or (math.isnan(old.energy) and math.isnan(new.energy))
        assert (old.angles == new.angles).all()


@pytest.mark.parametrize("name", NAMES)
def test_it_merges(name):
    model, x = loaded(name)
    held = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        model.merge_adapter()
        assert_output(model(x), name)
        model.unmerge_adapter()
        for key, value in model.state_dict().items():
            torch.testing.assert_close(value, held[key], atol=0, rtol=0)
        assert_output(model(x), name)
        assert_output(model.merge_and_unload()(x), name)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in FULL_RANK])
def test_its_lora_computes_the_same(name, tmp_path):
    model, x = loaded(name)
    loft_rs.export_lora(model, tmp_path)
    lora = peft.PeftModel.from_pretrained(base(name)[0], tmp_path)
    with torch.no_grad():
        assert_output(lora(x), name)


@pytest.mark.parametrize("name", FULL_RANK)
def test_of_full_rank_it_has_an_approximate_lora_alone(name, tmp_path):
    model, x = loaded(name)
    with pytest.raises(ValueError, match="full rank"):
        loft_rs.export_lora(model, tmp_path / "exact")
    with pytest.warns(UserWarning, match="approximate"):
        loft_rs.export_lora(model, tmp_path / "lora", approximate_rank=16)  # as wide as the layers, so nothing is lost
    with torch.no_grad():
        assert_output(peft.PeftModel.from_pretrained(base(name)[0], tmp_path / "lora")(x), name)


@pytest.mark.parametrize("name", NAMES)
def test_it_trains_on(name):
    model, x = loaded(name, is_trainable=True)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(2):
        optimiser.zero_grad()
        model(x).square().sum().backward()
        optimiser.step()
    assert all(adapter.theta.grad is not None for layer in layers_of(model) for adapter in layer.adapters.values())
    assert error(model(x), exact_twin(model)(x.double())) <= TOLERANCE[dtype_of(name)]
