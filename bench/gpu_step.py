"""One training step of LOFT beside the frozen base and PEFT's methods, on one CUDA device, in one
run.

    8b            four Llama-3.1-8B-shaped layers, 8192 tokens, bf16, all seven linears
    8b-slow       the same for BOFT and HRA, whose steps take seconds
    encoder       MiniLM-sized BERT (6 layers, 384 wide), batch 32 x 128, all linears, bf16;  encoder-fp32: in float32
    vit           ViT-B/16, 64 images of 224 x 224, all linears, bf16

A step is forward, backward, fused AdamW and zero_grad; random weights, no dropout, SDPA attention,
its time from CUDA events in a queue that never runs dry. A card's clock drifts, so the frozen base
(and LoRA, for the small models) is measured again in every round beside each method, in alternating
order, and a ratio is the median over the rounds of the ratio inside one round. Activation memory is
the peak during a step minus what is held before it; `held` is what model, adapter and optimiser
keep between steps.

`--out FILE` keeps the rows as JSON, rewritten whole after each; other sections in it, and other
methods of this section, stay. `--show` prints the tables of such a file and measures nothing.
`--device cpu --tiny` tries the script without a card.
"""

from __future__ import annotations

import argparse
import json
import re
import time
import warnings
from pathlib import Path
from statistics import median
from typing import Any

import torch
from blocks.steps import STEP
from common import Report, describe, print_table
from gpu_workloads import (
    BASE,
    BOFT,
    HRA,
    OFT,
    RECOVERED,
    REENTRANT,
    Card,
    Method,
    Step,
    Workload,
    loft,
    lofts,
    loras,
    psoft,
)

SECTIONS = ("8b", "8b-slow", "encoder", "encoder-fp32", "vit")
WARM_UP = 4
SECONDS = 8.0  # a candidate's steps are cut down to about so many, but never below two a round


class Rows(Report):
    """A report that measures some of a section's methods anew and leaves its other rows."""

    def reopen(self, section: str, methods: list[Method]) -> None:
        again = {method.name for method in methods}
        kept = [row for row in self.sections.get(section, {}).get("rows", []) if row["method"] not in again]
        self.open(section)
        self.rows.extend(kept)


def chosen(section: str, ranks: list[int], mode: str) -> list[Method]:
    """The rows of a section; other than eager, without the methods whose own code is not meant for
    it.
    """
    precision = "fp32" if section.endswith("fp32") else "bf16"
    slow = [BOFT, HRA]
    if section == "8b-slow":
        return slow
    methods = [BASE]
    for rank in ranks:
        methods += [*lofts(rank), *loras(rank, precision), psoft(rank, neumann=False)]
        methods += [psoft(rank, neumann=True)] if mode == "eager" else []
    methods += [OFT, *RECOVERED]
    return methods if section == "8b" or mode != "eager" else methods + slow


def references(section: str, method: Method, ranks: list[int]) -> dict[str, Method]:
    """What every round measures beside the method: name of the ratio -> method."""
    found = {"over_base": BASE}
    if section in ("encoder", "encoder-fp32", "vit"):
        near = method.rank if method.rank in ranks else 64
        for each in loras(near, "fp32" if section == "encoder-fp32" else "bf16"):
            found[f"over_lora_{'bf16' if each.half else 'fp32'}"] = each
    return found


