"""The runs: every method on the named tasks, tuned and then scored (`protocol.py`), one JSON line
each.

    python bench/quality/sweep.py --packed PACKED --tasks mrpc cola sst2 --out
    runs/understanding.jsonl --workers 10 --wave 3 --minutes 9

Runs that `--out` holds are skipped, so a sweep goes on where it was stopped. Each worker process
takes a *wave* of runs of one task and advances them in turn; the workers are spread over the
machine's cards. After `--minutes` no wave is begun; those in progress have `--grace` seconds to
end; what has finished is written.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import multiprocessing
import os
import queue
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from protocol import Cell, Spec, due, key, read_lines, to_line


def cells(packed: Path, tasks: list[str], names: list[str], steps: int | None) -> list[Cell]:
    """Every method on every task, with its rates at the rank that the task's model gives it."""
    from methods import FACTOR, METHODS, grid, shapes_of, targets
    from tasks import TASKS, base_model

    found, shapes = [], {}
    for name in names:
        method = METHODS[name]
        for task in (TASKS[each] for each in tasks):
            if task.model not in shapes:
                model = base_model(packed, task, 0, "cpu")
                shapes[task.model] = shapes_of(model, targets(task, model))
            if name == "head only" and not task.head:
                continue
            rates = tuple(method.rate(rate, shapes[task.model]) for rate in grid(method.middle))
            found.append(Cell(task.name, name, rates, FACTOR, steps or task.steps, method.rate_of))
    return found


def machine(device: str) -> dict[str, Any]:
    import torch

    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "matmul": "fp32" if device == "cpu" or torch.get_float32_matmul_precision() == "highest" else "tf32",
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "peft", "transformers")},
    }


def run_wave(specs: list[Spec], packed: Path, device: str) -> list[dict[str, Any]]:
    """The lines of several runs, advanced one step each in turn; a run that raises has an `error`
    and no score.
    """
    from train import Run

    lines: list[dict[str, Any]] = []
    running = []
    for spec in specs:
        try:
            running.append(Run(spec, packed, device))
        except Exception as error:
            lines.append(_failed(spec, error))
    while running:
        for run in list(running):
            try:
                run.step()
                if run.finished:
                    lines.append(asdict(run.spec) | run.result())
            except Exception as error:
                lines.append(_failed(run.spec, error))
                running.remove(run)
            else:
                if run.finished:
                    running.remove(run)
    return lines


def _failed(spec: Spec, error: Exception) -> dict[str, Any]:
    traceback.print_exception(error)
    return asdict(spec) | {"score": None, "error": f"{type(error).__name__}: {error}"[:500]}


def work(todo: Any, results: Any, packed: Path, device: str, threads: int, number: int) -> None:
    """A worker process: waves from `todo` until None, on card `number` modulo their count."""
    for pool in ("RAYON", "OMP", "OPENBLAS"):  # before anything is imported that reads them
        os.environ[f"{pool}_NUM_THREADS"] = str(threads)
    import torch

    if device == "cuda":
        torch.cuda.set_device(number % torch.cuda.device_count())

    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("high")
    about = machine(device)
    while (specs := todo.get()) is not None:
        for line in run_wave(specs, packed, device):
            results.put(line | about)
        results.put(None)  # the wave is over


def next_wave(waiting: list[Spec], taken: set[tuple], size: int) -> list[Spec]:
    """The first run that nobody has, and up to `size` - 1 more of the same task."""
    free = [spec for spec in waiting if key(spec) not in taken]
    return [spec for spec in free if spec.task == free[0].task][:size] if free else []


def sweep(arguments: argparse.Namespace, due: Callable[[list[dict[str, Any]]], list[Spec]]) -> None:
    """due: the runs that can start, by the lines written so far."""
    begun = time.monotonic()
    context = multiprocessing.get_context("spawn")
    todo, results = context.Queue(), context.Queue()
    options = (todo, results, arguments.packed, arguments.device, arguments.threads)
    workers = [context.Process(target=work, args=(*options, i), daemon=True) for i in range(arguments.workers)]
    for worker in workers:
        worker.start()
    lines = read_lines(arguments.out)
    text = "".join(map(to_line, lines))  # without a line that was cut off
    arguments.out.write_text(text)
    taken: set[tuple] = set()
    waves, written, last = 0, 0, begun
    end = begun + 60 * arguments.minutes
    with arguments.out.open("a") as file:
        while True:
            waiting = due(lines)
            while time.monotonic() < end and waves < arguments.workers:
                specs = next_wave(waiting, taken, arguments.wave)
                if not specs:
                    break
                taken |= set(map(key, specs))
                todo.put(specs)
                waves += 1
            if not waves or time.monotonic() > end + arguments.grace:
                break
            try:
                line = results.get(timeout=1)
            except queue.Empty:
                if not any(worker.is_alive() for worker in workers):
                    raise RuntimeError("every worker process has died") from None
                continue
            while True:  # all that has come
                if line is None:
                    waves -= 1
                else:
                    lines.append(line)
                    file.write(to_line(line))
                    file.flush()
                    written += 1
                try:
                    line = results.get_nowait()
                except queue.Empty:
                    break
            if time.monotonic() - last > 20:
                last = time.monotonic()
                print(f"{last - begun:.0f} s: {written} runs written, {len(due(lines))} known to be due", flush=True)
    for worker in workers:
        worker.terminate()
    left = len(due(lines))
    print(f"{written} runs written in {time.monotonic() - begun:.0f} s; {left} known to be due", end="; ")
    print_failed(lines)


def print_failed(lines: list[dict]) -> None:
    failed = [line for line in lines if line.get("error")]
    print(f"{len(failed)} failed")
    for line in failed[:10]:
        print(f"  {line['task']} {line['method']}: {line['error']}")


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """The options that every script of runs has."""
    from tasks import TASKS

    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packed", type=Path, required=True, help="as prepare.py wrote it")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", required=True, choices=list(TASKS))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--wave", type=int, default=1, help="runs a worker advances together")
    parser.add_argument("--threads", type=int, default=1, help="of a worker")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--grace", type=float, default=40.0)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    return parser


def main() -> None:
    from methods import METHODS

    parser = parser_of(__doc__)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--steps", type=int, help="in place of the tasks' own numbers; such runs are kept apart")
    given = parser.parse_args()
    plan = cells(given.packed, given.tasks, given.methods, given.steps)
    sweep(given, lambda lines: due(lines, plan))


if __name__ == "__main__":
    main()
