"""`loft-rs`, the shell.

main.py       one call: the status, and one sentence for a failure, in the shell's own words
parser.py     the subcommands, their arguments, and an example of each
commands.py   demo, select, inspect
adapters.py   export-lora, convert, merge
doctor.py     versions, and a self-test
"""

from .main import main

__all__ = ["main"]
