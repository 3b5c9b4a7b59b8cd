"""What benches share: rows that are on disk as soon as they are measured, timing, peak memory, the
machine.
"""

from __future__ import annotations

import ctypes
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from blocks.text import method_table, table


class Report:
    """Rows by section, kept in a file that is written whole after each row; its other sections
    stay.
    """

    def __init__(self, path: Path, machine: dict[str, Any]) -> None:
        self.path, self.machine = path, machine
        self.sections: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        self.rows: list[dict[str, Any]] = []

    def open(self, section: str) -> None:
        self.rows = []
        self.sections[section] = {"machine": self.machine, "complete": False, "rows": self.rows}

    def close(self, section: str) -> None:
        self.sections[section]["complete"] = True
        self._write()

    def add(self, **row: Any) -> None:
        self.rows.append({key: float(f"{each:.7g}") if isinstance(each, float) else each for key, each in row.items()})
        self._write()
        print(" ".join(f"{key}={each}" for key, each in self.rows[-1].items()), file=sys.stderr, flush=True)

    def _write(self) -> None:
        part = self.path.with_name(self.path.name + ".part")
        part.write_text(json.dumps(self.sections, indent=1) + "\n")
        part.replace(self.path)

    def table(self, section: str) -> None:
        keys = list(dict.fromkeys(key for row in self.rows for key, each in row.items() if not isinstance(each, list)))
        cells = [[_shown(key, row.get(key, "")) for key in keys] for row in self.rows]
        print(f"\n## {section}\n\n{table(keys, cells, left=len(keys))}", flush=True)


def _shown(key: str, value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6f}" if "energy" in key else f"{value:.3g}" if value < 100 else f"{value:.0f}"
    return str(value).replace("|", "/")


def seconds(call: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def cell(report: Report, key: dict, call: Callable, judge: Callable, repeat: int, limit: float) -> None:
    """One row: the median of `repeat` calls, or of one that passes `limit` seconds, and what
    `judge` says of its result.

    A failure is a row too.
    """
    times: list[float] = []
    try:
        while len(times) < repeat and (not times or times[0] <= limit):
            time.sleep(0.1)  # the threads of the method before may still spin
            begun = time.perf_counter()
            result = call()
            times.append(time.perf_counter() - begun)
        report.add(**key, s=median(times), calls=len(times), **judge(result, median(times)), times=times)
    except Exception as error:
        report.add(**key, error=describe(error))
    gc.collect()


def describe(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:120]


def status(name: str) -> int:
    """A figure of the process in bytes: VmRSS, or VmHWM, the largest it was."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def peak_extra(call: Callable[[], Any]) -> tuple[Any, int, float]:
    """(result, bytes by which the resident set rose above where it stood, seconds)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before is not there to be taken unseen
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    held, begun = status("VmRSS"), time.perf_counter()
    result = call()
    taken = time.perf_counter() - begun
    return result, max(0, status("VmHWM") - held), taken


def machine(threads: int, packages: list[str]) -> dict[str, Any]:
    """The machine, the versions, and the rates that floors are computed from."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    a, b, out = torch.rand(4096, 4096), torch.rand(4096, 4096), torch.empty(4096, 4096)
    product = min(seconds(lambda: torch.mm(a, b, out=out)) for _ in range(4))
    source, target = torch.rand(1 << 27), torch.empty(1 << 27)
    copy = min(seconds(lambda: target.copy_(source)) for _ in range(4))
    return {
        "cpu": next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.machine()),
        "cores": os.cpu_count(),
        "threads": threads,
        "load": round(os.getloadavg()[0], 2),
        "wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "sgemm_gflops": round(2 * 4096**3 / product / 1e9, 1),
        "copy_gb_s": round(2 * source.nbytes / copy / 1e9, 1),
    }


def print_table(section: str, rows: list[dict[str, Any]], shown: dict[str, tuple[str, str]]) -> None:
    """The rows by method, under a heading. shown: field -> (heading, format)."""
    print(f"\n## {section}\n\n{method_table(rows, shown)}")