class Bench:
    """Measures the methods of one section."""

    def __init__(self, section: str, arguments: argparse.Namespace):
        name = section.partition("-")[0]
        precision = "fp32" if section.endswith("fp32") else "bf16"
        self.section, self.arguments = section, arguments
        self.workload = Workload(name, precision, arguments.device, arguments.layers, arguments.tokens, arguments.tiny)
        self.card = Card(arguments.device)
        self.options = {"mode": arguments.mode, "checkpointing": arguments.checkpointing}
        self.kept: dict[str, Step] = {}

    def row(self, method: Method) -> dict[str, Any]:
        if self.options["mode"] == "compiled":
            # Every method starts with an empty cache, so that none lives off another's share of the
            # recompile limit.
            torch._dynamo.reset()
            self.kept.clear()
        self.card.clear()
        before = self.card.held()
        step = Step(self.workload, method, **self.options)
        row: dict[str, Any] = {"trained": sum(p.numel() for p in step.trained)}
        row |= self._warm(step)
        if before is not None:
            self.card.clear()
            row["held_gib"] = (self.card.held() - before) / 2**30
        candidates = {name: self._reference(each) for name, each in self._references(method).items()}
        base = candidates["over_base"]
        for name, each in {"activations_gib": step, "base_activations_gib": base}.items():
            peak = None if step.mode == "captured" else self.card.peak(each.run)  # a graph holds its own for good
            row[name] = None if peak is None else peak / 2**30
        if row["activations_gib"] is not None:
            row["activations_over_base"] = row["activations_gib"] / row["base_activations_gib"]
        calls = {name: each.run for name, each in candidates.items()} | {"ms": step.run}
        if step.mode != "eager":
            calls["over_eager"] = lambda: step.run(eager=True)
        graphs = _graphs()
        row |= self._interleave(calls)
        if step.mode == "compiled":
            row["graphs_while_timed"] = _graphs() - graphs
        if step.notes:
            row["note"] = " ".join(step.notes)
        return row

    def _references(self, method: Method) -> dict[str, Method]:
        found = references(self.section, method, self.arguments.ranks)
        wanted = self.arguments.references
        return {name: each for name, each in found.items() if each is BASE or re.search(wanted, each.name)}

    def _reference(self, method: Method) -> Step:
        if method.name not in self.kept:
            # Two at most are needed beside the base; those of the rank before go.
            self.kept = {name: step for name, step in self.kept.items() if len(self.kept) < 3 or name == BASE.name}
            self.card.clear()
            step = self.kept[method.name] = Step(self.workload, method, **self.options)
            self._warm(step)
        return self.kept[method.name]

    def _warm(self, step: Step) -> dict[str, Any]:
        """The first steps; for a compiled one what Dynamo counts: graphs, graph breaks and why,
        whether the recompile limit was reached.
        """
        if step.mode != "compiled":
            for _ in range(WARM_UP):
                step.run()
            return {}
        from torch._dynamo.exc import FailOnRecompileLimitHit
        from torch._dynamo.utils import counters

        counters.clear()
        begun, found = time.perf_counter(), {}
        try:
            with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
                step.run()
                step.run()
        except FailOnRecompileLimitHit as error:
            found["recompile_limit"] = describe(error)
            torch._dynamo.reset()
            self.kept.clear()
            counters.clear()
            step.run()
        found["compile_s"] = time.perf_counter() - begun
        for _ in range(WARM_UP):
            step.run()
        reasons = counters["graph_break"]
        found |= {"graphs": _graphs(), "graph_breaks": sum(reasons.values())}
        if reasons:
            found["why"] = "; ".join(
                (str(reason).splitlines() or ["?"])[0][:100] for reason, _ in reasons.most_common(3)
            )
        return found

    def _interleave(self, calls: dict[str, Any]) -> dict[str, Any]:
        """Rounds of all candidates: the method's median time, and its ratio to each reference, from
        within the rounds.
        """
        repeats, rounds = self.arguments.repeats, self.arguments.rounds
        times: dict[str, list[list[float]]] = {name: [] for name in calls}
        counts = {
            name: max(2, min(repeats, int(1e3 * SECONDS / rounds / self.card.times(call, 1)[0])))
            for name, call in calls.items()
        }
        for index in range(rounds):
            for name in list(calls)[:: -1 if index % 2 else 1]:
                times[name].append(self.card.times(calls[name], counts[name]))
        own = [median(each) for each in times["ms"]]
        row: dict[str, Any] = {"ms": median(t for each in times["ms"] for t in each)}
        for name in calls:
            if name != "ms":
                other = [median(each) for each in times[name]]
                ratios = [a / b for a, b in zip(own, other, strict=True)]
                row[name] = median(ratios)
                row[f"{name}_ms"] = median(t for each in times[name] for t in each)
                row[f"{name}_rounds"] = [round(ratio, 4) for ratio in ratios]
        return row | {"steps": sum(map(len, times["ms"]))}


def _graphs() -> int:
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def table(section: str, rows: list[dict[str, Any]]) -> None:
    print_table(section, rows, STEP | {"steps": ("steps", "{}")})


