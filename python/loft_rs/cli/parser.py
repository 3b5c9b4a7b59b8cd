"""The subcommands of `loft-rs`: their arguments, and an example of each.

Arguments are added to the command that was called alone: `loft-rs --help` then needs nothing that
is slow to import.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from . import adapters, commands, doctor

__all__ = ["COMMANDS", "parser"]


class Command(NamedTuple):
    """One subcommand.

    run: what it does; may give an exit status. extra: what it needs installed. words: arguments in
    Python's messages -> their names in the shell (`main.in_shell_words`).
    """

    run: Callable[[argparse.Namespace], int | None]
    arguments: Callable[[argparse.ArgumentParser], None]
    help: str
    example: str
    description: str = ""
    extra: str = "train"
    words: Mapping[str, str] = {}


def parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser with the arguments of this command; None: of all."""
    whole = argparse.ArgumentParser(
        prog="loft-rs", description="Low-rank orthogonal fine-tuning with task-aware supports."
    )
    whole.add_argument("--version", action=_Version)
    parts = whole.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, each in COMMANDS.items():
        part = parts.add_parser(
            name,
            help=each.help,
            description=each.description or f"{each.help[0].upper()}{each.help[1:]}.",
            epilog=f"example:\n  {each.example}",
            formatter_class=_WithExample,
        )
        if command in (None, name):
            each.arguments(part)
        part.set_defaults(command=each.run, extra=each.extra, words=each.words)
    return whole


class _WithExample(argparse.HelpFormatter):
    """Wraps the description and leaves the example as it is."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith("example:") else super()._fill_text(text, width, indent)


class _Version(argparse.Action):
    """Prints the installed version; looked up only when asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="show the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"loft-rs {version('loft_rs')}")
        parser.exit()


def _demo(demo: argparse.ArgumentParser) -> None:
    demo.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help=".csv, .tsv or .jsonl with 'query' and 'passage', at least 64 distinct pairs (default: docstrings of installed code)",
    )
    demo.add_argument(
        "--model", type=Path, metavar="DIR", help="a transformers encoder with its tokenizer (default: MiniLM)"
    )
    from ..support.methods import CALIBRATED_SUPPORTS, DATA_FREE_SUPPORTS

    demo.add_argument(
        "--support",
        choices=("kept", "halves", *CALIBRATED_SUPPORTS, *DATA_FREE_SUPPORTS),
        default=argparse.SUPPRESS,
        help="of the LOFT row (default: kept, a pilot in halves from whose end training starts)",
    )
    demo.add_argument("--rank", type=int, default=argparse.SUPPRESS, help="rank of the LOFT supports (default: 64)")
    demo.add_argument(
        "--steps",
        type=int,
        default=argparse.SUPPRESS,
        help="steps of the LOFT row (default: 45); the others get its pilot's too",
    )
    demo.add_argument("--compare", default="", metavar="A,B", help="more supports to compare with LoRA, by comma")
    demo.add_argument(
        "--out", type=Path, default=argparse.SUPPRESS, metavar="DIR", help="folder for all results (default: loft-demo)"
    )
    demo.add_argument(
        "--lm", action="store_true", help="a language model in place of the encoder: SmolLM2-135M learns to write dates"
    )
    demo.add_argument("--seed", type=int, default=argparse.SUPPRESS, help="of everything that is drawn at random")
    demo.add_argument(
        "--threads", type=int, default=argparse.SUPPRESS, help="CPU threads (default: PyTorch's own choice)"
    )


def _select(select: argparse.ArgumentParser) -> None:
    from ..support.methods import METHODS, SIDES

    select.add_argument("grads", type=Path, metavar="GRADS.safetensors", help="one (out, in) gradient for each layer")
    size = select.add_mutually_exclusive_group(required=True)
    size.add_argument("--rank", type=int, help="columns of every support")
    size.add_argument(
        "--params",
        type=int,
        metavar="N",
        help="trained parameters of all layers together, r(r - 1)/2 each: even ranks, shared out by what they capture",
    )
    select.add_argument(
        "--weights",
        type=Path,
        nargs="+",
        metavar="W.safetensors",
        help="weights of the same names, in one file or several",
    )
    select.add_argument(
        "--method", choices=METHODS, default="gradsvd", help="with 'principal' GRADS only names the layers"
    )
    select.add_argument(
        "--side",
        choices=SIDES,
        default="input",
        help="the side of the weight that is rotated: W0 R (input, the default) or R W0",
    )
    select.add_argument("--seed", type=int, default=0, help="of the random sketch (default: 0)")
    select.add_argument(
        "--threads", type=int, metavar="N", help="CPU threads (default: LOFT_RS_NUM_THREADS, or all cores)"
    )
    select.add_argument(
        "--out",
        type=Path,
        default=Path("supports.safetensors"),
        metavar="FILE",
        help="file to write (default: supports.safetensors)",
    )
    _force(select)


