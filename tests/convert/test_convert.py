"""convert/: PEFT's OFT, BOFT, HRA and PSOFT checkpoints as LOFT adapters with the same output, and
back again.
"""

from __future__ import annotations

import json
import math
import tempfile
import warnings

import peft
import pytest
import torch
from convert_cases import (
    CONFIG,
    CONFIGS,
    LAYERS,
    SHARED,
    WEIGHTS,
    Net,
    X,
    apart,
    edit,
    extension,  # noqa: F401
    loaded,
    output,
    saved,
)
from hypothesis import given
from hypothesis import strategies as st
from peft import BOFTConfig, HRAConfig, OFTConfig, PsoftConfig
from peft.tuners.boft import layer as boft_layer
from reference import make_bert, make_llama, token_batches
from safetensors.torch import load_file
from torch import nn

from loft_rs.convert import convert_adapter
from loft_rs.convert.triangles import lower, lower_from_upper, upper_from_lower
from loft_rs.transform.skew import skew as skew_of

pytestmark = pytest.mark.usefixtures("extension")


@pytest.mark.parametrize("name", CONFIGS)
def test_the_converted_adapter_gives_the_output_of_peft(name, tmp_path):
    model = saved(CONFIGS[name](), tmp_path / "peft")
    wanted = output(model)
    assert apart(wanted, output(Net())) > 1e-2
    base = Net() if name.startswith("psoft") else None
    assert convert_adapter(tmp_path / "peft", tmp_path / "loft", base) == str(tmp_path / "loft")
    loft = loaded(tmp_path / "loft")
    # PEFT applies HRA's r reflections one after the other, and rounds after each.
    # PSOFT's two products over r = 32 terms are rounded in another order.
    per_term = 2**-23 if name.startswith("hra") else 2**-24 if name == "psoft 32" else 0
    bound = 2e-6 + (int(name.split()[1]) * per_term if per_term else 0)
    assert apart(output(loft), wanted) <= bound
    assert apart(output(loft.merge_and_unload()), wanted) <= bound

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="PEFT runs one butterfly factor")
        convert_adapter(tmp_path / "loft", tmp_path / "back", base)
    assert apart(output(loaded(tmp_path / "back")), wanted) <= 2e-6
    before, after = (load_file(tmp_path / folder / WEIGHTS) for folder in ("peft", "back"))
    for key, value in after.items():
        if key.endswith("boft_R"):
            value, before[key] = value - value.mT, before[key] - before[key].mT
        if key in before and not name.startswith("psoft"):
            torch.testing.assert_close(value, before[key], atol=0, rtol=1.2e-7)
        elif key in before and name not in ("psoft a", "psoft b", "psoft free"):
            torch.testing.assert_close(value, before[key], atol=1e-6, rtol=1e-6)
    if name not in ("psoft a", "psoft b", "psoft free"):
        assert set(after) == set(before)
        if not name.startswith("psoft"):
            old, new = (json.loads((tmp_path / folder / CONFIG).read_text()) for folder in ("peft", "back"))
            same = {
                "peft_type",
                "block_share",
                "use_cayley_neumann",
                "boft_n_butterfly_factor",
                "apply_GS",
                "task_type",
            }
            assert {k: old[k] for k in same & set(old)} == {k: new[k] for k in same & set(new)}


