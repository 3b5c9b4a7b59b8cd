"""`loft-rs`: the shell commands demo, select, inspect, export-lora, convert and merge.

Every failure is one sentence on stderr and a non-zero exit status. Nothing heavy is imported until a command needs it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

OPTIONAL = {"torch", "peft", "transformers", "matplotlib", "tqdm"}
METHODS = ("gradsvd", "skewgrad", "principal", "random", "coordinate")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    options = _parser().parse_args(arguments)
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    warnings.filterwarnings("ignore", category=FutureWarning)  # other packages' notes to their developers
    try:
        options.command(options)
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
        print(f"loft-rs: {_sentence(error, options.extra)}", file=sys.stderr)
        return 1
    return 0


def _sentence(error: Exception, extra: str) -> str:
    """One line that says what was wrong; LOFT_RS_TRACEBACK=1 shows where. `extra` brings what the command needs."""
    package = (getattr(error, "name", None) or "").split(".")[0]
    if isinstance(error, ModuleNotFoundError) and package in OPTIONAL:
        return f"this command needs {package}: pip install 'loft_rs[{extra}]'"
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, (ValueError, TypeError, OSError, ImportError, ArithmeticError, RuntimeError)) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _show_warning(message: Warning | str, category: type[Warning], *_: object) -> None:
    kind = "warning" if issubclass(category, UserWarning) else category.__name__
    print(f"loft-rs: {kind}: {message}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="loft-rs", description="Low-rank orthogonal fine-tuning with task-aware supports."
    )
    parser.add_argument("--version", action=_Version)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _demo_parser(commands)
    _select_parser(commands)
    _inspect_parser(commands)
    _export_parser(commands)
    _convert_parser(commands)
    _merge_parser(commands)
    return parser


class _Version(argparse.Action):
    """Prints the installed version; looked up only when asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="show the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"loft-rs {version('loft_rs')}")
        parser.exit()


def _demo_parser(commands: argparse._SubParsersAction) -> None:
    demo = commands.add_parser(
        "demo",
        help="teach an embedding model the vocabulary of the code on this machine",
        description="Fine-tune a sentence encoder on (name, docstring) pairs of the installed code, or on your own, "
        "with LOFT and with LoRA; measure retrieval, the reload and the LoRA export; print one table.",
    )
    demo.add_argument("--data", type=Path, metavar="FILE", help=".csv, .tsv or .jsonl with 'query' and 'passage'")
    demo.add_argument(
        "--model", type=Path, metavar="DIR", help="a transformers encoder with its tokenizer (default: MiniLM)"
    )
    demo.add_argument(
        "--support", choices=(*METHODS, "activation"), default=argparse.SUPPRESS, help="of the first LOFT row"
    )
    demo.add_argument("--rank", type=int, default=argparse.SUPPRESS, help="rank of the LOFT supports")
    demo.add_argument("--steps", type=int, default=argparse.SUPPRESS, help="training steps of each method")
    demo.add_argument("--compare", default="", metavar="A,B", help="more supports to compare, by comma")
    demo.add_argument(
        "--out", type=Path, default=argparse.SUPPRESS, metavar="DIR", help="folder for all results (default: loft-demo)"
    )
    demo.add_argument("--seed", type=int, default=argparse.SUPPRESS, help="of everything that is drawn at random")
    demo.add_argument(
        "--threads", type=int, default=argparse.SUPPRESS, help="CPU threads (default: PyTorch's own choice)"
    )
    demo.set_defaults(command=_demo, extra="demo")


def _select_parser(commands: argparse._SubParsersAction) -> None:
    select = commands.add_parser("select", help="choose supports for the gradients in a safetensors file")
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
        choices=("input", "output"),
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
    select.set_defaults(command=_select, extra="train")


