"""The benches that a test can afford at toy size: that they run, on what the library is now, and
write what they say.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parents[2] / "bench"


def test_calibration_at_scale_runs_at_toy_size(tmp_path):
    out = tmp_path / "scale.json"
    command = [sys.executable, BENCH / "calibration_scale.py", "--cost", "--pilot", "--big", "--tiny", "--rounds", "1"]
    done = subprocess.run([*command, "--out", out], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(out.read_text())
    assert {name: (part["complete"], len(part["rows"])) for name, part in found.items()} == {
        "cost": (True, 3),
        "pilot": (True, 4),
        "big": (True, 3),
    }
    steps = {row["step"]: row for row in found["cost"]["rows"]}
    assert all(row["frozen_ms"] > 0 and row["over_frozen"] > 0 for row in steps.values())
    assert steps["pass 2"]["sketches_mib"] > steps["pass 1"]["sketches_mib"] > 0
    assert found["big"]["rows"][1]["groups"] > 1
    assert all(row["apart_from_first"] == 0 for row in found["big"]["rows"])  # in groups and offloaded: the same bits
