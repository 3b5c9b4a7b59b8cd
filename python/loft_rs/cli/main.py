"""`loft-rs`: runs one subcommand.

Every failure is one sentence on stderr and a non-zero exit status. Nothing heavy is imported until
a command needs it.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Mapping, Sequence

from .._words import how_to_install
from .parser import parser

OPTIONAL = {"torch", "peft", "transformers", "matplotlib", "tqdm"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    command = next((word for word in given if not word.startswith("-")), "")
    options = parser(command).parse_args(given)
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    warnings.filterwarnings("ignore", category=FutureWarning)  # other packages' notes to their developers
    try:
        status = options.command(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("loft-rs: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `loft-rs inspect ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if os.environ.get("LOFT_RS_TRACEBACK"):
            raise
        print(f"loft-rs: {in_shell_words(sentence(error, options.extra), options.words)}", file=sys.stderr)
        return 1
    return status or 0


def sentence(error: Exception, extra: str) -> str:
    """One line that says what was wrong; LOFT_RS_TRACEBACK=1 shows where.

    extra: what brings what the command needs.
    """
    package = (getattr(error, "name", None) or "").split(".")[0]
    if isinstance(error, ModuleNotFoundError) and package in OPTIONAL:
        return f"this command needs {package}: {how_to_install(extra)}"
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, (ValueError, TypeError, OSError, ImportError, ArithmeticError, RuntimeError)) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def in_shell_words(text: str, words: Mapping[str, str]) -> str:
    """A Python argument in a message by its name in the shell; paths and dotted names stay.

    An argument after "^" is an ordinary word as well: it is meant only where the message begins.
    """
    for argument, flag in words.items():
        before = r"\A" if argument.startswith("^") else r"(?<![\w./-])"
        text = re.sub(rf"{before}{re.escape(argument.removeprefix('^'))}(?![\w/-]|\.\w)", flag, text)
    return text


def _show_warning(message: Warning | str, category: type[Warning], *_: object) -> None:
    kind = "warning" if issubclass(category, UserWarning) else category.__name__
    print(f"loft-rs: {kind}: {message}", file=sys.stderr)