@given(
    n=st.integers(2, 48),
    m=st.integers(2, 40),
    b=st.integers(2, 40),
    kind=st.sampled_from(["oft", "exact", "share", "boft", "hra", "psoft"]),
    seed=st.integers(0, 999),
)
def test_any_shape_converts_to_the_same_function_and_back(n, m, b, kind, seed):
    net = nn.Sequential(nn.Linear(n, m, bias=bool(seed % 2)))
    shared = {"target_modules": ["0"], "init_weights": False}
    rank = max(min(b, n, m) // 2 * 2, 2)
    configs = {
        "oft": lambda: OFTConfig(oft_block_size=b, **shared),
        "exact": lambda: OFTConfig(oft_block_size=b, use_cayley_neumann=False, **shared),
        "share": lambda: OFTConfig(oft_block_size=b, block_share=True, **shared),
        "boft": lambda: BOFTConfig(boft_block_size=math.gcd(n, b) if math.gcd(n, b) > 1 else n, **shared),
        "hra": lambda: HRAConfig(r=min(b, n - n % 2), **shared),
        "psoft": lambda: PsoftConfig(r=rank, **shared),
    }
    torch.manual_seed(seed)
    state = {k: torch.randn_like(v) for k, v in net.state_dict().items()}

    def fresh():
        made = nn.Sequential(nn.Linear(n, m, bias=bool(seed % 2)))
        made.load_state_dict(state)
        return made

    x = torch.randn(7, n)
    model = peft.get_peft_model(fresh(), configs[kind]()).eval()
    wanted = output(model, x)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/peft")
        nearest = min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: (abs(d - b), d))
        if kind in ("oft", "exact", "share") and nearest == 1:  # PEFT takes it
            with pytest.raises(ValueError, match="all its blocks have size 1"):
                convert_adapter(f"{folder}/peft", f"{folder}/loft")
            return
        convert_adapter(f"{folder}/peft", f"{folder}/loft", fresh())
        convert_adapter(f"{folder}/loft", f"{folder}/back", fresh())
        for each in ("loft", "back"):
            # A series of four terms in float32 loses digits where it diverges.
            assert apart(output(loaded(f"{folder}/{each}", fresh()), x), wanted) <= 1e-5


