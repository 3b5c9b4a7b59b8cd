"""Calibration: supports from a task's own batches.

driver.py      calibrate: the order of events
options.py     what is refused before any work
session.py     the model while it is calibrated, and put back
passes.py      passes over the batches, the head's warm-up, the pilot's steps
choose.py      from sketches or a pilot to supports
pilot.py       low-rank changes and their partners
sides.py       which side of a module
memory.py      known before it starts, kept under a limit
processes.py   what the processes do together
report.py      CalibrationReport
summary.py     its words: a summary with advice, groups of layers, the table
"""

from .driver import calibrate, save_sketches
from .report import CalibrationReport

__all__ = ["CalibrationReport", "calibrate", "save_sketches"]
