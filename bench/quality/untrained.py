"""What the runs of a task began from: the NLL of the model as it comes, on the splits named; one
JSON line a task.

python bench/quality/untrained.py --packed PACKED --tasks gsm8k --splits outside tune --out
runs/mathematics.jsonl --device cpu
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from sweep import machine
from tasks import TASKS, base_model, evaluate, split


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packed", type=Path, required=True, help="as prepare.py wrote it")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", required=True, choices=list(TASKS))
    parser.add_argument("--splits", nargs="+", required=True)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    arguments = parser.parse_args()
    with arguments.out.open("a") as file:
        for task in (TASKS[name] for name in arguments.tasks):
            model = base_model(arguments.packed, task, 0, arguments.device)
            splits = {name: split(arguments.packed, task, name, arguments.device) for name in arguments.splits}
            nll = {name: evaluate(model, task, data)["nll"] for name, data in splits.items()}
            line = {"task": task.name, "method": "untrained", "phase": "untrained", "rate": 0.0, "seed": 0, "steps": 0}
            file.write(json.dumps(line | {"family": task.family, "nll": nll} | machine(arguments.device)) + "\n")


if __name__ == "__main__":
    main()
