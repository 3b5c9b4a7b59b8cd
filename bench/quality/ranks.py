"""Does the best learning rate fall as 1/r, or as 1/sqrt(r)? LOFT of several ranks, each at rates
1.6 apart, on the tuning split.

    python bench/quality/ranks.py --packed PACKED --tasks asdiv gtsrb --out
    bench/quality/runs/ranks.jsonl --workers 10 --wave 3

Rates are lr * r around .064, `suggest_lr`'s: under 1/r the best one is the same at every rank,
under 1/sqrt(r) it grows as sqrt(r), by 2.8 from r = 16 to 128. Lines are as `sweep.py`'s, in the
phase "ranks".
"""

from __future__ import annotations

from protocol import Spec, key
from sweep import parser_of, sweep

RANKS = (16, 32, 64, 128)
MIDDLE, FACTOR = 0.064, 1.6
SEEDS = (100, 101, 102)


def specs(tasks: list[str]) -> list[Spec]:
    """Every rank at five rates, seed by seed, so that what is cut off is the last seed's."""
    from tasks import TASKS

    rates = [MIDDLE * FACTOR**k for k in range(-2, 3)]
    return [
        Spec(task, f"LOFT principal r{rank}", "ranks", float(f"{rate / rank:.6g}"), seed, TASKS[task].steps)
        for seed in SEEDS
        for task in tasks
        for rank in RANKS
        for rate in rates
    ]


def main() -> None:
    given = parser_of(__doc__).parse_args()
    plan = specs(given.tasks)

    def due(lines: list[dict]) -> list[Spec]:
        done = {key(line) for line in lines}
        return [spec for spec in plan if key(spec) not in done]

    sweep(given, due)


if __name__ == "__main__":
    main()
