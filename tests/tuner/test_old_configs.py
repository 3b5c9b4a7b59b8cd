"""Configs of format version 1, whose options of the support and of the transform were fields of
their own, say what they said.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from convert_cases import CONFIG, LAYERS, Net, apart, edit, loaded, output
from hypothesis import given
from hypothesis import strategies as st

import loft_rs
from loft_rs import Activation, Blocks, GradSVD, LoftConfig, Pilot, Reflections, SkewGrad
from loft_rs.inspection import inspect_adapter
from loft_rs.layer.kinds import BlocksKind, Kind, ReflectionsKind, SubspaceKind

# All that version 1 wrote, as it wrote what nobody had set.
VERSION_1 = {
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "exclude_modules": None,
    "factors": 1,
    "fan_in_fan_out": False,
    "frozen_ranks": {},
    "halves": False,
    "inference_mode": True,
    "init_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loft_format_version": 1,
    "magnitudes": False,
    "modules_to_save": None,
    "neumann_terms": None,
    "order": "auto",
    "output_scale": False,
    "peft_type": "LOFT",
    "peft_version": "0.21.2",
    "r": 64,
    "rank_pattern": {},
    "revision": None,
    "seed": 0,
    "share": False,
    "side": "input",
    "side_pattern": {},
    "support": "principal",
    "target_modules": None,
    "task_type": None,
    "tied": False,
    "trainable_token_indices": None,
    "transform": "cayley",
}
OPTIONS = ("factors", "halves", "magnitudes", "neumann_terms", "output_scale", "share")
FILE = "there/is/none.safetensors"


def read(folder: str | Path) -> LoftConfig:
    """A folder's config, without one warning: PEFT warns of what it leaves out."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return peft.PeftConfig.from_pretrained(str(folder))


def written(folder: str | Path, config: dict) -> Path:
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True))
    return folder


def facts(kind: Kind) -> tuple:
    return type(kind), vars(kind)


def old_kind(old: dict) -> Kind:
    if old["support"] == "blocks":
        return BlocksKind(old["factors"], old["share"])
    return ReflectionsKind(old["transform"] == "reflection") if old["support"] == "trained" else SubspaceKind()


def old_transform_name(old: dict) -> str | None:
    if old["support"] == "trained":
        return None
    terms = "" if old["neumann_terms"] is None else f":{old['neumann_terms']}"
    return old["transform"] + terms + "+magnitudes" * old["magnitudes"] + "+halves" * old["halves"]


def assert_means(config: LoftConfig, old: dict) -> None:
    """What version 1 made of these fields."""
    assert isinstance(config, LoftConfig)
    assert facts(config.kind) == facts(old_kind(old))
    assert config.transform_name == old_transform_name(old)
    assert config.method == ("reflections" if old["support"] == "trained" else old["support"])
    assert config.output_scale is old["output_scale"]
    assert config.has_support is (old["support"] not in ("blocks", "trained"))
    assert config.needs_calibration is (old["support"] in ("skewgrad", "gradsvd", "activation", "pilot"))
    assert config.support_file == (old["support"] if old["support"].endswith(".safetensors") else None)
    assert config.supports_from_checkpoint and config.rank == old["r"]
    for name in old.keys() - {*OPTIONS, "support", "transform", "loft_format_version"}:
        now = getattr(config, name)
        assert (sorted(now) if isinstance(now, set) else now) == old[name], name


def assert_kept(config: LoftConfig, old: dict, folder: str | Path) -> None:
    """It can be written and read as often as one likes, in this version."""
    plain = json.loads(json.dumps(config.to_dict()))
    again = read(written(Path(folder) / "dict", plain))
    assert_means(again, old)
    assert json.loads(json.dumps(again.to_dict())) == plain
    config.save_pretrained(str(Path(folder) / "saved"))
    saved = json.loads((Path(folder) / "saved" / CONFIG).read_text())
    assert saved == plain | {"loft_format_version": 2} and not saved.keys() & set(OPTIONS)
    assert_means(read(Path(folder) / "saved"), old)
    read(Path(folder) / "saved").save_pretrained(str(Path(folder) / "twice"))
    assert (Path(folder) / "twice" / CONFIG).read_bytes() == (Path(folder) / "saved" / CONFIG).read_bytes()


