"""The demo from end to end: pairs, calibration, training, measurement, reload, LoRA export, one
table.

Every method sees the same batches in the same order, for as many steps in all, those of a pilot
among them. All files go to one folder, which appears only
when the run is complete.
"""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from .._files import whole_directory
from .._words import count
from ..calibration.report import CalibrationReport
from . import data, methods, page, report
from .check import Probe
from .encoder import TokenPairs, load_encoder, load_tokenizer, model_directory
from .methods import Method
from .progress import Progress
from .report import Row
from .train import Answers, answer, batch_plan, calibration_steps, pilot_step, train

CALIBRATION_BATCHES = 4


@dataclass(frozen=True)
class Options:
    """The command line of `loft-rs demo`."""

    out: Path = Path("loft-demo")
    data: Path | None = None
    model: Path | None = None
    support: str = methods.KEPT
    rank: int = 64
    steps: int = 45
    compare: tuple[str, ...] = ()
    seed: int = 0
    threads: int | None = None

    def check(self) -> list[Method]:
        """The methods to run, or an error before any work."""
        for name, smallest in (("rank", 2), ("steps", 1), ("seed", 0), ("threads", 1)):
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise ValueError(f"--{name} must be at least {smallest}, not {value}")
        return methods.chosen(self.support, self.rank, list(self.compare))


@dataclass
class Setting:
    """What all methods share. steps: of each in all, those of a pilot among them."""

    base: Path
    train_on: TokenPairs
    held_out: TokenPairs
    plan: list[list[int]]
    steps: int
    probe: Probe
    folder: Path
    seed: int
    progress: Progress


@dataclass
class Outcome:
    """One method's row so far, its answers, and its output on the probe."""

    row: Row
    answers: Answers
    output: Tensor


def run(options: Options) -> list[Row]:
    """Run the demo; returns the table's rows."""
    from transformers.utils import logging

    chosen = options.check()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    progress = Progress()
    progress.say(f"reading pairs from {options.data or 'the docstrings of installed code'}")
    base = model_directory(options.model)
    tokenizer = load_tokenizer(base)
    pairs = data.read_pairs(options.data) if options.data else data.installed_pairs()
    split = data.split_pairs(pairs, options.seed)
    progress.say(
        f"{len(split.train)} pairs to train on, {len(split.held_out)} held out, from {options.data or 'installed code'}"
    )
    train_on, held_out = TokenPairs(tokenizer, split.train), TokenPairs(tokenizer, split.held_out)
    with whole_directory(options.out) as folder:
        setting = Setting(
            base=base,
            train_on=train_on,
            held_out=held_out,
            plan=batch_plan(train_on, options.steps + chosen[0].pilot_steps, options.seed),
            steps=options.steps + chosen[0].pilot_steps,
            probe=Probe(held_out, base),
            folder=folder,
            seed=options.seed,
            progress=progress,
        )
        progress.say("answering the held-out queries with the model as it is")
        before = answer(load_encoder(base), held_out, progress.tick)
        progress.say(f"zero-shot: recall@1 {before.scores.recall_at_1:.3f}, MRR {before.scores.mrr:.3f}")
        outcomes = {method.name: _measure(method, setting) for method in chosen}
        rows = [Row("zero-shot", *before.scores), *_with_exports(outcomes, setting)]
        shown = report.examples(split.held_out, before, outcomes[options.support].answers, chosen[0].label)
        seconds = time.perf_counter() - progress.begun
        facts = _facts(options, split, seconds)
        told = [
            report.table(rows),
            report.checks(rows),
            report.verdict(rows, len(split.held_out)),
            shown,
        ]
        told.append(report.next_steps(options.out, options.support, base, rows[1].rank))
        report.write(folder, rows, facts, told)
        page.write(folder / "report.html", rows, facts, told)
    print("\n" + "\n\n".join(told))
    print(f"\nEverything is in {options.out.resolve()}; open report.html there ({seconds:.0f} s in all)")
    return rows


