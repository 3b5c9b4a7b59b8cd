"""Blocks of bench/GPU.md and of the pages that speak of a step: training steps, decoded tokens,
kernels, a fine-tune.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from .sources import Rows, lines, one, rows, sections
from .text import method_table, short, table, tiny

# field of a row -> (heading, format), for the tables of gpu_step.py too
STEP = {
    "ms": ("ms a step", "{:.2f}"),
    "over_base": ("over the base", "{:.3f}"),
    "over_lora_bf16": ("over LoRA bf16", "{:.3f}"),
    "over_lora_fp32": ("over LoRA fp32", "{:.3f}"),
    "over_eager": ("over eager", "{:.3f}"),
    "graph_breaks": ("graph breaks", "{}"),
    "activations_gib": ("activations GiB", "{:.3f}"),
    "activations_over_base": ("over the base", "{:.3f}"),
    "held_gib": ("held GiB", "{:.3f}"),
    "trained": ("trained", "{:,}"),
}
ONE_FACTOR = "one factor ran"  # PEFT's own warning is longer
LORA = {"bf16": "LoRA r64 bf16 adapters", "fp32": "LoRA r64 fp32 adapters"}
MARKS = (10, 100, 200, 300, 400, 500)  # steps of the fine-tune whose loss is shown


def step_table(found: Rows) -> str:
    """Steps of one section or several, every column that has a value; the frozen base first."""
    found = sorted(found, key=lambda row: row["method"] != "frozen base")
    return method_table([row | {"note": ONE_FACTOR} if row.get("note") else row for row in found], STEP)


def steps(*names: str) -> str:
    return step_table([row for name in names for row in rows("gpu_step_h100", name)])


def now() -> str:
    """What was measured on the H200 since values belong to a pass, beside the code before: on the
    same card where that was kept.
    """
    before = {name: part["rows"] for name, part in sections("gpu_step_h100").items()}
    same = one(rows("gpu_step_h200", "8b, the code before"), method="LOFT r64")
    asked: tuple[tuple[str, str, str, dict[str, Any] | None, str], ...] = (
        ("8B, eager, over the base", "8b", "over_base", same, "H200"),
        ("8B, eager, activations over the base", "8b", "activations_over_base", same, "H200"),
        ("encoder, eager, over LoRA bf16", "encoder", "over_lora_bf16", None, ""),
        ("encoder, eager, over LoRA fp32", "encoder", "over_lora_fp32", None, ""),
        ("ViT, eager, over LoRA bf16", "vit", "over_lora_bf16", None, ""),
        ("encoder, compiled, over LoRA bf16", "encoder compiled", "over_lora_bf16", {}, "H100"),
        ("encoder, compiled over eager", "encoder compiled", "over_eager", {}, "H100"),
        ("ViT, compiled, over LoRA bf16", "vit compiled", "over_lora_bf16", None, ""),
        ("8B, compiled, over the base", "8b compiled", "over_base", {}, "H100"),
        ("8B, compiled over eager", "8b compiled", "over_eager", {}, "H100"),
        ("8B, compiled, activations over the base", "8b compiled", "activations_over_base", {}, "H100"),
    )
    cells = []
    for name, section, key, old, card in asked:
        if old == {}:
            old = one(before[section], method="LOFT r64")
        here = one(rows("gpu_step_h200", section), method="LOFT r64")[key]
        cells.append([name, f"{old[key]:.3f}" if old else "", card, f"{here:.3f}"])
    return table(["step", "before", "card before", "now"], cells)


def plain(method: str) -> str:
    """A method's name without the rank that all rows share."""
    return method.replace(" r64", "").replace("LoRA bf16", "LoRA, bf16").replace("LoRA fp32", "LoRA, fp32")


def decode(*named: tuple[str, str]) -> str:
    """Milliseconds a token by method, two columns for every (heading, section)."""
    first = rows("gpu_decode_h200", named[0][1])
    head = ["method", *(cell for name, _ in named for cell in (name, "over LoRA bf16"))]
    cells = []
    for row in first:
        mine = [one(rows("gpu_decode_h200", section), method=row["method"]) for _, section in named]
        cells.append(
            [plain(row["method"]), *(c for m in mine for c in (f"{m['ms']:.2f}", f"{m['over_lora_bf16']:.2f}"))]
        )
    return table(head, cells)


def profile() -> str:
    """Microseconds a step by group of kernels."""
    mine = sections("gpu_profile_h100")["methods"]["LOFT r64"]
    named = [*mine["groups"].items(), ("all kernels", mine["kernels_us"])]
    cells = [[name, f"{ours:,.0f}", f"{max(base, 0):,.0f}", f"{ours - base:+,.0f}"] for name, (ours, base) in named]
    return table(["group", "LOFT", "frozen base", "difference"], cells)


def finetune(kind: str) -> str:
    """The fine-tune: the loss at some steps, or how each run ended."""
    found = lines("results/gpu_finetune_h100.jsonl")
    ends = [line for line in found if line.get("summary") and line["run"] == 1]
    if kind == "loss":
        curve = {
            (line["method"], line["step"]): line["loss"] for line in found if line.get("run") == 0 and "step" in line
        }
        cells = [[end["method"], *(short(curve[end["method"], step]) for step in MARKS)] for end in ends]
        return table(["method", *(f"step {step}" for step in MARKS)], cells)
    cells = [
        [end["method"], short(end["last_loss"]), short(end["accuracy"]), tiny(end["largest_orthogonality_error"]),
         f"{end['trained']:,}", "yes" if end["same_weights_as_first"] else "no"]
        for end in ends
    ]  # fmt: skip
    head = ["method", "last fifty steps", "accuracy", "largest norm of T^T T - I", "trained", "same seed, same bits"]
    return table(head, cells)