# -- every option --------------------------------------------------------------------------------

# (the fields that were set, the options' object, what `transform` is now)
CASES = {
    "plain": ({}, None, "cayley"),
    "random": ({"support": "random", "transform": "exp"}, None, "exp"),
    "free": ({"support": "coordinate", "transform": "free"}, None, "free"),
    "skewgrad": ({"support": "skewgrad", "side": "auto"}, SkewGrad(), "cayley"),
    "gradsvd": ({"support": "gradsvd", "side_pattern": {"up": "output"}}, GradSVD(), "cayley"),
    "activation": ({"support": "activation", "tied": True}, Activation(), "cayley"),
    "pilot": ({"support": "pilot"}, Pilot(), "cayley"),
    "halves of a pilot": ({"support": "pilot", "halves": True}, Pilot(halves=True), "cayley"),
    "halves of a pilot, exp": ({"support": "pilot", "halves": True, "transform": "exp"}, Pilot(halves=True), "exp"),
    "file": ({"support": FILE}, None, "cayley"),
    "halves of a file": ({"support": FILE, "halves": True}, None, "cayley+halves"),
    "halves of a file, exp": ({"support": FILE, "halves": True, "transform": "exp"}, None, "exp+halves"),
    "magnitudes": ({"magnitudes": True}, None, "cayley+magnitudes"),
    "magnitudes, exp": ({"magnitudes": True, "transform": "exp"}, None, "exp+magnitudes"),
    "neumann": ({"transform": "cayley_neumann", "neumann_terms": 5}, None, "cayley_neumann:5"),
    "neumann and magnitudes": (
        {"transform": "cayley_neumann", "neumann_terms": 2, "magnitudes": True},
        None,
        "cayley_neumann:2+magnitudes",
    ),
    "blocks": ({"support": "blocks"}, Blocks(), "cayley"),
    "factors": ({"support": "blocks", "factors": 3}, Blocks(factors=3), "cayley"),
    "share": ({"support": "blocks", "share": True}, Blocks(share=True), "cayley"),
    "output_scale": ({"support": "blocks", "output_scale": True}, Blocks(output_scale=True), "cayley"),
    "blocks with all": (
        {"support": "blocks", "factors": 2, "share": True, "output_scale": True, "transform": "exp"},
        Blocks(factors=2, share=True, output_scale=True),
        "exp",
    ),
    "blocks, neumann": (
        {"support": "blocks", "transform": "cayley_neumann", "neumann_terms": 3},
        Blocks(),
        "cayley_neumann:3",
    ),
    "householder": ({"support": "trained", "transform": "householder"}, Reflections(), "cayley"),
    "reflection": ({"support": "trained", "transform": "reflection"}, Reflections(gram_schmidt=True), "cayley"),
}


@pytest.mark.parametrize("case", CASES)
def test_every_option_is_found_where_it_is_now(case, tmp_path):
    fields, options, transform = CASES[case]
    old = VERSION_1 | fields
    config = read(written(tmp_path, old))
    assert config.options == options and type(config.options) is type(options) and config.transform == transform
    assert_means(config, old)
    assert_kept(config, old, tmp_path)