def _measure(method: Method, setting: Setting) -> Outcome:
    """Calibrate, train, evaluate, save, reload and export one method."""
    torch.manual_seed(setting.seed)
    model = method.adapt(load_encoder(setting.base))
    calibration = _calibrate(method, model, setting)
    plan = setting.plan[: max(1, setting.steps - method.pilot_steps)]
    on_step = setting.progress.steps(method.label, len(plan))
    per_step = train(model, setting.train_on, plan, method.learning_rate, on_step)
    setting.progress.say(f"{method.label}: answering the held-out queries")
    answers = answer(model, setting.held_out, setting.progress.tick)
    setting.progress.say(f"{method.label}: saving, reloading, exporting")
    output = setting.probe.output(model)
    adapter = setting.folder / method.name
    model.save_pretrained(str(adapter))  # type: ignore[operator]
    row = Row(
        method.label,
        *answers.scores,
        rank=method.rank,
        steps=f"{method.pilot_steps} + {len(plan)}" if method.pilot_steps else str(len(plan)),
        trained=sum(each.numel() for each in model.parameters() if each.requires_grad),
        seconds_per_step=per_step,
        calibration_seconds=calibration.seconds if calibration else None,
        orthogonality_error=_export(method, model, setting),
        reload_difference=setting.probe.reload_difference(output, adapter),
        learning_rate=method.learning_rate,
    )
    (adapter / "README.md").write_text(report.card(row, setting.base), encoding="utf-8")  # for PEFT's empty form
    setting.progress.say(f"{method.label}: recall@1 {row.recall_at_1:.3f}, MRR {row.mrr:.3f}")
    return Outcome(row, answers, output)


def _calibrate(method: Method, model: nn.Module, setting: Setting) -> CalibrationReport | None:
    batches, tick = setting.plan[:CALIBRATION_BATCHES], setting.progress.tick
    forward, backward = calibration_steps(model, setting.train_on, batches, tick)
    if method.pilot_steps:
        backward = pilot_step(model, setting.train_on, setting.plan, tick)
    if method.is_loft:
        setting.progress.say(f"{method.label}: calibrating")
    found = method.calibrate(model, forward, backward)
    if found is None:
        return None
    how = f"by a pilot of {count(found.pilot.steps, 'step')}" if found.pilot else f"in {count(found.passes, 'pass')}"
    setting.progress.say(f"{method.label}: calibrated {how}, {found.seconds:.1f} s")
    return found


def _export(method: Method, model: nn.Module, setting: Setting) -> float | None:
    """Write the exact LoRA form; returns the orthogonality error. LoRA itself has neither."""
    if not method.is_loft:
        return None
    from .. import export_lora, orthogonality_error

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the LoRA has rank")  # a server's limit, and nothing is served here
        export_lora(model, setting.folder / f"{method.name}-as-lora")
    return orthogonality_error(model)


def _with_exports(outcomes: dict[str, Outcome], setting: Setting) -> list[Row]:
    """The rows, with each LoRA export's difference measured in one other process."""
    setting.progress.say("loading the exported LoRAs in stock PEFT, in a process without loft_rs")
    exports = {name: setting.folder / f"{name}-as-lora" for name in outcomes if name != methods.LORA}
    differences = setting.probe.export_differences(
        {name: each.output for name, each in outcomes.items()}, exports, setting.progress.tick
    )
    return [replace(each.row, lora_export_difference=differences.get(name)) for name, each in outcomes.items()]


def _facts(options: Options, split: data.Split, seconds: float) -> dict:
    return {
        "model": str(options.model or "all-MiniLM-L6-v2"),
        "data": str(options.data or "installed code"),
        "pairs": {"train": len(split.train), "held_out": len(split.held_out)},
        "rank": options.rank,
        "steps": options.steps,
        "seed": options.seed,
        "threads": torch.get_num_threads(),
        "seconds": round(seconds, 1),
    }
