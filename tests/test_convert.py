"""convert.py: PEFT's OFT, BOFT, HRA and PSOFT checkpoints as LOFT adapters with the same output, and back again."""

from __future__ import annotations

import json
import math
import tempfile
import warnings

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import BOFTConfig, HRAConfig, LoraConfig, OFTConfig, PsoftConfig
from peft.tuners.boft import layer as boft_layer
from reference import make_bert, make_llama, token_batches
from safetensors.torch import load_file, save_file
from torch import nn

import loft_rs
from loft_rs import LoftConfig
from loft_rs.convert import _adjusted, _lower, _lower_from_upper, _skew, _upper_from_lower, convert_adapter

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
X = torch.randn(24, 64, generator=torch.Generator().manual_seed(3))


class TorchBlockDiagonal:
    """What BOFT's CUDA extension does. Where it cannot be built, PEFT silently runs one butterfly factor."""

    @staticmethod
    def forward(blocks):
        return [torch.stack([torch.block_diag(*factor) for factor in blocks])]

    @staticmethod
    def backward(grad, blocks):
        n, count, b, _ = blocks.shape
        return [grad.view(n, count, b, count, b).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).contiguous()]


@pytest.fixture(autouse=True, scope="module")
def extension():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(boft_layer, "_FBD_CUDA", TorchBlockDiagonal)
        yield


class Net(nn.Module):
    """A wide, a tall and a square layer, with and without bias, and a head."""

    def __init__(self, widths=(64, 96, 32), decay=0.0):
        super().__init__()
        torch.manual_seed(0)
        n, wide, narrow = widths
        self.up, self.mid, self.same = (
            nn.Linear(n, wide),
            nn.Linear(wide, narrow, bias=False),
            nn.Linear(narrow, narrow),
        )
        self.head = nn.Linear(narrow, 5)
        if decay:  # a spectrum on which a subspace iteration converges
            for layer in (self.up, self.mid, self.same):
                u, s, vh = torch.linalg.svd(layer.weight.data, full_matrices=False)
                layer.weight.data = u * s * decay ** torch.arange(len(s)) @ vh

    def forward(self, x):
        x = torch.tanh(self.mid(torch.tanh(self.up(x))))
        return self.head(x + self.same(x))


LAYERS = ["up", "mid", "same"]
SHARED = {"target_modules": LAYERS, "init_weights": False}


def trained(config, base=None, steps=2):
    """A PEFT adapter after some steps of Adam from a random start, in evaluation mode."""
    torch.manual_seed(1)
    model = peft.get_peft_model(base or Net(), config)
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.03)
    for _ in range(steps):
        model(X).square().sum().backward()
        optimiser.step()
        optimiser.zero_grad()
    return model.eval()


def output(model, x=X):
    with torch.no_grad():
        return model.eval()(x)


def loaded(folder, base=None):
    return peft.PeftModel.from_pretrained(base or Net(), str(folder))


def apart(a, b):
    """Largest difference over the scale of the output."""
    return float((a - b).abs().max() / b.abs().max())


def saved(config, folder, base=None):
    model = trained(config, base)
    model.save_pretrained(folder)
    return model


def edit(folder, *, tensors=None, **fields):
    """Change an adapter on disk: fields of its config, tensors by name (None removes)."""
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({k: v for k, v in (config | fields).items() if v != "gone"}))
    if tensors is not None:
        held = load_file(folder / WEIGHTS) | tensors
        save_file({k: v for k, v in held.items() if v is not None}, folder / WEIGHTS)


