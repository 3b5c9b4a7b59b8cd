"""The commands export-lora, convert and merge."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .._words import some
from .commands import refuse_existing, show_progress

__all__ = ["convert", "export_lora", "merge"]


def export_lora(options: argparse.Namespace) -> None:
    from .._files import check_writable
    from ..export import check_target
    from ..export import export_lora as write

    check_writable(options.out, folder=True)
    check_target(options.out)
    refuse_existing(options.out, "--out", options.force)
    write(
        _load(options, _base_folder(options)),
        options.out,
        drop_modules_to_save=options.drop_modules_to_save,
        approximate_rank=options.approximate_rank,
    )
    print(f"The LoRA is in {options.out}")


def convert(options: argparse.Namespace) -> None:
    from transformers.utils import logging

    from .._format import CONFIG_FILE
    from ..convert import convert_adapter

    logging.disable_progress_bar()
    if options.target.resolve() != options.source.resolve():  # which has a message of its own
        refuse_existing(options.target, "DST", options.force)
    convert_adapter(options.source, options.target, options.base, progress=show_progress)
    kind = json.loads((options.target / CONFIG_FILE).read_text(encoding="utf-8"))["peft_type"]
    print(f"The {kind} adapter is in {options.target}")


def merge(options: argparse.Namespace) -> None:
    from .._files import whole_directory

    refuse_existing(options.out, "--out", options.force)
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
    from ..inspection import read_config

    base = options.base or read_config(options.adapter).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{options.adapter}: it names no base model; give its folder with --base DIR")
    if not Path(base).is_dir():
        raise ValueError(
            f"{options.adapter}: its base model {str(base)!r} is not a folder on this machine; name it with --base DIR"
        )
    return Path(base)


def _load(options: argparse.Namespace, base: Path) -> Any:
    """The adapter on its base."""
    from ..convert import base_class
    from ..inspection import read_config

    config = read_config(options.adapter)
    import peft
    from transformers.utils import logging

    logging.disable_progress_bar()
    if config.get("modules_to_save"):
        logging.set_verbosity_error()  # the head that is missing in the base is the adapter's
    model = base_class(options.adapter, config).from_pretrained(base)
    _check_base(model, options.adapter, base)
    return peft.PeftModel.from_pretrained(model, options.adapter)


def _check_base(model: Any, adapter: Path, base: Path) -> None:
    """ValueError where the base lacks a module that the adapter has tensors for."""
    from .._files import read_safetensors
    from .._format import WEIGHTS_FILE

    adapted = {name.rpartition(".loft_")[0] for name in read_safetensors(adapter / WEIGHTS_FILE)[0] if ".loft_" in name}
    known = {name for name, _ in model.named_modules()}
    missing = sorted(name for each in adapted if (name := each.removeprefix("base_model.model.")) not in known)
    if missing:
        raise ValueError(
            f"--base: {base} is not the model that {adapter} was trained on: it has no module {some(missing)}"
        )
