"""LoftNarrowCallback: narrowing inside a Trainer, resuming before and after it, the best model."""

from __future__ import annotations

import json
import warnings

import peft
import pytest
import torch
from narrowed import layers_of
from reference import adam, logits, make_llama, train
from refreshed import apart, build, same, snapshot, trainer

import loft_rs
from loft_rs import NarrowReport, narrow


def narrowing(output, rank=4, step=3, *, model=None, optimiser=None, **arguments):
    """(model of rank 8, callback, Trainer of 6 steps that saves after each)."""
    callback = loft_rs.LoftNarrowCallback(rank, step)
    arguments = {"save_steps": 1} | arguments
    steps = arguments.pop("steps", 6)
    model = model or build(r=8)
    return trainer(output, model=model, callback=callback, steps=steps, optimiser=optimiser, arguments=arguments)


def ranks_of(model):
    return {layer.adapters["default"].rank for layer in layers_of(model).values()}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """(folder, model, report) of a run narrowed after step 3 of 6."""
    folder = tmp_path_factory.mktemp("straight")
    torch.manual_seed(0)
    model, callback, run = narrowing(folder)
    run.train()
    return folder, model, callback.report


def test_the_callback_narrows_once_and_training_goes_on(straight):
    folder, model, report = straight
    assert isinstance(report, NarrowReport) and report.rank == 4 and len(report.kept) == 14 and ranks_of(model) == {4}
    wide, narrow_ = (
        peft.PeftModel.from_pretrained(make_llama(), str(folder / f"checkpoint-{step}")) for step in (2, 3)
    )
    assert ranks_of(wide) == {8} and ranks_of(narrow_) == {4}
    assert not any(layer.adapters["default"].theta.any() for layer in layers_of(narrow_).values())
    assert all(layer.adapters["default"].theta.any() for layer in layers_of(model).values())
    assert apart(logits(model), logits(narrow_)) > 1e-4


@pytest.mark.parametrize("own", [False, True], ids=["trainer's", "own optimiser"])
@pytest.mark.parametrize("step", [2, 3, 5])
def test_a_run_resumes_before_at_and_after_the_narrowing(straight, step, own, tmp_path):
    folder, wanted, _ = straight
    model, optimiser = build(r=8), None
    if own:  # in groups as the Trainer's
        groups = [{"params": [p for p in model.parameters() if p.requires_grad]}, {"params": []}]
        optimiser = torch.optim.AdamW(groups, lr=0.02, weight_decay=0.0)
    _, callback, run = narrowing(tmp_path, model=model, optimiser=optimiser)
    run.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    assert (callback.report is not None) == (step == 2) and ranks_of(model) == {4}
    trained = {id(layer.adapters["default"].theta) for layer in layers_of(model).values()}
    assert {id(p) for group in run.optimizer.param_groups for p in group["params"]} == trained
    assert model.state_dict().keys() == wanted.state_dict().keys()
    assert apart(logits(model), logits(wanted)) <= 1e-4
    saved = json.loads((tmp_path / "checkpoint-6" / "adapter_config.json").read_text())
    assert set(saved["rank_pattern"].values()) == {4} and len(saved["frozen_ranks"]) == 14


def test_a_narrowed_checkpoint_without_the_callback_says_what_to_do(straight, tmp_path):
    folder, wanted, _ = straight
    model = build(r=8)
    before = snapshot(model)
    run = trainer(tmp_path / "a", model=model, steps=6)[2]
    with pytest.raises(
        ValueError, match=r"rank is 4 there, not 8, as after loft_rs\.narrow: build the model with .*from_pretrained"
    ):
        run.train(resume_from_checkpoint=str(folder / "checkpoint-5"))
    assert same(snapshot(model), before) and ranks_of(model) == {8}
    for step, callback in enumerate((loft_rs.LoftNarrowCallback(4, 3), None), 4):
        checkpoint = str(folder / f"checkpoint-{step}")
        model = peft.PeftModel.from_pretrained(make_llama(), checkpoint, is_trainable=True)
        run = trainer(tmp_path / f"{step}", model=model, callback=callback, steps=6, every=50)[2]
        run.train(resume_from_checkpoint=checkpoint)
        assert ranks_of(model) == {4} and apart(logits(model), logits(wanted)) <= 1e-4


def test_the_best_model_may_be_from_before_the_narrowing(tmp_path):
    better = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "greater_is_better": False}
    model, callback, run = narrowing(tmp_path, step=2, steps=3, metric_for_best_model="worse", **better)
    kept = run.evaluate
    run.evaluate = lambda *args, **kwargs: kept(*args, **kwargs) | {"eval_worse": run.state.global_step}
    run.train()
    assert callback.report is not None and ranks_of(model) == {8}
    best = peft.PeftModel.from_pretrained(make_llama(), str(tmp_path / "checkpoint-1"))
    assert torch.equal(logits(model), logits(best)) and not model.peft_config["default"].frozen_ranks
    assert model.peft_config["default"].rank_pattern == {}


def test_the_callback_refuses_what_cannot_be(straight, tmp_path, monkeypatch):
    for rank, step, message in (
        (3, 5, "rank must be an even integer of at least 2, got 3"),
        (4, 0, "step must be an integer of at least 1, got 0"),
        (4, True, "step must be an integer"),
    ):
        with pytest.raises(ValueError, match=message):
            loft_rs.LoftNarrowCallback(rank, step)
    with pytest.raises(TypeError, match="unexpected keyword argument 'moments'"):
        loft_rs.LoftNarrowCallback(4, 5, moments="restart")
    with pytest.raises(TypeError, match="positional arguments"):
        loft_rs.LoftNarrowCallback(4, 5, "default")
    folder = straight[0]
    for number, (rank, step, resumed, message) in enumerate(
        (
            (8, 3, None, "nothing to narrow at step 3: no layer of adapter .default. is wider than 8"),
            (4, 6, None, "step must come before the last of 6 steps, got 6"),
            (
                4,
                2,
                2,
                "step 2 has passed, since the checkpoint is of step 2, but its adapter was not narrowed to rank 4",
            ),
        )
    ):
        model, _, run = narrowing(tmp_path / f"{number}", rank, step)
        with pytest.raises(ValueError, match=message):
            run.train(resume_from_checkpoint=resumed and str(folder / f"checkpoint-{resumed}"))
        assert ranks_of(model) == {8}
    from transformers.training_args import ParallelMode, TrainingArguments

    _, _, run = narrowing(tmp_path / "ddp")
    monkeypatch.setattr(TrainingArguments, "parallel_mode", ParallelMode.DISTRIBUTED)
    with pytest.raises(ValueError, match="cannot run under DistributedDataParallel"):
        run.callback_handler.on_train_begin(run.args, run.state, run.control)


def test_an_optimiser_that_was_not_given_warns_at_its_next_step():
    model, optimiser, other = build(r=8), None, torch.nn.Linear(2, 2)
    optimiser = train(model)
    narrow(model, 4)
    elsewhere = torch.optim.SGD(other.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        elsewhere.step()
        train(model, adam(model))
    with pytest.warns(UserWarning, match=r"parameters which loft_rs\.narrow has replaced"):
        optimiser.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimiser.step()  # once