CONFIGS = {
    **{
        f"oft {b}{' exact' if exact else ''}": lambda b=b, exact=exact: OFTConfig(
            oft_block_size=b, use_cayley_neumann=not exact, **SHARED
        )
        for b in (4, 8, 20, 32, 64)
        for exact in (False, True)
    },
    "oft shared": lambda: OFTConfig(oft_block_size=8, block_share=True, **SHARED),
    "oft shared exact": lambda: OFTConfig(oft_block_size=8, block_share=True, use_cayley_neumann=False, **SHARED),
    "oft by count": lambda: OFTConfig(r=4, oft_block_size=0, use_cayley_neumann=False, **SHARED),
    "oft 3 terms": lambda: OFTConfig(oft_block_size=8, num_cayley_neumann_terms=3, **SHARED),
    "oft 7 terms": lambda: OFTConfig(oft_block_size=8, num_cayley_neumann_terms=7, **SHARED),
    **{
        f"boft {b} x {m}": lambda b=b, m=m: BOFTConfig(boft_block_size=b, boft_n_butterfly_factor=m, **SHARED)
        for b, m in ((4, 1), (8, 1), (4, 2), (8, 2), (4, 3), (8, 3))
    },
    "boft by count": lambda: BOFTConfig(boft_block_size=0, boft_block_num=4, boft_n_butterfly_factor=2, **SHARED),
    **{
        f"hra {r}{' GS' if gs else ''}": lambda r=r, gs=gs: HRAConfig(r=r, apply_GS=gs, **SHARED)
        for r in (2, 5, 8, 32)
        for gs in (False, True)
    },
    "psoft": lambda: PsoftConfig(r=16, **SHARED),
    "psoft 32": lambda: PsoftConfig(r=32, psoft_alpha=7, **SHARED),
    "psoft a": lambda: PsoftConfig(r=8, psoft_mag_b=False, **SHARED),
    "psoft b": lambda: PsoftConfig(r=8, psoft_mag_a=False, **SHARED),
    "psoft plain": lambda: PsoftConfig(r=8, psoft_mag_a=False, psoft_mag_b=False, **SHARED),
    "psoft neumann": lambda: PsoftConfig(r=16, use_cayley_neumann=True, **SHARED),
    "psoft 4 terms": lambda: PsoftConfig(r=16, use_cayley_neumann=True, num_cayley_neumann_terms=4, **SHARED),
    "psoft free": lambda: PsoftConfig(r=8, psoft_orth=False, **SHARED),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_converted_adapter_gives_the_output_of_peft(name, tmp_path):
    model = saved(CONFIGS[name](), tmp_path / "peft")
    wanted = output(model)
    assert apart(wanted, output(Net())) > 1e-2
    base = Net() if name.startswith("psoft") else None
    assert convert_adapter(tmp_path / "peft", tmp_path / "loft", base) == str(tmp_path / "loft")
    loft = loaded(tmp_path / "loft")
    assert apart(output(loft), wanted) <= 2e-6
    assert apart(output(loft.merge_and_unload()), wanted) <= 2e-6

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
        if kind in ("oft", "exact", "share") and _adjusted(n, b) == 1:
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
    assert torch.equal(_lower_from_upper(v, b), _lower(q.mT))
    assert torch.equal(_upper_from_lower(_lower_from_upper(v, b), b), v)
    assert torch.equal(_skew(_lower(q), b), q)


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
    """Names that end alike must not be taken for each other, and the block size 20 is one that PEFT adjusts by width."""

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


# -- what other versions of PEFT wrote ---------------------------------------------------------------------------------


def of_peft_015(blocks, scale, base, x):
    """The forward of peft 0.14 to 0.15.2: W0 rotated by Cayley blocks on the input side, each output scaled before the bias."""
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


# -- what is refused ---------------------------------------------------------------------------------------------------

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


# -- LOFT adapters on their way to PEFT --------------------------------------------------------------------------------


def loft(folder, config, base=None):
    model = trained(config, base)
    model.save_pretrained(folder)
    return model


ONLY = {"target_modules": LAYERS, "init_weights": False}


@pytest.mark.parametrize("transform", ["cayley", "free"])
@pytest.mark.parametrize("order", ["natural", "input_pca"])
def test_a_principal_loft_adapter_is_a_psoft_in_any_order_of_its_basis(tmp_path, transform, order):
    model = peft.get_peft_model(
        Net(decay=0.7), LoftConfig(r=8, transform=transform, order=order, target_modules=LAYERS)
    )
    if order == "input_pca":
        loft_rs.calibrate(model, train_step=lambda: model(X).square().sum().backward())
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "loft_theta" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(tmp_path / "loft")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="PSOFT's own basis is up to")
        convert_adapter(tmp_path / "loft", tmp_path / "peft", Net(decay=0.7))
    config = json.loads((tmp_path / "peft" / CONFIG).read_text())
    assert config["psoft_orth"] == (transform == "cayley") and not config["psoft_mag_a"]
    assert apart(output(loaded(tmp_path / "peft", Net(decay=0.7))), output(model)) <= 1e-5


