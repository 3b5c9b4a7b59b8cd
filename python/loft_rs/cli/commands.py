"""The commands demo, select and inspect; how a command shows progress, and spares a result."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from .._words import count, some

__all__ = ["demo", "inspect", "refuse_existing", "select", "show_progress"]


def refuse_existing(path: Path, flag: str, force: bool) -> None:
    """ValueError where a result is there, unless it may be written over. An empty folder is
    none.
    """
    there = any(path.iterdir()) if path.is_dir() else path.exists()
    if there and not force:
        raise ValueError(f"{flag}: {path} exists already; add --force to write over it, or give another")


def demo(options: argparse.Namespace) -> None:
    # Beside one other busy process on two cores, OpenMP threads that spin at barriers made a step
    # 20 times slower, and ones that sleep 2 times; on an idle machine the two are equal. PyTorch
    # reads this when it is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from dataclasses import fields

    if options.lm:
        from ..demo.language import LanguageOptions
        from ..demo.language import run as run_language

        kind = {each.name for each in fields(LanguageOptions)}
        run_language(LanguageOptions(**{name: value for name, value in vars(options).items() if name in kind}))
        return
    from ..demo.run import Options, run

    given = {each.name: getattr(options, each.name) for each in fields(Options) if hasattr(options, each.name)}
    run(Options(**given | {"compare": tuple(name.strip() for name in options.compare.split(",") if name.strip())}))


def select(options: argparse.Namespace) -> None:
    from .._files import check_writable
    from ..support.budget import Allocation, Budget
    from ..support.files import save_supports
    from ..support.select import select_support

    check_writable(options.out)
    refuse_existing(options.out, "--out", options.force)
    rank = options.rank if options.params is None else Budget(params=options.params)
    grads, others = _layers(options.grads, "GRADS")
    weights = None if options.weights is None else _named_weights(options.weights, list(grads))
    supports = select_support(
        None if options.method == "principal" else grads,
        rank,
        method=options.method,
        weights=weights,
        side=options.side,
        seed=options.seed,
        threads=options.threads,
        progress=show_progress,
    )
    save_supports(options.out, supports)
    assert isinstance(supports, dict)  # a mapping was given
    for name, support in supports.items():
        print(f"{name}  {support!r}")
    if others:
        print(f"left out, being no matrix: {some(others)}", file=sys.stderr)
    vague = [name for name, support in supports.items() if not support.identifiable]
    if vague:
        print(f"the last directions are not identifiable in {len(vague)} of them: {some(vague)}")
    if isinstance(supports, Allocation):
        print(f"{supports.params} of {options.params} parameters are given out")
    print(f"{count(len(supports), 'support')} {'is' if len(supports) == 1 else 'are'} in {options.out}")


def show_progress(name: str, done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{done}/{total} {name}", end="\n" if done == total else "", file=sys.stderr, flush=True)
    elif done % max(1, total // 10) == 0 or done == total:
        print(f"{done} of {count(total, 'layer')}", file=sys.stderr, flush=True)


def _layers(path: Path, argument: str) -> tuple[dict, list[str]]:
    """(2-D tensors of a file by module, `q_proj.weight` being `q_proj`; the names of the
    others).
    """
    from .._files import read_safetensors
    from ..support.files import holds_supports

    tensors, metadata = read_safetensors(path)
    if holds_supports(metadata):
        raise ValueError(f"{argument}: {path} holds supports that were chosen already, not gradients or weights")
    layers = {name.removesuffix(".weight"): tensor for name, tensor in tensors.items() if tensor.ndim == 2}
    if not layers:
        raise ValueError(f"{path}: no 2-D tensor in it, so there is no layer to choose a support for")
    return layers, [name for name, tensor in tensors.items() if tensor.ndim != 2]


def _named_weights(paths: list[Path], names: list[str]) -> dict:
    found: dict = {}
    for path in paths:
        found |= _layers(path, "--weights")[0]
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(f"--weights has no 2-D tensor for {some(missing)}")
    return {name: found[name] for name in names}


def inspect(options: argparse.Namespace) -> None:
    from ..inspection import inspect_adapter, text_table
    from ..plots import check_path

    if options.plot is not None:
        check_path(options.plot)
    reports = inspect_adapter(options.adapter)
    if options.plot is not None:
        reports.plot(options.plot, str(options.adapter))
    print(text_table(reports))
    if options.plot is not None:
        print(f"The picture is in {options.plot}")