@given(st.integers(2, 12), st.integers(0, 99))
def test_triangles(b, seed):
    v = torch.randn(2, b * (b - 1) // 2, generator=torch.Generator().manual_seed(seed))
    q = torch.zeros(2, b, b)
    q[:, *torch.triu_indices(b, b, 1)] = v
    q = q - q.mT
    assert torch.equal(lower_from_upper(v, b), lower(q.mT))
    assert torch.equal(upper_from_lower(lower_from_upper(v, b), b), v)
    assert torch.equal(skew_of(lower(q), b), q)


def test_coft_is_projected_as_in_its_forward(tmp_path):
    model = saved(OFTConfig(oft_block_size=8, coft=True, eps=0.3, use_cayley_neumann=False, **SHARED), tmp_path / "a")
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    large = {k: 3 * v for k, v in tensors.items()}
    large["base_model.model.up.oft_R.weight"][0] = 0  # inside the bound: untouched
    edit(tmp_path / "a", tensors=large)
    with torch.no_grad():
        for name in LAYERS:
            getattr(model.base_model.model, name).oft_R["default"].weight.copy_(
                large[f"base_model.model.{name}.oft_R.weight"]
            )
    with pytest.warns(UserWarning, match="coft's bound is applied once"):
        convert_adapter(tmp_path / "a", tmp_path / "b")
    assert apart(output(loaded(tmp_path / "b")), output(model)) <= 2e-6


def test_psoft_takes_the_basis_that_peft_computes(tmp_path):
    for number, options in enumerate(({}, {"psoft_svd": "lowrank", "random_seed": 5, "psoft_svd_lowrank_niter": 12})):
        folder = tmp_path / str(number)
        model = saved(PsoftConfig(r=8, **options, **SHARED), folder / "peft", Net(decay=0.6))
        state = torch.random.get_rng_state()
        convert_adapter(folder / "peft", folder / "loft", Net(decay=0.6))
        assert not torch.equal(state, torch.zeros_like(state))
        tensors = load_file(folder / "loft" / WEIGHTS)
        for name in LAYERS:
            layer = getattr(model.base_model.model, name)
            held = tensors[f"base_model.model.{name}.loft_support"]
            assert torch.equal(held, layer._psoft_A_cache["default"].mT)
            w = layer.base_layer.weight.detach().double()
            share = (w @ held.double()).norm() ** 2 / w.norm() ** 2
            torch.testing.assert_close(
                tensors[f"base_model.model.{name}.loft_energy"].double(), share, atol=1e-6, rtol=0
            )
        assert apart(output(loaded(folder / "loft", Net(decay=0.6))), output(model)) <= 2e-6


def test_psofts_low_rank_mode_is_refused_where_it_is_no_rotation(tmp_path):
    wide = PsoftConfig(r=8, psoft_svd="lowrank", target_modules=["mid"], init_weights=False)
    model = saved(wide, tmp_path / "wide")  # more inputs than outputs: U S = W0 P whatever the spectrum
    convert_adapter(tmp_path / "wide", tmp_path / "loft", Net())
    assert apart(output(loaded(tmp_path / "loft")), output(model)) <= 2e-6
    saved(PsoftConfig(r=8, psoft_svd="lowrank", **SHARED), tmp_path / "flat")
    with pytest.raises(
        ValueError, match=r"not a rotation in module '(same|up)'.* is \d\.\de-0\d away from W0 P.*convert_to_lora"
    ):
        convert_adapter(tmp_path / "flat", tmp_path / "no", Net())
    edit(tmp_path / "wide", random_seed="gone")
    with pytest.raises(ValueError, match="without random_seed"):
        convert_adapter(tmp_path / "wide", tmp_path / "no", Net())
    assert not (tmp_path / "no").exists()


def test_psofts_bound_on_the_generator_is_applied_once(tmp_path):
    config = PsoftConfig(r=16, use_cayley_neumann=True, cayley_neumann_eps=0.3, **SHARED)
    model = saved(config, tmp_path / "peft")
    with pytest.warns(UserWarning, match="cayley_neumann_eps is applied once"):
        convert_adapter(tmp_path / "peft", tmp_path / "loft", Net())
    assert apart(output(loaded(tmp_path / "loft")), output(model)) <= 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_in_half_precision_keeps_its_dtype(tmp_path, dtype):
    model = saved(PsoftConfig(r=8, **SHARED), tmp_path / "peft")
    wanted = output(model)
    convert_adapter(tmp_path / "peft", tmp_path / "loft", Net().to(dtype))
    assert load_file(tmp_path / "loft" / WEIGHTS)["base_model.model.up.loft_support"].dtype == dtype
    eps = torch.finfo(dtype).eps
    assert apart(output(loaded(tmp_path / "loft", Net().to(dtype)), X.to(dtype)).float(), wanted) <= 8 * eps
    back = convert_adapter(tmp_path / "loft", tmp_path / "back", Net().to(dtype))
    assert apart(output(loaded(back, Net().to(dtype)), X.to(dtype)).float(), wanted) <= 8 * eps


def test_modules_to_save_and_the_selection_of_modules_are_kept(tmp_path):
    shared = {
        "task_type": "SEQ_CLS",
        "modules_to_save": ["classifier"],
        "layers_to_transform": [1],
        "init_weights": False,
    }
    torch.manual_seed(2)
    model = peft.get_peft_model(make_bert(), OFTConfig(oft_block_size=8, target_modules=["query", "value"], **shared))
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].weight.normal_()
    model.save_pretrained(tmp_path / "peft")
    convert_adapter(tmp_path / "peft", tmp_path / "loft")
    config = json.loads((tmp_path / "loft" / CONFIG).read_text())
    assert set(config["modules_to_save"]) == {"classifier", "score"}
    assert config["target_modules"] == ["query", "value"] and config["layers_to_transform"] == [1]
    batch = token_batches(1, classes=True)[0]
    with torch.no_grad():
        wanted = model.eval()(**batch).logits
        given_back = peft.PeftModel.from_pretrained(make_bert(), str(tmp_path / "loft")).eval()(**batch).logits
    assert apart(given_back, wanted) <= 2e-6
    convert_adapter(tmp_path / "loft", tmp_path / "back")
    assert load_file(tmp_path / "back" / WEIGHTS).keys() == load_file(tmp_path / "peft" / WEIGHTS).keys()


