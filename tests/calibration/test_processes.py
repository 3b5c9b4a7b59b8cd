"""calibrate over several processes: one support from all the batches, and no rank left waiting when
another fails.
"""

from __future__ import annotations

import copy
from datetime import timedelta

import numpy as np
import peft
import pytest
import torch
from calibrated import Perceptron, X, perceptron
from reference import make_bert, make_llama, token_batches

from loft_rs import Budget, LoftConfig, SkewGrad, calibrate, save_sketches, supports_from_sketches
from loft_rs.tuner.adapters import adapted_layers


def build(base=None, **options):
    return peft.get_peft_model(base or make_llama(), LoftConfig(**{"target_modules": "all-linear", "r": 6} | options))


def classifier():
    """A double-precision BERT, so that sums in another order differ by nothing that can be seen."""
    return build(make_bert().double(), support="skewgrad", target_modules=["query", "dense"], task_type="SEQ_CLS")


def head_of(model):
    return [p for n, p in model.named_parameters() if "modules_to_save" in n]


def classes():
    return token_batches(3, classes=True)


def step_over(model, batches, factor=1.0):
    def step():
        for batch in batches:
            (model(**batch).loss * factor).backward()

    return step


def state_of(model):
    return {k: v for k, v in model.state_dict().items() if "loft_support" in k or "loft_energy" in k} | {
        f"head {i}": p.detach() for i, p in enumerate(head_of(model))
    }


def error_of(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def calibrate_on_rank(rank, folder):
    """One of two processes: calibrations over a share of the batches, and failures that only rank 1
    meets.
    """
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )
    mine = classes()[:2] if rank == 0 else classes()[2:]
    found = {}
    model = classifier()
    found["report"] = calibrate(model, mine, head_steps=0)
    found["plain"] = state_of(model)
    model = classifier()
    with torch.no_grad():
        for parameter in head_of(model):
            parameter += rank  # rank 0's is the one that counts
    report = calibrate(model, train_step=step_over(model, mine))
    found["warm"] = state_of(model)
    assert report.head_steps == 20
    model = perceptron("a", "b", "unused", base=Perceptron().double(), support="gradsvd")
    x = X.double()
    layers = adapted_layers(model)[1]

    def one_layer_each():
        (layers["a"](x) if rank == 0 else layers["b"](x.repeat(1, 2)[:, :32])).square().mean().backward()

    with pytest.warns(UserWarning, match="to unused: a random support was put there"):
        found["split"] = calibrate(model, train_step=one_layer_each)
    # What only rank 1 meets must not leave rank 0 waiting.
    model = classifier()
    before = copy.deepcopy(model.state_dict())
    broken = {
        "inputs_embeds": torch.full((1, 3, 32), float("nan")).double(),
        "labels": torch.zeros(1, dtype=torch.long),
    }

    def explode():
        if rank == 1:
            raise OSError("disk")
        step_over(model, mine)()

    poison = step_over(model, mine, float("nan") if rank == 1 else 1.0)
    paths = [f"{folder}/unwritten.safetensors", f"{folder}/none/unwritten.safetensors"]
    found["errors"] = [
        error_of(lambda: calibrate(model, mine if rank == 0 else [])),
        error_of(lambda: calibrate(model, mine if rank == 0 else [broken], head_steps=0)),
        error_of(lambda: calibrate(model, mine if rank == 0 else [broken])),
        error_of(lambda: calibrate(model, train_step=explode)),
        error_of(
            lambda: calibrate(model, train_step=(lambda: None) if rank == 1 else step_over(model, mine), head_steps=0)
        ),
        error_of(lambda: calibrate(model, train_step=poison, head_steps=0)),
        error_of(lambda: save_sketches(model, mine, paths[rank])),
        error_of(lambda: save_sketches(model, mine if rank == 0 else [broken], paths[0])),
    ]
    found["unchanged"] = all(torch.equal(v, before[k]) or v.isnan().all() for k, v in model.state_dict().items())
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_calibrate_as_one_with_all_the_batches(tmp_path):
    torch.multiprocessing.spawn(calibrate_on_rank, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2))
    for what in ("plain", "warm"):
        assert first[what].keys() == second[what].keys()
        assert all(torch.equal(first[what][key], second[what][key]) for key in first[what])
    assert first["report"].batches == 3
    plain, warm = classifier(), classifier()
    start = [p.detach().clone() for p in head_of(warm)]
    report = calibrate(plain, classes(), head_steps=0)
    calibrate(warm, train_step=step_over(warm, classes(), 0.5))
    assert not any(torch.equal(p, q) for p, q in zip(head_of(warm), start, strict=True))
    for what, model in (("plain", plain), ("warm", warm)):
        for key, value in state_of(model).items():
            torch.testing.assert_close(first[what][key], value, atol=1e-5, rtol=1e-5)
    for name, s in report.supports.items():
        np.testing.assert_allclose(first["report"].supports[name].values, s.values, rtol=1e-6)
    # a and b were each seen by one process only; that is enough for both.
    for found in (first, second):
        assert {name: s.method for name, s in found["split"].supports.items()} == {
            "a": "gradsvd",
            "b": "gradsvd",
            "unused": "random",
        }
        for name, s in found["split"].supports.items():
            np.testing.assert_array_equal(s.basis, first["split"].supports[name].basis)
    own = ["ValueError: dataloader gave no batch", "NonFiniteError: batch 0 of the dataloader has a loss that is nan"]
    own += [own[1], "OSError: disk"]
    own += ["ValueError: calibration pass 1, train_step: no adapted layer", "NonFiniteError: layer bert."]
    own += ["FileNotFoundError: cannot write", own[1]]
    for told, raised, text in zip(first["errors"], second["errors"], own, strict=True):
        assert told.startswith("RuntimeError: rank 1 failed") and raised.startswith(text)
    assert first["unchanged"] and second["unchanged"] and not (tmp_path / "unwritten.safetensors").exists()