def cost(name: str, sections_: tuple[str, ...], methods: tuple[str, ...] = ()) -> str:
    """Four columns of a step: ms, over the base, activations over the base, trained; of some
    methods or of all.
    """
    found = [row for each in sections_ for row in rows(name, each) if not methods or row["method"] in methods]
    cells = [
        [row["method"].replace("|", "/") + (f" ({ONE_FACTOR})" if row.get("note") else ""), f"{row['ms']:.1f}",
         f"{row['over_base']:.2f}", f"{row['activations_over_base']:.3f}" if row.get("activations_over_base") else "",
         f"{row['trained']:,}"]
        for row in found
    ]  # fmt: skip
    head = ["method", "ms a step", "step over frozen", "activations over frozen", "trained"]
    if not any(row[3] for row in cells):
        head, cells = head[:3] + head[4:], [row[:3] + row[4:] for row in cells]
    return table(head, cells)


def small() -> str:
    """Small models in eager mode and as a CUDA graph, over LoRA."""
    cells = []
    for model, name in (("MiniLM-sized encoder", "encoder"), ("ViT-B/16", "vit")):
        for way, section in (("from Python", name), ("as a CUDA graph", f"{name} captured")):
            row = one(rows("gpu_step_h100", section), method="LOFT r64")
            cells.append(
                [model, way, f"{row['ms']:.1f}", f"{row['over_lora_bf16']:.2f}", f"{row['over_lora_fp32']:.2f}"]
            )
    return table(["model", "launched", "LOFT, ms a step", "over LoRA bf16", "over LoRA fp32"], cells, left=2)


def headline() -> str:
    """LOFT beside LoRA with adapters of both precisions, r = 64, four 8B-shaped layers."""
    named = {"LOFT r64": "LOFT r=64", LORA["bf16"]: "LoRA r=64, bf16", LORA["fp32"]: "LoRA r=64, fp32"}
    cells = []
    for method, name in named.items():
        row = one(rows("gpu_step_h100", "8b"), method=method)
        cells.append([name, f"{row['over_base']:.2f}", f"{row['activations_over_base']:.3f}", f"{row['trained']:,}"])
    return table(["method", "step over frozen", "activations over frozen", "trained numbers"], cells)


ORIGINALS = {"PSOFT": "PSOFT r64 exact", "OFT": "OFT b32", "BOFT": "BOFT b8 m2", "HRA": "HRA r8"}
OURS = {"PSOFT": "LOFT as PSOFT r64", "OFT": "LOFT as OFT b32", "BOFT": "LOFT as BOFT b8 m1", "HRA": "LOFT as HRA r8"}


def others() -> str:
    """PEFT's own OFT, BOFT, HRA and PSOFT beside the same methods here."""
    found = rows("gpu_step_h100", "8b") + rows("gpu_step_h100", "8b-slow")
    cells = []
    for name, original in ORIGINALS.items():
        theirs, ours = one(found, method=original), one(found, method=OURS[name])
        setting = " ".join(original.split()[1:]).replace("m2", "m1")
        cells.append([f"{name} {setting}", *(f"{row[key]:.2f}" for key in ("over_base", "activations_over_base")
                                             for row in (theirs, ours))])  # fmt: skip
    return table(["method", "step, PEFT's", "step, here", "activations, PEFT's", "activations, here"], cells)


CHECKPOINTING = "8b checkpointing"
BLOCKS: dict[str, Callable[[], str]] = {
    "step-now": now,
    "step-8b": partial(steps, "8b", "8b-slow"),
    "step-8b-compiled": partial(steps, "8b compiled"),
    "step-encoder-compiled": partial(steps, "encoder compiled"),
    "step-encoder-captured": partial(steps, "encoder captured"),
    "step-vit-captured": partial(steps, "vit captured"),
    "step-8b-checkpointing": partial(steps, f"{CHECKPOINTING} non-reentrant"),
    "step-8b-checkpointing-reentrant": partial(steps, f"{CHECKPOINTING} reentrant"),
    "step-encoder": partial(steps, "encoder"),
    "step-encoder-fp32": partial(steps, "encoder-fp32"),
    "step-vit": partial(steps, "vit"),
    "decode": partial(decode, ("batch 1", "1b bf16 eager batch 1"), ("batch 16", "1b bf16 eager batch 16")),
    "decode-compiled": partial(
        decode, ("compiled", "1b-half bf16 compiled batch 1"),
        ("as CUDA graphs", "1b-half bf16 compiled batch 1 reduce-overhead"),
    ),
    "profile": profile,
    "finetune-loss": partial(finetune, "loss"),
    "finetune-end": partial(finetune, "end"),
    "headline": headline,
    "cost-8b": partial(
        cost, "gpu_step_h100", ("8b",),
        ("LOFT r16", "LOFT r64", "LOFT tied r64", "LOFT r256", *LORA.values(), "LoRA r16 bf16 adapters", "LoRA r256 bf16 adapters"),
    ),
    "cost-others": others,
    "cost-small": small,
    "cost-cpu": partial(cost, "cpu_step", ("encoder-fp32",)),
}  # fmt: skip
