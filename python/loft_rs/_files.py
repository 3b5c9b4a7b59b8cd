"""Files written whole or not at all, and safetensors read with NumPy alone.

Output goes to a temporary name beside the target, on the same file system, and is moved into place
only after all of it is written.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "I64": np.int64,
    "I32": np.int32,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def check_writable(path: str | os.PathLike, *, folder: bool = False) -> None:
    """Refuse a target file (or folder) that could not be written, before the work whose result goes
    to it.
    """
    target = Path(path).resolve()
    if target.exists() and not (target.is_dir() if folder else target.is_file()):
        raise ValueError(f"cannot write {path}: it exists and is not a {'folder' if folder else 'file'}")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: the folder {target.parent} does not exist")


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.part")


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path; it becomes `path` if the block ends well and is removed if it
    raises.
    """
    check_writable(path)
    target = Path(path).resolve()
    part = _beside(target)
    try:
        part.touch()
        mode = part.stat().st_mode  # what the umask allows; safetensors would leave 0600
        yield part
        part.chmod(mode)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def whole_directory(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary directory; it becomes `path` if the block ends well and is removed if it
    raises.

    If `path` is already a directory, the finished files are moved into it one by one; nothing else
    in it is touched.
    """
    check_writable(path, folder=True)
    target = Path(path).resolve()
    part = _beside(target)
    part.mkdir()
    try:
        mode = part.stat().st_mode & 0o666
        yield part
        for file in part.rglob("*"):
            if file.is_file():
                file.chmod(mode)
        if target.is_dir():
            _move_into(part, target)
        else:
            os.replace(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _move_into(source: Path, target: Path) -> None:
    for each in sorted(source.rglob("*")):
        place = target / each.relative_to(source)
        if each.is_dir():
            place.mkdir(exist_ok=True)
        else:
            os.replace(each, place)


def read_safetensors(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """A safetensors file's tensors, memory-mapped, and its metadata. bfloat16, which NumPy lacks,
    comes as float32.
    """
    from safetensors import SafetensorError, safe_open

    if Path(path).is_dir():
        raise ValueError(f"{path}: is a folder, not a safetensors file")
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, framework="numpy"):  # checks the header: sizes, offsets, overlaps
            pass
    except (SafetensorError, ValueError, OSError) as error:
        raise ValueError(f"{path}: not a safetensors file, or a damaged one ({error})") from None
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    metadata = header.pop("__metadata__", {})
    data = np.memmap(path, np.uint8, mode="r")[8 + size :]
    return {name: _array(path, name, entry, data) for name, entry in header.items()}, metadata


def _array(path: str | os.PathLike, name: str, entry: dict, data: np.ndarray) -> np.ndarray:
    kind, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    raw = data[begin:end]
    if kind == "BF16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape)
    if kind not in _DTYPES:
        raise ValueError(f"{path}: tensor {name!r} has dtype {kind}; one of {', '.join(_DTYPES)}, BF16 is expected")
    return np.require(raw.view(_DTYPES[kind]).reshape(shape), requirements="A")