@pytest.mark.parametrize("target", [r".*\.(q|o)_proj", "all-linear"])
def test_psoft_finds_the_base_that_its_config_names(tmp_path, target):
    make_llama().save_pretrained(tmp_path / "base")
    base = type(make_llama()).from_pretrained(tmp_path / "base")
    torch.manual_seed(2)
    model = peft.get_peft_model(
        base, PsoftConfig(r=8, target_modules=target, init_weights=False, task_type="CAUSAL_LM")
    )
    model.save_pretrained(tmp_path / "peft")
    seen = []
    convert_adapter(tmp_path / "peft", tmp_path / "loft", progress=lambda *each: seen.append(each))
    assert [done for _, done, _ in seen] == list(range(1, len(seen) + 1)) and seen[-1][2] == len(seen)
    ids = {"input_ids": torch.arange(10)[None]}
    with torch.no_grad():
        wanted = model.eval()(**ids).logits
        found = peft.PeftModel.from_pretrained(make_llama(), str(tmp_path / "loft")).eval()(**ids).logits
    assert apart(found, wanted) <= 1e-5
    edit(tmp_path / "peft", base_model_name_or_path="someone/model")
    with pytest.raises(
        ValueError, match="names 'someone/model', which is not a folder on this machine; give base_model"
    ):
        convert_adapter(tmp_path / "peft", tmp_path / "no")
    edit(tmp_path / "peft", base_model_name_or_path=None)
    with pytest.raises(ValueError, match="not in its checkpoint, and its config names none; give base_model"):
        convert_adapter(tmp_path / "peft", tmp_path / "no")
    convert_adapter(tmp_path / "peft", tmp_path / "loft", tmp_path / "base")  # replaces its own kind
    edit(tmp_path / "peft", task_type=None)
    with pytest.raises(ValueError, match="neither its task_type nor its auto_mapping"):
        convert_adapter(tmp_path / "peft", tmp_path / "no", str(tmp_path / "base"))
    assert not (tmp_path / "no").exists()


def test_sizes_that_differ_are_named_in_full(tmp_path):
    """Names that end alike must not be taken for each other, and the block size 20 is one that PEFT
    adjusts by width.
    """

    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.q = nn.Linear(64, 48)
            self.a = nn.ModuleDict({"q": nn.Linear(48, 40), "a": nn.ModuleDict({"q": nn.Linear(40, 60)})})
            self.b = nn.ModuleDict({"q": nn.Linear(60, 64), "a": nn.ModuleDict({"q": nn.Linear(64, 9)})})

        def forward(self, x):
            x = torch.tanh(self.a["a"]["q"](torch.tanh(self.a["q"](torch.tanh(self.q(x))))))
            return self.b["a"]["q"](torch.tanh(self.b["q"](x)))

    model = peft.get_peft_model(Nested(), OFTConfig(oft_block_size=14, target_modules=["q"], init_weights=False))
    model.save_pretrained(tmp_path / "peft")
    convert_adapter(tmp_path / "peft", tmp_path / "loft")
    assert len(set(json.loads((tmp_path / "loft" / CONFIG).read_text())["rank_pattern"].values())) > 1
    assert apart(output(loaded(tmp_path / "loft", Nested())), output(model)) <= 2e-6
    convert_adapter(tmp_path / "loft", tmp_path / "back")
    assert apart(output(loaded(tmp_path / "back", Nested())), output(model)) <= 2e-6


def test_blocks_of_size_one_are_left_out(tmp_path):
    widths = (64, 61, 32)  # 61 is prime: PEFT's nearest divisor to 8 is 1
    model = saved(OFTConfig(oft_block_size=8, use_cayley_neumann=False, **SHARED), tmp_path / "peft", Net(widths))
    with pytest.warns(UserWarning, match="blocks of size 1 turn nothing: mid left out"):
        convert_adapter(tmp_path / "peft", tmp_path / "loft")
    assert apart(output(loaded(tmp_path / "loft", Net(widths))), output(model)) <= 2e-6


# -- what other versions of PEFT wrote -----------------------------------------------------------


