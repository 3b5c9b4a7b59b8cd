"""LoftCalibrationCallback: a budget shared out at the start of a Trainer's run, whose optimiser
goes on with the new parameters.
"""

from __future__ import annotations

import peft
import pytest
import torch
from reference import logits, make_bert, make_llama, own, token_batches, unchanged
from transformers import Trainer, TrainerCallback, TrainingArguments

import loft_rs
from loft_rs import Budget, LoftCalibrationCallback, LoftConfig, LoftNarrowCallback, LoftRefreshCallback
from loft_rs.tuner.adapters import adapted_layers

PARAMS = 300
RATE = 0.02


class Watch(TrainerCallback):
    """What every step trained: the learning rates it had, and how far it took each transform."""

    def __init__(self):
        self.rates, self.moves, self.before = [], [], {}

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.rates.append([group["lr"] for group in optimizer.param_groups])
        self.before = {name: theta.detach().clone() for name, theta in thetas(model).items()}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        now = {name: theta.detach() for name, theta in thetas(model).items()}
        self.moves.append({name: float((now[name] - theta).abs().max()) for name, theta in self.before.items()})


def thetas(model):
    return {name: own(layer).theta for name, layer in adapted_layers(model)[1].items()}


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def build(base=None, **options):
    config = {"target_modules": "all-linear", "support": "gradsvd", "r": Budget(params=PARAMS)} | options
    return peft.get_peft_model(base or make_llama(), LoftConfig(**config))


def trainer(output, model, *, optimiser=None, steps=6, callback=None, classes=False, **arguments):
    """(callback, watch, Trainer): 2 steps of linear warm-up, then down to nothing."""
    torch.manual_seed(0)
    callback, watch = callback or LoftCalibrationCallback(max_batches=2), Watch()
    arguments = {"save_strategy": "no", "max_grad_norm": 0.0, "learning_rate": RATE} | arguments
    arguments = TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=2,
        lr_scheduler_type="linear",
        warmup_steps=2,
        max_steps=steps,
        report_to=[],
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        **arguments,
    )
    batches = token_batches(20, size=1, classes=classes)
    data = [{"input_ids": b["input_ids"][0], "labels": b["labels"][0]} for b in batches]
    run = Trainer(model, arguments, train_dataset=data, optimizers=(optimiser, None), callbacks=[callback, watch])
    return callback, watch, run


def holds_exactly(optimiser, model):
    """Asserts that the optimiser has the model's trained parameters, by identity, each once."""
    held = [id(p) for group in optimiser.param_groups for p in group["params"]]
    assert sorted(held) == sorted(map(id, trained(model)))
    assert {id(p) for p in optimiser.state} <= set(held)


