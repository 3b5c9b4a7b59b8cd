"""convert/: what is no rotation, damaged or unknown is refused by name, and nothing is written."""

from __future__ import annotations

import peft
import pytest
import torch
from convert_cases import (
    CONFIG,
    SHARED,
    WEIGHTS,
    Net,
    edit,
    extension,  # noqa: F401
    trained,
)
from peft import BOFTConfig, HRAConfig, LoraConfig, OFTConfig, PsoftConfig
from torch import nn

from loft_rs.convert import convert_adapter

pytestmark = pytest.mark.usefixtures("extension")


UP = "base_model.model.up."
REFUSED = {
    "no rotation": (
        "psoft",
        {"ab_svd_init": "pissa_init"},
        {},
        "ab_svd_init='pissa_init' makes the update a similarity",
    ),
    "zero alpha": ("psoft", {"psoft_alpha": 0}, {}, "psoft_alpha=0 divides by zero"),
    "other rank": ("psoft", {"r": 6}, {}, r"module 'mid' has tensors of shapes \(28,\).* at r=6"),
    "missing vector": ("psoft", {}, {f"{UP}psoft_R.vector_a": None}, "module 'up' lacks psoft_R.vector_a"),
    "extra vector": ("psoft", {"psoft_mag_a": False}, {}, "has the unknown tensor psoft_R.vector_a"),
    "two terms": ("oft", {"num_cayley_neumann_terms": 2}, {}, r"num_cayley_neumann_terms=2 leaves I \+ 2Q"),
    "one term": ("oft", {"num_cayley_neumann_terms": 1}, {}, "num_cayley_neumann_terms=1 leaves I, "),
    "odd shape": (
        "oft",
        {},
        {f"{UP}oft_R.weight": torch.zeros(8, 29)},
        r"oft_R.weight of the unexpected shape \(8, 29\)",
    ),
    "more than shared": ("oft", {"block_share": True}, {}, r"unexpected shape \(\d+, 28\)"),
    "an embedding": ("oft", {}, {f"{UP}oft_embedding_R.weight": torch.zeros(2, 28)}, "module 'up' is an embedding"),
    "lora": ("oft", {"peft_type": "LORA"}, {}, "peft_type is 'LORA'; one of OFT, BOFT, HRA, PSOFT, LOFT is expected"),
    "biases": ("oft", {"bias": "all"}, {}, "bias='all' trains the base model's biases"),
    "a new field": (
        "oft",
        {"twist": 3},
        {},
        "adapter_config.json sets twist=3, which this loft_rs does not know for OFT",
    ),
    "nan": (
        "oft",
        {},
        {f"{UP}oft_R.weight": torch.full((8, 28), torch.nan)},
        "'base_model.model.up.oft_R.weight' holds NaN",
    ),
    "integers": ("oft", {}, {f"{UP}oft_R.weight": torch.zeros(8, 28, dtype=torch.int32)}, "has dtype torch.int32"),
    "unknown": (
        "oft",
        {},
        {f"{UP}lora_A": torch.zeros(2)},
        r"'base_model.model.up.lora_A' is neither OFT's nor one of modules_to_",
    ),
    "a convolution": ("boft", {}, {f"{UP}boft_s": torch.ones(1, 96)}, "module 'up' is a Conv2d"),
    "no scale": ("boft", {}, {f"{UP}boft_s": None}, "module 'up' lacks boft_s"),
    "rectangles": ("boft", {}, {f"{UP}boft_R": torch.zeros(1, 8, 8, 4)}, "blocks and scale of the unexpected shapes"),
    "size one": ("boft", {}, {f"{UP}boft_R": torch.zeros(1, 64, 1, 1)}, "blocks of size 1"),
    "other factors": (
        "boft",
        {},
        {f"{UP}boft_R": torch.zeros(2, 8, 8, 8)},
        r"different numbers of butterfly factors: \[1, 2\]",
    ),
    "too many": ("hra", {}, {f"{UP}hra_u": torch.ones(64, 65)}, "more reflections than LOFT allows"),
    "zero column": ("hra", {}, {f"{UP}hra_u": torch.zeros(64, 8)}, "zero column in hra_u"),
    "of one dimension": ("hra", {}, {f"{UP}hra_u": torch.ones(64)}, r"hra_u of the unexpected shape \(64,\)"),
}
PLAIN = {
    "oft": lambda: OFTConfig(oft_block_size=8, **SHARED),
    "boft": lambda: BOFTConfig(boft_block_size=8, **SHARED),
    "hra": lambda: HRAConfig(r=8, **SHARED),
    "psoft": lambda: PsoftConfig(r=8, **SHARED),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    for name, config in PLAIN.items():
        trained(config(), steps=1).save_pretrained(folder / name)
    return folder


def copied(plain, name, target):
    target.mkdir()
    for file in (WEIGHTS, CONFIG):
        (target / file).write_bytes((plain / name / file).read_bytes())
    return target


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_named_and_nothing_is_written(plain, tmp_path, case):
    name, fields, tensors, message = REFUSED[case]
    source = copied(plain, name, tmp_path / "peft")
    edit(source, tensors=tensors, **fields)
    with pytest.raises(ValueError, match=message):
        convert_adapter(source, tmp_path / "loft", Net())
    assert [each.name for each in tmp_path.iterdir()] == ["peft"]


def test_files_and_folders_that_do_not_do_are_named(plain, tmp_path):
    with pytest.raises(FileNotFoundError, match="src: .*nowhere is not a folder"):
        convert_adapter(tmp_path / "nowhere", tmp_path / "b")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no adapter_config.json in it"):
        convert_adapter(tmp_path / "empty", tmp_path / "b")
    source = copied(plain, "oft", tmp_path / "a")
    with pytest.raises(ValueError, match="is src itself"):
        convert_adapter(source, source)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        convert_adapter(source, tmp_path / "no" / "b")
    with pytest.raises(ValueError, match="peft_type 'HRA', not 'LOFT'; give another folder"):
        convert_adapter(source, copied(plain, "hra", tmp_path / "hra"))
    with pytest.raises(TypeError, match="base_model must be a torch.nn.Module, a folder or None, got int"):
        convert_adapter(source, tmp_path / "b", 3)
    with pytest.raises(FileNotFoundError, match="base_model: nowhere is not a folder"):
        convert_adapter(source, tmp_path / "b", "nowhere")
    with pytest.raises(ValueError, match="plain base model"):
        convert_adapter(source, tmp_path / "b", peft.get_peft_model(Net(), LoraConfig(target_modules=["up"])))
    with pytest.raises(ValueError, match="base_model has no module 'mid'"):
        convert_adapter(source, tmp_path / "b", nn.Linear(2, 2))
    with pytest.raises(ValueError, match="module 'mid' of base_model has 90 inputs, but .* was trained with 96"):
        convert_adapter(source, tmp_path / "b", Net((64, 90, 32)))
    convolution = Net()
    convolution.mid = nn.Conv2d(3, 3, 3)
    with pytest.raises(ValueError, match="module 'mid' of base_model is a Conv2d; only linear layers"):
        convert_adapter(source, tmp_path / "b", convolution)
    for name, folders in (("src", (None, tmp_path / "b")), ("dst", (source, 3))):
        with pytest.raises(TypeError, match=f"{name} must be the path of a folder"):
            convert_adapter(*folders)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="dst: .*model holds a model"):
        convert_adapter(source, tmp_path / "model")
    with pytest.raises(ValueError, match="base_model: .*hra holds an adapter"):
        convert_adapter(source, tmp_path / "b", tmp_path / "hra")
    (source / WEIGHTS).write_bytes((source / WEIGHTS).read_bytes()[:-3])
    with pytest.raises(ValueError, match="not a safetensors file, or a damaged one"):
        convert_adapter(source, tmp_path / "b")
    (source / WEIGHTS).rename(source / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="adapter_model.bin is a pickle, which is not read"):
        convert_adapter(source, tmp_path / "b")
    (source / CONFIG).write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        convert_adapter(source, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_psoft_needs_a_base_of_its_shape_and_precision(plain, tmp_path):
    with pytest.raises(ValueError, match=r"must hold float32 or half-precision weights, got torch.float64"):
        convert_adapter(plain / "psoft", tmp_path / "b", Net().double())
    with pytest.raises(ValueError, match="r=8 is above what module 'mid' of base_model has, 6"):
        convert_adapter(plain / "psoft", tmp_path / "b", Net((64, 96, 6)))


def test_dropout_of_the_training_is_named(plain, tmp_path):
    source = copied(plain, "psoft", tmp_path / "a")
    edit(source, psoft_dropout=0.1)
    with pytest.warns(UserWarning, match="psoft_dropout=0.1 is left out"):
        convert_adapter(source, tmp_path / "b", Net())


def test_a_failure_while_writing_leaves_nothing(plain, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr("loft_rs.convert.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        convert_adapter(plain / "oft", tmp_path / "b")
    assert not list(tmp_path.iterdir())


def test_the_same_adapter_writes_the_same_bytes(plain, tmp_path):
    for name in ("a", "b"):
        convert_adapter(plain / "hra", tmp_path / name)
        convert_adapter(tmp_path / name, tmp_path / f"{name}-back")
    for file in (CONFIG, WEIGHTS):
        for end in ("", "-back"):
            assert (tmp_path / f"a{end}" / file).read_bytes() == (tmp_path / f"b{end}" / file).read_bytes()