def test_boft_without_a_scale_gets_ones(tmp_path):
    model = loft(tmp_path / "loft", LoftConfig.boft(4, 2, output_scale=False, **ONLY))
    with pytest.raises(ValueError, match="BOFT has an output scale, whose size is the layer's"):
        convert_adapter(tmp_path / "loft", tmp_path / "no")
    with pytest.warns(UserWarning, match="PEFT runs one butterfly factor where its CUDA extension is missing"):
        convert_adapter(tmp_path / "loft", tmp_path / "peft", Net())
    assert apart(output(loaded(tmp_path / "peft")), output(model)) <= 2e-6
    assert not (tmp_path / "no").exists()


KEPT_BACK = {
    "output side": (lambda: LoftConfig(r=4, side="output", **ONLY), "has side='output'; loft_rs.export_lora"),
    "random": (lambda: LoftConfig(r=4, support="random", **ONLY), "support='random' has no counterpart in PEFT's"),
    "exp": (lambda: LoftConfig(r=4, transform="exp", **ONLY), "PSOFT has no transform 'exp'"),
    "exp blocks": (lambda: LoftConfig.oft(8, transform="exp", **ONLY), "neither OFT nor BOFT has transform 'exp'"),
    "one term": (
        lambda: LoftConfig.oft(8, neumann_terms=1, **ONLY),
        "OFT has no transform 'cayley_neumann' with neumann_terms=1",
    ),
    "scaled series": (
        lambda: LoftConfig.oft(8, neumann_terms=2, output_scale=True, **ONLY),
        "BOFT has no transform 'cayley_neumann'",
    ),
    "shared butterfly": (lambda: LoftConfig.boft(4, 2, share=True, **ONLY), "BOFT has no shared blocks"),
    "ranks": (
        lambda: LoftConfig.hra(4, rank_pattern={"up": 6}, **ONLY),
        r"HRA has one rank for all modules, not \[4, 6\]",
    ),
    "psoft ranks": (lambda: LoftConfig.psoft(4, rank_pattern={"up": 6}, **ONLY), "PSOFT has one rank for all modules"),
    "block sizes": (lambda: LoftConfig.oft(8, rank_pattern={"up": 2}, **ONLY), r"none gives \[2, 8\] here"),
    "butterfly sizes": (
        lambda: LoftConfig.boft(8, rank_pattern={"up": 4}, **ONLY),
        r"one block size or number of blocks for all modules, not \[4, 8\]",
    ),
}


@pytest.mark.parametrize("case", KEPT_BACK)
def test_loft_adapters_without_a_counterpart_are_refused(tmp_path, case):
    config, message = KEPT_BACK[case]
    loft(tmp_path / "loft", config())
    with pytest.raises(ValueError, match=message):
        convert_adapter(tmp_path / "loft", tmp_path / "peft", Net())
    assert not (tmp_path / "peft").exists()


def test_a_basis_that_peft_would_not_find_again_is_refused(tmp_path):
    loft(tmp_path / "loft", LoftConfig.psoft(8, **ONLY))
    other = Net()
    with torch.no_grad():
        other.mid.weight.normal_()
    with pytest.raises(
        ValueError, match=r"in module 'mid' its columns are not the top 8 singular vectors \(.* apart, 1e-03 allowed\)"
    ):
        convert_adapter(tmp_path / "loft", tmp_path / "peft", other)
    with pytest.raises(ValueError, match="its config names none; give base_model"):
        convert_adapter(tmp_path / "loft", tmp_path / "peft")
    tensors = load_file(tmp_path / "loft" / WEIGHTS)
    key, skew = "base_model.model.mid.loft_support", _skew(torch.randn(28), 8)
    edit(tmp_path / "loft", tensors={key: tensors[key] @ torch.linalg.matrix_exp(2e-5 * skew)})
    with pytest.warns(UserWarning, match=r"PSOFT's own basis is up to \d\.\de-0[45] away from this adapter's"):
        convert_adapter(tmp_path / "loft", tmp_path / "near", Net())
    edit(tmp_path / "loft", tensors={key: tensors[key] @ torch.linalg.matrix_exp(skew)})
    with pytest.raises(ValueError, match="its columns are not"):
        convert_adapter(tmp_path / "loft", tmp_path / "peft", Net())


def test_tied_adapters_are_refused(tmp_path):
    model = peft.get_peft_model(make_llama(), LoftConfig(r=4, tied=True, target_modules=["q_proj", "k_proj", "v_proj"]))
    model.save_pretrained(tmp_path / "loft")
    with pytest.raises(ValueError, match="no other method of PEFT's has tied=True"):
        convert_adapter(tmp_path / "loft", tmp_path / "peft", make_llama())