def _inspect_parser(commands: argparse._SubParsersAction) -> None:
    inspect = commands.add_parser("inspect", help="ranks, energy, orthogonality error and angles of a saved adapter")
    inspect.add_argument("adapter", type=Path, metavar="ADAPTER", help="a folder that save_pretrained wrote")
    inspect.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw them")
    inspect.set_defaults(command=_inspect, extra="plot")


def _export_parser(commands: argparse._SubParsersAction) -> None:
    export = commands.add_parser("export-lora", help="write an adapter as an exact LoRA for any LoRA server")
    _adapter_arguments(export)
    export.add_argument(
        "--approximate-rank",
        type=int,
        metavar="R",
        help="of an OFT or BOFT adapter, which has no exact LoRA form: the nearest LoRA of this rank",
    )
    export.set_defaults(command=_export_lora, extra="train")


def _convert_parser(commands: argparse._SubParsersAction) -> None:
    convert = commands.add_parser(
        "convert",
        help="turn a PEFT OFT, BOFT, HRA or PSOFT adapter into a LOFT one, or back",
        description="Turn a PEFT OFT, BOFT, HRA or PSOFT adapter into a LOFT adapter with the same function, or such a LOFT adapter "
        "into one of the method's own.",
    )
    convert.add_argument("source", type=Path, metavar="SRC", help="a folder that save_pretrained wrote")
    convert.add_argument("target", type=Path, metavar="DST", help="folder to write")
    convert.add_argument(
        "--base",
        type=Path,
        metavar="DIR",
        help="the base model, which PSOFT needs, and LOFT on its way to PSOFT or to BOFT without an output scale "
        "(default: the one the adapter names)",
    )
    convert.set_defaults(command=_convert, extra="train")


def _merge_parser(commands: argparse._SubParsersAction) -> None:
    merge = commands.add_parser(
        "merge",
        help="merge an adapter into its base model and save the whole model",
        description="Merge an adapter into its base model and save the whole model, with the tokenizer that lies beside the "
        "adapter, or else beside the base.",
    )
    _adapter_arguments(merge)
    merge.set_defaults(command=_merge, extra="train")


def _adapter_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", type=Path, metavar="ADAPTER", help="a folder that save_pretrained wrote")
    parser.add_argument("--base", type=Path, metavar="DIR", help="the base model (default: the one the adapter names)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")


def _demo(options: argparse.Namespace) -> None:
    # Beside one other busy process on two cores, OpenMP threads that spin at barriers made a step 20 times slower, and
    # ones that sleep 2 times; on an idle machine the two are equal. PyTorch reads this when it is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from dataclasses import fields

    from .demo.run import Options, run

    given = {each.name: getattr(options, each.name) for each in fields(Options) if hasattr(options, each.name)}
    run(Options(**given | {"compare": tuple(name.strip() for name in options.compare.split(",") if name.strip())}))


def _select(options: argparse.Namespace) -> None:
    from ._files import check_writable
    from .support.budget import Allocation, Budget
    from .support.files import save_supports
    from .support.select import select_support

    check_writable(options.out)
    rank = options.rank if options.params is None else Budget(params=options.params)
    grads = _layers(options.grads)
    weights = None if options.weights is None else _named_weights(options.weights, list(grads))
    supports = select_support(
        None if options.method == "principal" else grads,
        rank,
        method=options.method,
        weights=weights,
        side=options.side,
        seed=options.seed,
        threads=options.threads,
        progress=_progress,
    )
    save_supports(options.out, supports)
    assert isinstance(supports, dict)  # a mapping was given
    for name, support in supports.items():
        print(f"{name}  {support!r}")
    vague = [name for name, support in supports.items() if not support.identifiable]
    if vague:
        print(f"the last directions are not identifiable in {len(vague)} of them: {', '.join(vague)}")
    if isinstance(supports, Allocation):
        print(f"{supports.params} of {options.params} parameters are given out")
    print(f"{len(supports)} supports are in {options.out}")


