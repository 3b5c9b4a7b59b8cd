"""convert/: LOFT adapters as PEFT's own methods, where they are one, and refused where not."""

from __future__ import annotations

import json
import warnings

import peft
import pytest
import torch
from convert_cases import (
    CONFIG,
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
from reference import make_llama
from safetensors.torch import load_file

import loft_rs
from loft_rs import Blocks, LoftConfig
from loft_rs.convert import convert_adapter
from loft_rs.transform.skew import skew as skew_of

pytestmark = pytest.mark.usefixtures("extension")


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
    model = saved(LoftConfig.boft(4, 2, output_scale=False, **SHARED), tmp_path / "loft")
    with pytest.raises(ValueError, match="BOFT has an output scale, whose size is the layer's"):
        convert_adapter(tmp_path / "loft", tmp_path / "no")
    with pytest.warns(UserWarning, match="PEFT runs one butterfly factor where its CUDA extension is missing"):
        convert_adapter(tmp_path / "loft", tmp_path / "peft", Net())
    assert apart(output(loaded(tmp_path / "peft")), output(model)) <= 2e-6
    assert not (tmp_path / "no").exists()


KEPT_BACK = {
    "output side": (lambda: LoftConfig(r=4, side="output", **SHARED), "has side='output'; loft_rs.export_lora"),
    "random": (lambda: LoftConfig(r=4, support="random", **SHARED), "support='random' has no counterpart in PEFT's"),
    "exp": (lambda: LoftConfig(r=4, transform="exp", **SHARED), "PSOFT has no transform 'exp'"),
    "exp blocks": (lambda: LoftConfig.oft(8, transform="exp", **SHARED), "neither OFT nor BOFT has transform 'exp'"),
    "one term": (
        lambda: LoftConfig.oft(8, neumann_terms=1, **SHARED),
        "OFT has no transform 'cayley_neumann:1'",
    ),
    "scaled series": (
        lambda: LoftConfig(r=8, support=Blocks(output_scale=True), transform="cayley_neumann:2", **SHARED),
        "BOFT has no transform 'cayley_neumann:2'",
    ),
    "shared butterfly": (
        lambda: LoftConfig(r=4, support=Blocks(factors=2, share=True, output_scale=True), **SHARED),
        "BOFT has no shared blocks",
    ),
    "shared butterfly without a scale": (
        lambda: LoftConfig(r=4, support=Blocks(factors=2, share=True), **SHARED),
        "BOFT has no shared blocks",
    ),
    "ranks": (
        lambda: LoftConfig.hra(4, rank_pattern={"up": 6}, **SHARED),
        r"HRA has one rank for all modules, not \[4, 6\]",
    ),
    "psoft ranks": (
        lambda: LoftConfig.psoft(4, rank_pattern={"up": 6}, **SHARED),
        "PSOFT has one rank for all modules",
    ),
    "block sizes": (lambda: LoftConfig.oft(8, rank_pattern={"up": 2}, **SHARED), r"none gives \[2, 8\] here"),
    "butterfly sizes": (
        lambda: LoftConfig.boft(8, rank_pattern={"up": 4}, **SHARED),
        r"one block size or number of blocks for all modules, not \[4, 8\]",
    ),
}


@pytest.mark.parametrize("case", KEPT_BACK)
def test_loft_adapters_without_a_counterpart_are_refused(tmp_path, case):
    config, message = KEPT_BACK[case]
    saved(config(), tmp_path / "loft")
    with pytest.raises(ValueError, match=message):
        convert_adapter(tmp_path / "loft", tmp_path / "peft", Net())
    assert not (tmp_path / "peft").exists()


def test_a_basis_that_peft_would_not_find_again_is_refused(tmp_path):
    saved(LoftConfig.psoft(8, **SHARED), tmp_path / "loft")
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
    key, skew = "base_model.model.mid.loft_support", skew_of(torch.randn(28), 8)
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