@st.composite
def old_configs(draw) -> dict:
    """What version 1 could have written."""
    supports = ["principal", "random", "coordinate", "skewgrad", "gradsvd", "activation", "pilot", FILE]
    old = {"support": draw(st.sampled_from([*supports, "blocks", "trained"])), "r": 2 * draw(st.integers(1, 99))}
    names = st.sampled_from(["up", "layers.3.q_proj", r"^model\.up", "v"])
    if old["support"] == "trained":
        old["transform"] = draw(st.sampled_from(["householder", "reflection"]))
    else:
        old["transform"] = draw(st.sampled_from(["cayley", "exp", "free", "cayley_neumann"]))
        if old["transform"] == "cayley_neumann":
            old["neumann_terms"] = draw(st.integers(1, 12))
    if old["support"] == "blocks":
        flag = st.booleans()
        old |= {"factors": draw(st.integers(1, 6)), "share": draw(flag), "output_scale": draw(flag)}
    elif old["support"] != "trained":
        halves = old["support"] in ("pilot", FILE) and old["transform"] in ("cayley", "exp") and draw(st.booleans())
        magnitudes = old["transform"] != "free" and not halves and draw(st.booleans())
        sides = ["input", "output"] + ["auto"] * (old["support"] in ("skewgrad", "gradsvd", FILE))
        old |= {"halves": halves, "magnitudes": magnitudes, "side": draw(st.sampled_from(sides))}
        old["side_pattern"] = draw(st.dictionaries(names, st.sampled_from(["input", "output"])))
        if old["side"] == "input":
            old["tied"] = draw(st.sampled_from([False, True, [["q_proj", "k_proj"]]]))
        old["frozen_ranks"] = draw(st.dictionaries(names, st.integers(1, 99)))
    old["rank_pattern"] = draw(st.dictionaries(names, st.integers(1, 20).map(lambda half: 2 * half)))
    old["target_modules"] = draw(st.sampled_from([None, "all-linear", ["k", "q"], r".*\.up"]))
    old["exclude_modules"] = draw(st.sampled_from([None, "lm_head", ["k"]]))
    if isinstance(old["target_modules"], list) and draw(st.booleans()):
        old |= {"layers_to_transform": [0, 2], "layers_pattern": draw(st.sampled_from([None, "blocks"]))}
    old["modules_to_save"] = draw(st.sampled_from([None, ["classifier"]]))
    old["trainable_token_indices"] = draw(st.sampled_from([None, [1, 2], {"embed": [3]}]))
    old["task_type"] = draw(st.sampled_from([None, "CAUSAL_LM"]))
    old |= {"order": draw(st.sampled_from(["auto", "natural", "input_pca"])), "seed": draw(st.integers(0, 2**32))}
    return VERSION_1 | old | {"init_weights": draw(st.booleans()), "fan_in_fan_out": draw(st.booleans())}


@given(old_configs())
def test_whatever_version_1_wrote_is_read_and_kept(old):
    with tempfile.TemporaryDirectory() as folder:
        config = read(written(folder, old))
        assert_means(config, old)
        assert_kept(config, old, folder)


@given(old_configs(), st.sets(st.sampled_from(OPTIONS)))
def test_options_that_a_file_of_before_they_were_does_not_have(old, without):
    without = {name for name in without if old[name] == VERSION_1[name]}
    with tempfile.TemporaryDirectory() as folder:
        config = read(written(folder, {name: value for name, value in old.items() if name not in without}))
        assert_means(config, old)
        assert_kept(config, old, folder)


@given(old_configs())
def test_fields_of_a_newer_peft_take_no_option_with_them(old):
    with tempfile.TemporaryDirectory() as folder:
        written(folder, old | {"of_a_newer_peft": 1})
        with pytest.warns(UserWarning) as told:
            config = peft.PeftConfig.from_pretrained(folder)
        assert [str(each.message) for each in told] == [
            "fields that this PEFT does not know are left out: of_a_newer_peft"
        ]
        assert_means(config, old)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"support": "blocks", "magnitudes": True}, "magnitudes needs a support"),
        ({"support": "blocks", "halves": True}, r"halves needs support=Pilot\(halves=True\)"),
        ({"halves": True}, r"halves needs support=Pilot\(halves=True\)"),
        ({"support": "pilot", "halves": True, "transform": "free"}, "halves needs the transform 'cayley' or 'exp'"),
        ({"transform": "free", "magnitudes": True}, "magnitudes needs a support and a transform other than 'free'"),
        ({"transform": "cayley_neumann"}, "'cayley_neumann' needs its number of terms"),
        ({"neumann_terms": 3}, "'cayley_neumann' needs its number of terms"),
        ({"support": "blocks", "transform": "cayley_neumann", "neumann_terms": 0}, "got 'cayley_neumann:0'"),
        ({"support": "blocks", "factors": 0}, "factors must be a positive integer, got 0"),
        ({"loft_format_version": 3}, "loft_format_version is 3, but this loft_rs reads version 2"),
    ],
)
def test_what_version_1_refused_is_refused(fields, message, tmp_path):
    written(tmp_path, VERSION_1 | fields)
    with pytest.raises(ValueError, match=message):
        peft.PeftConfig.from_pretrained(str(tmp_path))


# -- adapters ------------------------------------------------------------------------------------