def aims(sections: dict[str, Any]) -> list[str]:
    """What was aimed at and what was measured, of every aim whose rows are there."""
    held = {
        (section, row["method"]): row
        for section, part in sections.items()
        if isinstance(part, dict) and "complete" in part
        for row in part["rows"]
    }
    lines = []

    def check(section: str, method: Method, key: str, limit: float, what: str) -> None:
        got = held.get((section, method.name), {}).get(key)
        if got is not None:
            lines.append(
                f"{'met   ' if got <= limit else 'MISSED'} {section}, {method.name}: {what} {got:.4g}, aim {limit:g}"
            )

    untied, tied = loft(64), Method("LOFT tied r64")
    for method, limit in ((untied, 1.05), (tied, 1.03)):
        check("8b", method, "over_base", limit, "step over the frozen base's")
        check("8b", method, "activations_over_base", 1.01, "activations over the frozen base's")
    for section in ("encoder", "encoder-fp32"):
        for key in ("over_lora_bf16", "over_lora_fp32"):
            for method in (untied, tied):
                check(section, method, key, 0.95, f"step {key.replace('_', ' ')} adapters")
    for section in {section for section, _ in held if " compiled" in section or " captured" in section}:
        for method in (untied, tied):
            check(section, method, "over_eager", 1.0, "step over eager")
            check(section, method, "graph_breaks", 0, "graph breaks")
    for prefix in ("LOFT", "LOFT tied"):
        high, low = (held.get(("8b", f"{prefix} r{rank}"), {}).get("over_base") for rank in (256, 64))
        if high and low:
            got = high / low
            lines.append(
                f"{'met   ' if got <= 1.06 else 'MISSED'} 8b, {prefix}: r=256 step over r=64 {got:.4g}, aim 1.06"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument(
        "--methods", default="", help="regular expression of the methods to measure, such as 'LOFT|base'"
    )
    parser.add_argument(
        "--references", default="", help="regular expression of the methods to measure beside each, such as 'bf16'"
    )
    mode = parser.add_mutually_exclusive_group()
    for name, how in (("compiled", "under torch.compile"), ("captured", "as one CUDA graph")):
        text = f"the step {how}, with the eager one beside it"
        mode.add_argument(f"--{name}", dest="mode", action="store_const", const=name, default="eager", help=text)
    parser.add_argument("--checkpointing", choices=list(REENTRANT), nargs="?", const="non-reentrant")
    parser.add_argument("--repeats", type=int, default=8, help="steps a round")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=8192, help="of the 8b sections")
    parser.add_argument("--layers", type=int, help="default: 4 (8b), 6 (encoder), 12 (vit)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to try the script")
    parser.add_argument("--out", type=Path, default=Path("gpu_step.json"))
    parser.add_argument("--show", action="store_true", help="measure nothing: the tables of the rows in --out")
    arguments = parser.parse_args()
    if arguments.show:
        sections = json.loads(arguments.out.read_text())
        for section, part in sections.items():
            if "rows" in part:
                table(section, part["rows"])
        print("\n" + "\n".join(aims(sections)))
        return
    warnings.simplefilter("ignore")
    machine = Card(arguments.device).describe()
    report = Rows(arguments.out, machine)
    for name in arguments.only:
        section = name if arguments.mode == "eager" else f"{name} {arguments.mode}"
        section += f" checkpointing {arguments.checkpointing}" if arguments.checkpointing else ""
        methods = [m for m in chosen(name, arguments.ranks, arguments.mode) if re.search(arguments.methods, m.name)]
        if not methods:
            continue
        bench = Bench(name, arguments)
        report.reopen(section, methods)
        for method in methods:
            key = {"method": method.name, "device": machine["device"], "date": machine["date"]}
            try:
                found = bench.row(method)
            except Exception as error:
                found = {"error": describe(error)}
            report.add(**key, **found)
            bench.card.clear()
        report.close(section)
        table(f"{section}, {machine['device']}, torch {machine['torch']}, peft {machine['peft']}", report.rows)
    print("\n" + "\n".join(aims(report.sections)))


if __name__ == "__main__":
    main()