def of_peft_015(blocks, scale, base, x):
    """The forward of peft 0.14 to 0.15.2: W0 rotated by Cayley blocks on the input side, each
    output scaled before the bias.
    """
    eye = torch.eye(blocks.shape[-1])
    skew = 0.5 * (blocks - blocks.mT)
    turned = torch.linalg.solve(eye + skew, eye.expand_as(skew) - skew, left=False)
    count = base.in_features // blocks.shape[-1]
    rotation = torch.block_diag(*turned.expand(count, *turned.shape[1:]))
    return nn.functional.linear(x, (rotation @ base.weight.mT).mT * scale, base.bias)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("coft", [False, True])
def test_oft_of_peft_014_and_015(tmp_path, share, coft):
    saved(OFTConfig(oft_block_size=8, target_modules=["up"]), tmp_path / "peft")
    count = 1 if share else 8
    blocks = 0.2 * torch.randn(count, 8, 8, generator=torch.Generator().manual_seed(1))
    scale = 1 + 0.1 * torch.randn(96, 1, generator=torch.Generator().manual_seed(2))
    key = "base_model.model.up."
    old = {f"{key}oft_R.weight": None, f"{key}oft_r": blocks, f"{key}oft_s": scale}
    fields = {"use_cayley_neumann": "gone", "num_cayley_neumann_terms": "gone", "peft_version": "gone"}
    edit(tmp_path / "peft", tensors=old, block_share=share, coft=coft, eps=1e-3, **fields)
    if share and coft:
        with pytest.raises(ValueError, match="its bound cannot be told"):
            convert_adapter(tmp_path / "peft", tmp_path / "loft")
        return
    if coft:  # eps * ceil(out / r)^2 / sqrt(r)
        limit = 1e-3 * math.ceil(96 / count) ** 2 / count**0.5
        norms = torch.linalg.matrix_norm(blocks, keepdim=True)
        blocks = torch.where(norms <= limit, blocks, limit * blocks / norms)
        with pytest.warns(UserWarning, match="coft"):
            convert_adapter(tmp_path / "peft", tmp_path / "loft")
    else:
        convert_adapter(tmp_path / "peft", tmp_path / "loft")
    base = Net().up
    found = loaded(tmp_path / "loft").base_model.model.up(X).detach()
    assert apart(found, of_peft_015(blocks, scale, base, X).detach()) <= 2e-6
    edit(tmp_path / "peft", tensors={f"{key}oft_s": None}, oft_block_size="gone")
    with pytest.raises(ValueError, match="OFT of PEFT 0.13 or before, which turns a layer's outputs"):
        convert_adapter(tmp_path / "peft", tmp_path / "no")


def test_a_series_of_before_peft_018_says_how_far_it_has_moved(tmp_path):
    model = saved(OFTConfig(oft_block_size=8, **SHARED), tmp_path / "peft")
    for version in ("gone", "0.17.1"):
        edit(tmp_path / "peft", peft_version=version)
        with pytest.warns(
            UserWarning, match=r"before 0.18, whose series differs from today's by Q\^4.* up to \d\.\de-0\d away"
        ):
            convert_adapter(tmp_path / "peft", tmp_path / "loft")
    assert apart(output(loaded(tmp_path / "loft")), output(model)) <= 2e-6


def test_boft_of_peft_012_saved_its_permutations(tmp_path):
    model = saved(BOFTConfig(boft_block_size=8, **SHARED), tmp_path / "peft")
    edit(tmp_path / "peft", tensors={f"base_model.model.{n}.boft_P": torch.eye(4)[None] for n in LAYERS})
    convert_adapter(tmp_path / "peft", tmp_path / "loft")
    assert apart(output(loaded(tmp_path / "loft")), output(model)) <= 2e-6


def test_boft_without_its_extension_is_what_was_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(boft_layer, "get_fbd_cuda", lambda: None)
    model = saved(BOFTConfig(boft_block_size=8, boft_n_butterfly_factor=3, **SHARED), tmp_path / "peft")
    with pytest.warns(UserWarning, match="boft_n_butterfly_factor is 3 but the tensors have 1"):
        convert_adapter(tmp_path / "peft", tmp_path / "loft")
    assert apart(output(loaded(tmp_path / "loft")), output(model)) <= 2e-6