@pytest.mark.parametrize("given", [False, True], ids=["trainer's", "own optimiser"])
def test_every_calibrated_transform_is_trained_by_the_scheduled_optimiser(given, tmp_path):
    model, optimiser = build(), None
    built = thetas(model)
    parts = [{n for n in built if "mlp" in n}, {n for n in built if "mlp" not in n}]
    if given:
        groups = [{"params": [built[n] for n in part], "lr": RATE * k} for k, part in enumerate(parts, 1)]
        optimiser = torch.optim.AdamW(groups, weight_decay=0.0)
    callback, watch, run = trainer(tmp_path, model, optimiser=optimiser)
    run.train()
    report, found = callback.report, thetas(model)
    assert report.method == "gradsvd" and report.batches == 2 and report.supports.keys() == found.keys()
    ranks = {name: own(layer).rank for name, layer in adapted_layers(model)[1].items()}
    assert ranks == {name: support.rank for name, support in report.supports.items()} and len(set(ranks.values())) > 1
    assert all(found[n].numel() == r * (r - 1) // 2 for n, r in ranks.items())
    assert 2 * len(found) < sum(p.numel() for p in trained(model)) <= PARAMS
    assert all(theta.any() for theta in found.values())
    assert all(theta is not built[n] for n, theta in found.items() if ranks[n] > 2)
    holds_exactly(run.optimizer, model)
    # The scheduler's rates, and steps of Adam as long as they are: none at first, then up and down
    # again.
    shape = [0.0, 0.5, 1.0, 0.75, 0.5, 0.25]
    peaks = [RATE, 2 * RATE] if given else [RATE, RATE]
    for rates, moves, factor in zip(watch.rates, watch.moves, shape, strict=True):
        assert rates == pytest.approx([factor * peak for peak in peaks])
        for part, peak in zip(parts, peaks, strict=True):
            longest = max(moves[n] for n in part)
            assert 0.3 * factor * peak <= longest <= 1.1 * factor * peak
    if given:
        for group, part in zip(run.optimizer.param_groups, parts, strict=True):
            assert {id(p) for p in group["params"]} == {id(found[n]) for n in part}


@pytest.mark.parametrize("given", [False, True], ids=["trainer's", "own optimiser"])
def test_a_head_is_trained_beside_the_budget(given, tmp_path):
    model = build(make_bert(), target_modules=["query", "value", "dense"], task_type="SEQ_CLS")
    head = [p for n, p in model.named_parameters() if p.requires_grad and "loft_" not in n]
    before = [p.detach().clone() for p in head]
    optimiser = torch.optim.AdamW(trained(model), lr=RATE, weight_decay=0.0) if given else None
    callback = LoftCalibrationCallback(max_batches=2, head_steps=2)
    _, _, run = trainer(tmp_path, model, optimiser=optimiser, callback=callback, classes=True)
    run.train()
    assert len(head) == 2 and all(not torch.equal(a, b) for a, b in zip(before, head, strict=True))
    found = thetas(model)
    assert sum(theta.numel() for theta in found.values()) <= PARAMS and all(theta.any() for theta in found.values())
    assert any(theta.numel() > 1 for theta in found.values())
    holds_exactly(run.optimizer, model)


def test_gradient_accumulation_and_clipping_see_the_new_parameters(tmp_path):
    model = build()
    _, _, run = trainer(tmp_path, model, gradient_accumulation_steps=2, max_grad_norm=1e-3, steps=4)
    run.train()
    assert all(theta.any() for theta in thetas(model).values())
    holds_exactly(run.optimizer, model)


def test_a_saved_run_with_a_budget_loads_and_resumes(tmp_path):
    straight = build()
    run = trainer(tmp_path / "a", straight, save_strategy="steps", save_steps=3)[2]
    run.train()
    checkpoint = str(tmp_path / "a" / "checkpoint-3")
    model = peft.PeftModel.from_pretrained(make_llama(), checkpoint, is_trainable=True)
    callback, _, run = trainer(tmp_path / "b", model)
    run.train(resume_from_checkpoint=checkpoint)
    assert callback.report is None and run.state.global_step == 6
    holds_exactly(run.optimizer, model)
    assert float((logits(model) - logits(straight)).abs().max()) <= 1e-4
    loaded = peft.PeftModel.from_pretrained(make_llama(), str(tmp_path / "a" / "checkpoint-6"))
    assert torch.equal(logits(loaded), logits(straight))


@pytest.mark.parametrize("given", [False, True], ids=["trainer's", "own optimiser"])
def test_a_run_built_anew_resumes_with_the_ranks_that_were_shared_out(given, tmp_path):
    straight = build()
    run = trainer(tmp_path / "a", straight, save_strategy="steps", save_steps=3)[2]
    run.train()
    model, optimiser = build(), None
    if given:
        groups = [{"params": trained(model)}, {"params": []}]  # in groups as the Trainer's
        optimiser = torch.optim.AdamW(groups, lr=RATE, weight_decay=0.0)
    callback, _, run = trainer(tmp_path / "b", model, optimiser=optimiser)
    run.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert callback.report is None and run.state.global_step == 6
    holds_exactly(run.optimizer, model)
    assert float((logits(model) - logits(straight)).abs().max()) <= 1e-4


def test_a_calibrated_adapter_is_left_alone(tmp_path):
    model = build()
    loft_rs.calibrate(model, token_batches(2))
    held, state = thetas(model), {k: v.clone() for k, v in model.state_dict().items() if "loft_support" in k}
    callback, _, run = trainer(tmp_path, model, steps=3)
    run.train()
    assert callback.report is None
    assert all(theta is held[n] and theta.any() for n, theta in thetas(model).items())
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())
    holds_exactly(run.optimizer, model)