# Those that tests/golden has none of: (as it is made now, the fields that version 1 wrote).
ADAPTERS = {
    "neumann": (
        lambda **o: LoftConfig(r=8, transform="cayley_neumann:3", **o),
        {"transform": "cayley_neumann", "neumann_terms": 3},
    ),
    "neumann and magnitudes": (
        lambda **o: LoftConfig.psoft(8, neumann_terms=2, **o),
        {"transform": "cayley_neumann", "neumann_terms": 2, "magnitudes": True},
    ),
    "shared blocks": (lambda **o: LoftConfig.oft(8, share=True, **o), {"support": "blocks", "share": True}),
    "blocks, neumann": (
        lambda **o: LoftConfig.oft(8, neumann_terms=3, **o),
        {"support": "blocks", "transform": "cayley_neumann", "neumann_terms": 3},
    ),
    "scaled blocks": (
        lambda **o: LoftConfig.boft(4, 1, **o),
        {"support": "blocks", "output_scale": True},
    ),
    "reflection": (
        lambda **o: LoftConfig.hra(4, gram_schmidt=True, **o),
        {"support": "trained", "transform": "reflection"},
    ),
}


@pytest.mark.filterwarnings("ignore:PSOFT's own basis is up to")
@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapter_with_a_config_of_version_1_is_what_it_was(case, tmp_path):
    make, fields = ADAPTERS[case]
    torch.manual_seed(0)
    model = peft.get_peft_model(Net(decay=0.7), make(target_modules=LAYERS, init_weights=False))
    model.save_pretrained(tmp_path / "a")
    reports = inspect_adapter(tmp_path / "a")
    loft_rs.convert_adapter(tmp_path / "a", tmp_path / "peft of 2", Net(decay=0.7))
    own = model.peft_config["default"]
    moved = (*OPTIONS, "support", "transform", "loft_format_version")
    edit(tmp_path / "a", **{name: VERSION_1[name] for name in moved} | fields)
    again = loaded(tmp_path / "a", Net(decay=0.7))
    assert torch.equal(output(again), output(model)) and apart(output(model), output(Net(decay=0.7))) > 1e-2
    assert facts(again.peft_config["default"].kind) == facts(own.kind)
    for one, other in zip(inspect_adapter(tmp_path / "a"), reports, strict=True):
        np.testing.assert_equal(vars(one), vars(other))
    loft_rs.convert_adapter(tmp_path / "a", tmp_path / "peft of 1", Net(decay=0.7))
    assert (tmp_path / "peft of 1" / CONFIG).read_bytes() == (tmp_path / "peft of 2" / CONFIG).read_bytes()


# -- the constructor -----------------------------------------------------------------------------

PLACES = {
    "halves": r"say support=loft_rs\.Pilot\(halves=True\)",
    "magnitudes": r"say transform='cayley\+magnitudes'",
    "neumann_terms": r"say transform='cayley_neumann:5'",
    "factors": r"say support=loft_rs\.Blocks\(factors=\.\.\.\)",
    "share": r"say support=loft_rs\.Blocks\(share=True\)",
    "output_scale": r"say support=loft_rs\.Blocks\(output_scale=True\)",
}


@pytest.mark.parametrize("value", [None, False, True, 2])
@pytest.mark.parametrize("name", OPTIONS)
def test_the_constructor_refuses_a_retired_field_and_names_its_place(name, value):
    assert PLACES.keys() == set(OPTIONS)
    message = f"LoftConfig no longer takes {name}: {PLACES[name]}"
    for make in (
        lambda: LoftConfig(**{name: value}),
        lambda: LoftConfig(r=8, support="blocks", **{name: value}),
        lambda: LoftConfig(loft_format_version=None, **{name: value}),
        lambda: peft.PeftConfig.from_peft_type(peft_type="LOFT", **{name: value}),
    ):
        with pytest.raises(TypeError, match=message):
            make()


@pytest.mark.parametrize(
    "fields", [{"support": "trained"}, {"transform": "householder"}, {"transform": "reflection", "support": "blocks"}]
)
def test_the_constructor_refuses_what_trained_vectors_were(fields):
    with pytest.raises(ValueError, match=r"are support=loft_rs\.Reflections\(\), as LoftConfig\.hra makes them"):
        LoftConfig(**fields)