def _inspect(inspect: argparse.ArgumentParser) -> None:
    inspect.add_argument("adapter", type=Path, metavar="ADAPTER", help="a folder that save_pretrained wrote")
    inspect.add_argument("--plot", type=Path, metavar="FILE", help="also draw them, as .png or .svg")


def _export_lora(export: argparse.ArgumentParser) -> None:
    _adapter_arguments(export)
    export.add_argument(
        "--approximate-rank",
        type=int,
        metavar="R",
        help="of an OFT or BOFT adapter, which has no exact LoRA form: the nearest LoRA of this rank",
    )
    export.add_argument(
        "--drop-modules-to-save",
        action="store_true",
        help="leave out a trained head or trained token embeddings, which a LoRA server cannot load",
    )


def _convert(convert: argparse.ArgumentParser) -> None:
    convert.add_argument("source", type=Path, metavar="SRC", help="a folder that save_pretrained wrote")
    convert.add_argument("target", type=Path, metavar="DST", help="folder to write")
    convert.add_argument(
        "--base",
        type=Path,
        metavar="DIR",
        help="the base model, which PSOFT needs, and LOFT on its way to PSOFT or to BOFT without an output scale "
        "(default: the one the adapter names)",
    )
    _force(convert)


def _merge(merge: argparse.ArgumentParser) -> None:
    _adapter_arguments(merge)


def _adapter_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", type=Path, metavar="ADAPTER", help="a folder that save_pretrained wrote")
    parser.add_argument("--base", type=Path, metavar="DIR", help="the base model (default: the one the adapter names)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    _force(parser)


def _force(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="write over a result that is there already")


def _doctor(doctor: argparse.ArgumentParser) -> None:
    """It takes none."""


COMMANDS = {
    "demo": Command(
        commands.demo,
        _demo,
        "teach an embedding model the vocabulary of the code on this machine",
        "loft-rs demo --data pairs.csv --steps 60 --rank 64 --out results",
        "Fine-tune a sentence encoder on (name, docstring) pairs of the installed code, or on your own, with LOFT and with LoRA; "
        "measure retrieval, the reload and the LoRA export; print one table.",
        extra="demo",
    ),
    "select": Command(
        commands.select,
        _select,
        "choose supports for the gradients in a safetensors file",
        "loft-rs select grads.safetensors --rank 64 --method skewgrad --weights model.safetensors",
        words={f"^{name}": f"--{name}" for name in ("rank", "params", "weights", "threads", "seed")}
        | {"^grads": "GRADS"},
    ),
    "inspect": Command(
        commands.inspect,
        _inspect,
        "ranks, energy, orthogonality error and angles of a saved adapter",
        "loft-rs inspect my-adapter --plot my-adapter.png",
        extra="plot",
        words={"path": "--plot"},
    ),
    "export-lora": Command(
        adapters.export_lora,
        _export_lora,
        "write an adapter as an exact LoRA for any LoRA server",
        "loft-rs export-lora my-adapter --base my-model --out my-adapter-lora",
        words={
            "pass drop_modules_to_save=True": "add --drop-modules-to-save",
            "approximate_rank": "--approximate-rank",
        },
    ),
    "convert": Command(
        adapters.convert,
        _convert,
        "turn a PEFT OFT, BOFT, HRA or PSOFT adapter into a LOFT one, or back",
        "loft-rs convert my-oft-adapter my-loft-adapter",
        "Turn a PEFT OFT, BOFT, HRA or PSOFT adapter into a LOFT adapter with the same function, or such a LOFT adapter "
        "into one of the method's own.",
        words={"src": "SRC", "dst": "DST", "give base_model": "name it with --base DIR", "base_model": "--base"},
    ),
    "merge": Command(
        adapters.merge,
        _merge,
        "merge an adapter into its base model and save the whole model",
        "loft-rs merge my-adapter --base my-model --out my-merged-model",
        "Merge an adapter into its base model and save the whole model, with the tokenizer that lies beside the adapter, or else "
        "beside the base.",
    ),
    "doctor": Command(
        doctor.run,
        _doctor,
        "versions, devices, extras, and a self-test of a few seconds",
        "loft-rs doctor",
        "Print what is installed, on what devices, and test the Rust core and a layer forward and backward, on the GPU too where there is "
        "one. The status is 1 where something fails.",
    ),
}