def test_a_failed_calibration_leaves_model_and_optimiser_as_they_were(tmp_path):
    model = build()
    before, held = {k: v.clone() for k, v in model.state_dict().items()}, [id(p) for p in trained(model)]
    callback, _, run = trainer(tmp_path, model, callback=LoftCalibrationCallback(max_batches=2, memory=1000))
    with pytest.raises(ValueError, match="memory"):
        run.train()
    assert callback.report is None and [id(p) for p in trained(model)] == held
    unchanged(model, before)
    holds_exactly(run.optimizer, model)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"max_batches": 0}, ValueError, "max_batches must be None or an integer of at least 1, got 0"),
        ({"max_batches": 2.0}, ValueError, "max_batches must be None or an integer of at least 1, got 2.0"),
        ({"max_batches": True}, ValueError, "max_batches must be None or an integer of at least 1, got True"),
        ({"head_steps": -1}, ValueError, "head_steps must be None or an integer of at least 0, got -1"),
        ({"memory": "many"}, ValueError, "memory"),
        ({"memory": 0}, ValueError, "memory"),
        ({"memory": 1.5}, (ValueError, TypeError), "memory"),
        ({"max_batchs": 2}, TypeError, "unexpected keyword argument 'max_batchs'"),
        ({"budget": Budget(params=PARAMS)}, TypeError, "unexpected keyword argument 'budget'"),
        ({"passes": 1}, TypeError, "unexpected keyword argument 'passes'"),
        ({"save_sketches": "sums"}, TypeError, "unexpected keyword argument 'save_sketches'"),
    ],
)
def test_bad_arguments_are_refused_when_the_callback_is_made(wrong, error, message):
    with pytest.raises(error, match=message):
        LoftCalibrationCallback(**wrong)


def test_arguments_are_named():
    with pytest.raises(TypeError, match="positional argument"):
        LoftCalibrationCallback(2)


def test_a_budget_under_ddp_is_refused_before_the_first_step(tmp_path, monkeypatch):
    from transformers.training_args import ParallelMode

    model = build()
    held = [id(p) for p in trained(model)]
    run = trainer(tmp_path, model)[2]
    monkeypatch.setattr(TrainingArguments, "parallel_mode", ParallelMode.DISTRIBUTED)
    with pytest.raises(ValueError, match="cannot be shared out under DistributedDataParallel"):
        run.callback_handler.on_train_begin(run.args, run.state, run.control)
    assert [id(p) for p in trained(model)] == held


def test_a_rate_far_below_the_suggested_one_is_warned_of(tmp_path):
    with pytest.warns(UserWarning, match=r"learning_rate=5e-05 is low .* loft_rs\.suggest_lr\(config\) gives 0\.016"):
        trainer(tmp_path, build(r=4), steps=3, learning_rate=5e-5)[2].train()


def test_the_other_callbacks_look_at_the_rate_too(tmp_path):
    for callback in (LoftNarrowCallback(2, 1), LoftRefreshCallback(2, 2)):
        model = build(r=4, support="principal")
        with pytest.warns(UserWarning, match=r"learning_rate=5e-05 is low"):
            trainer(tmp_path, model, callback=callback, steps=3, learning_rate=5e-5)[2].train()