def _progress(name: str, done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{done}/{total} {name}", end="\n" if done == total else "", file=sys.stderr, flush=True)
    elif done % max(1, total // 10) == 0 or done == total:
        print(f"{done} of {total} layers", file=sys.stderr, flush=True)


def _layers(path: Path) -> dict:
    """The 2-D tensors of a file by module name: `q_proj.weight` is the layer `q_proj`."""
    from ._files import read_safetensors

    tensors, _ = read_safetensors(path)
    layers = {name.removesuffix(".weight"): tensor for name, tensor in tensors.items() if tensor.ndim == 2}
    if not layers:
        raise ValueError(f"{path}: no 2-D tensor in it, so there is no layer to choose a support for")
    return layers


def _named_weights(paths: list[Path], names: list[str]) -> dict:
    found: dict = {}
    for path in paths:
        found |= _layers(path)
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(
            f"--weights has no 2-D tensor for {', '.join(missing[:4])}{' and more' if len(missing) > 4 else ''}"
        )
    return {name: found[name] for name in names}


def _inspect(options: argparse.Namespace) -> None:
    from ._files import check_writable
    from .inspection import inspect_adapter, text_table

    if options.plot is not None:
        if options.plot.suffix.lower() != ".png":
            raise ValueError(f"--plot writes a PNG: its name must end in .png, not {options.plot.name!r}")
        check_writable(options.plot)
    reports = inspect_adapter(options.adapter)
    if options.plot is not None:
        from .plots import plot_adapter

        plot_adapter(reports, options.plot, str(options.adapter))
    print(text_table(reports))
    if options.plot is not None:
        print(f"The picture is in {options.plot}")


def _export_lora(options: argparse.Namespace) -> None:
    from ._files import check_writable
    from .export import check_target, export_lora

    check_writable(options.out, folder=True)
    check_target(options.out)
    export_lora(_load(options, _base_folder(options)), options.out, approximate_rank=options.approximate_rank)
    print(f"The LoRA is in {options.out}")


def _convert(options: argparse.Namespace) -> None:
    from transformers.utils import logging

    from ._format import CONFIG_FILE
    from .convert import convert_adapter

    logging.disable_progress_bar()
    convert_adapter(options.source, options.target, options.base, progress=_progress)
    kind = json.loads((options.target / CONFIG_FILE).read_text(encoding="utf-8"))["peft_type"]
    print(f"The {kind} adapter is in {options.target}")


def _merge(options: argparse.Namespace) -> None:
    from ._files import whole_directory

    base = _base_folder(options)
    with whole_directory(options.out) as folder:
        _load(options, base).merge_and_unload().save_pretrained(folder)
        _copy_tokenizer((options.adapter, base), folder)
    print(f"The merged model is in {options.out}")


_TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
)


def _copy_tokenizer(sources: Sequence[Path], target: Path) -> None:
    """Copy the tokenizer's files from the first source that has any."""
    for source in sources:
        files = {file for pattern in _TOKENIZER for file in source.glob(pattern) if file.is_file()}
        if files:
            for file in files:
                shutil.copyfile(file, target / file.name)
            return


def _base_folder(options: argparse.Namespace) -> Path:
    """The base model's folder, which must lie on this machine."""
    from .inspection import read_config

    base = options.base or read_config(options.adapter).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{options.adapter}: it names no base model; give its folder with --base DIR")
    if not Path(base).is_dir():
        raise ValueError(
            f"{options.adapter}: its base model {str(base)!r} is not a folder on this machine; name it with --base DIR"
        )
    return Path(base)


def _load(options: argparse.Namespace, base: Path):
    """The adapter on its base."""
    from .convert import base_class
    from .inspection import read_config

    config = read_config(options.adapter)
    import peft
    from transformers.utils import logging

    logging.disable_progress_bar()
    return peft.PeftModel.from_pretrained(base_class(options.adapter, config).from_pretrained(base), options.adapter)


if __name__ == "__main__":
    sys.exit(main())
