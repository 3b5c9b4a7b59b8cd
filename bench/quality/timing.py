"""What a step costs, each method alone on the card: milliseconds from Python and as a CUDA graph,
peak memory, and calibration.

python bench/quality/timing.py --packed PACKED --task gtsrb --out times.jsonl
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from methods import METHODS
from protocol import Spec, to_line
from sweep import cells, machine
from tasks import TASKS
from train import EAGER, Run

STEPS = 40


def steps_ms(run: Run, count: int) -> float:
    """Median over `count` steps, each waited for: a queue that never runs dry would hide the
    launches.
    """
    taken = []
    for _ in range(count):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        run.step()
        torch.cuda.synchronize()
        taken.append(1e3 * (time.perf_counter() - begun))
    return statistics.median(taken)


def timed(spec: Spec, packed: Path) -> dict[str, Any]:
    eager = Run(spec, packed, "cuda", capture=False)
    steps_ms(eager, EAGER)
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    found = {"eager_ms": steps_ms(eager, STEPS // 2), "step_mib": (torch.cuda.max_memory_allocated() - held) / 2**20}
    found |= {"prepare_seconds": eager.prepared, "trained": eager.trained, "rank": eager.rank}
    del eager
    replayed = Run(spec, packed, "cuda")
    steps_ms(replayed, EAGER + 1)
    return found | {"graph_ms": steps_ms(replayed, STEPS // 2) if replayed.graph is not None else None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packed", type=Path, required=True)
    parser.add_argument("--task", required=True, choices=list(TASKS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_float32_matmul_precision("high")
    about = machine("cuda")
    with arguments.out.open("a") as file:
        for cell in cells(arguments.packed, [arguments.task], arguments.methods, STEPS):
            spec = Spec(cell.task, cell.method, "time", cell.rates[len(cell.rates) // 2], 0, STEPS)
            line = {"task": cell.task, "method": cell.method, "phase": "time"}
            try:
                line |= timed(spec, arguments.packed)
            except Exception as error:
                line |= {"error": f"{type(error).__name__}: {error}"[:500]}
            file.write(to_line(line | about))
            file.flush()


if __name__ == "__main__":
    main()