def statistics_on_rank(rank, folder):
    """One of two processes with unequal shares: what calibrate finds out about its supports."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )
    found = statistics_of(token_batches(5)[rank::2], f"{folder}/{rank}.safetensors")
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def statistics_of(batches, path):
    def made(support="skewgrad", **options):
        return build(make_llama().double(), support=support, target_modules=["q_proj", "down_proj"], **options)

    save_sketches(made(), batches, path)
    budgeted = made(r=Budget(params=50))
    return {
        "single": calibrate(made(SkewGrad(passes=1)), batches),
        "budget": calibrate(budgeted, batches),
        "ranks": dict(budgeted.peft_config["default"].rank_pattern),
    }


def test_two_processes_find_out_what_one_does(tmp_path):
    torch.multiprocessing.spawn(statistics_on_rank, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2))
    alone = statistics_of(token_batches(5), tmp_path / "alone.safetensors")
    assert first["ranks"] == second["ranks"] == alone["ranks"] and alone["ranks"]
    assert first["single"].batches == second["single"].batches == alone["single"].batches == 5
    for kind in ("single", "budget"):
        for name, e in alone[kind].evidence.items():
            for found in (first, second):
                told = found[kind].evidence[name]
                assert told.batches == e.batches == 5
                assert told.halves == pytest.approx(e.halves, abs=1e-6)
                assert told.reproducible == pytest.approx(e.reproducible, abs=1e-6)
                np.testing.assert_array_equal(found[kind].supports[name].basis, first[kind].supports[name].basis)
            np.testing.assert_allclose(first[kind].supports[name].basis, alone[kind].supports[name].basis, atol=1e-4)
    # One process writes the sketches of all.
    assert not (tmp_path / "1.safetensors").exists()
    one, other = (supports_from_sketches(tmp_path / f"{name}.safetensors") for name in ("0", "alone"))
    for name in one:
        np.testing.assert_allclose(one[name].basis, other[name].basis, atol=1e-4)
        np.testing.assert_allclose(other[name].basis, alone["single"].supports[name].basis, atol=1e-4)
