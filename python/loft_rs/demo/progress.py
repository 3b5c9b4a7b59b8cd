"""What the demo says while it works: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

QUIET = 8.0  # seconds


class Progress:
    """Lines on stderr, each with the seconds since the start."""

    def __init__(self) -> None:
        self.begun = time.perf_counter()
        self.terminal = sys.stderr.isatty()
        self.doing, self.said = "", self.begun

    def say(self, text: str) -> None:
        """A line now. What takes long after it calls `tick`."""
        self.doing, self.said = text, time.perf_counter()
        print(f"[{time.perf_counter() - self.begun:5.0f} s] {text}", file=sys.stderr, flush=True)

    def tick(self) -> None:
        """Say that the work of the last line goes on, where nothing was said for QUIET seconds."""
        if (now := time.perf_counter()) - self.said > QUIET:
            self.said = now
            print(f"[{now - self.begun:5.0f} s]   ... {self.doing.split(':')[0]}", file=sys.stderr, flush=True)

    def steps(self, title: str, total: int) -> Callable[[float], None]:
        """A function to call with each step's loss, `total` times."""
        return self._bar(title, total) if self.terminal else self._lines(title, total)

    def _bar(self, title: str, total: int) -> Callable[[float], None]:
        from tqdm import tqdm

        bar = tqdm(total=total, desc=title, unit="step", leave=False)

        def step(loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()
            if bar.n == total:
                bar.close()

        return step

    def _lines(self, title: str, total: int) -> Callable[[float], None]:
        losses: list[float] = []
        every = max(1, total // 4)

        def step(loss: float) -> None:
            losses.append(loss)
            self.tick()
            if len(losses) % every == 0 or len(losses) == total:
                recent = losses[-every:]
                self.say(f"{title}: step {len(losses)} of {total}, loss {sum(recent) / len(recent):.3f}")

        return step
