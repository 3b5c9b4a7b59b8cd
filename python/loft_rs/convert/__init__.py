"""PEFT's OFT, BOFT, HRA and PSOFT checkpoints as LOFT adapters that compute the same function, and
back.

Every method is W = W0 R (BOFT: diag(s) W0 R). With Cayley(A) = (I - A)(I + A)^{-1}, theta the
strict lower triangle of A row by row, and Q the skew matrix whose strict upper triangle v PEFT
stores:

    OFT     x -> x O in every block, R = O^T.  O = Cayley(Q):              A = -Q, theta_ij =  v_ji
                                               O = I + 2Q + 2Q^2 + ...:    A =  Q, theta_ij = -v_ji
    BOFT    x -> x M_{m-1} ... M_0, M_i = P_i diag(Cayley(S)) P_i^T, S = (B - B^T)/2 of the stored B, y scaled by s before the bias;
            R = M_0^T M_1^T ...:               A = -S, theta_ij = (B_ji - B_ij)/2;  loft_scale = s - 1
    HRA     R = H_0 H_1 ... of the columns of U:  theta = U as it is
    PSOFT   T = diag(b) Cayley(-Q) diag(a), series or not:  A = -Q, theta_ij = v_ji, then a - 1, then b - 1

PEFT's series of t terms is (I - A) sum_{k <= K} (-A)^k with K = t - 2. PSOFT's checkpoint holds no
P: PEFT takes the SVD of W0 again at every load, and so does the conversion, once. On the way back P
must span PEFT's basis, P = P' V, and the generator becomes V A V^T.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from .._files import check_writable, whole_directory
from .._format import CONFIG_FILE, WEIGHTS_FILE
from ..inspection import read_peft_config
from .base_model import Base, base_class
from .checkpoint import ROOT, Checkpoint, Converted, Progress, read
from .from_peft import from_boft, from_hra, from_oft, from_psoft
from .to_peft import from_loft

__all__ = ["base_class", "convert_adapter"]


def convert_adapter(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    base_model: nn.Module | str | os.PathLike | None = None,
    *,
    progress: Progress | None = None,
) -> str:
    """Write a PEFT OFT, BOFT, HRA or PSOFT adapter as a LOFT adapter with the same function; or
    such a LOFT adapter as the method's own.

    src: folder with `adapter_config.json` and `adapter_model.safetensors`. dst: the folder to
    write, whole or not at all; in an existing one the two files are replaced. base_model: the model
    the adapter was trained on, without adapters, or its folder; None: the folder that the config
    names. Only PSOFT needs it (its checkpoint holds no basis; on the device of `base_model`, where
    PEFT would compute it), and a LOFT adapter on its way to PSOFT or, without an output scale, to
    BOFT. progress: called with (module, done, total) for every SVD.

    Returns `dst`. Tensors of `modules_to_save` and resized embeddings are carried over. Dropout and
    constraints of the training itself have no part in the function and are left out with a warning.
    Everything is checked before anything is written: ValueError for what is no rotation
    (`pissa_init`), no linear layer, trained biases, unknown or missing tensors, NaN or Inf, a base
    that does not fit, and forms the other side cannot hold; FileNotFoundError for a missing file.

    >>> config = OFTConfig(oft_block_size=4, r=0, target_modules=["q_proj"])
    >>> get_peft_model(load_base(), config).save_pretrained("peft-oft")
    >>> loft_rs.convert_adapter("peft-oft", "loft")
    'loft'
    """
    for name, folder in (("src", src), ("dst", dst)):
        if not isinstance(folder, (str, os.PathLike)):
            raise TypeError(f"{name} must be the path of a folder, got {type(folder).__name__}")
    checkpoint = read(Path(src))
    _check_target(checkpoint, Path(dst))
    base = Base(checkpoint, base_model)
    readers: dict[str, Callable[[Checkpoint, Base, Progress | None], Converted]] = {
        "OFT": from_oft,
        "BOFT": from_boft,
        "HRA": from_hra,
        "PSOFT": from_psoft,
        "LOFT": from_loft,
    }
    converted = readers[checkpoint.kind](checkpoint, base, progress)
    _check_replaced(Path(dst), str(converted.config.peft_type.value))
    tensors = {
        f"{ROOT}{name}.{part}": value.detach().cpu().contiguous()
        for name, parts in converted.modules.items()
        for part, value in parts.items()
    }
    for each in (*checkpoint.notes, *converted.notes):
        warnings.warn(each, stacklevel=2)
    with whole_directory(dst) as folder:
        save_file(tensors | checkpoint.carried, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        for name in ("target_modules", "exclude_modules"):  # a set has no order, and the file should have one
            if isinstance(getattr(converted.config, name), set):
                setattr(converted.config, name, sorted(getattr(converted.config, name)))
        converted.config.save_pretrained(os.fspath(folder))
    return os.fspath(dst)


def _check_target(checkpoint: Checkpoint, dst: Path) -> None:
    """Refuse a folder to write that could not be written, or is the source."""
    check_writable(dst, folder=True)
    if dst.resolve() == checkpoint.folder.resolve():
        raise ValueError(f"dst: {dst} is src itself; give another folder")
    if (dst / "config.json").is_file() and not (dst / CONFIG_FILE).is_file():
        raise ValueError(f"dst: {dst} holds a model; give another folder")


def _check_replaced(dst: Path, kind: str) -> None:
    """Refuse to replace an adapter of another method, or a file that is not known to be one of
    this.
    """
    if (dst / CONFIG_FILE).is_file():
        found = read_peft_config(dst).get("peft_type")
        if found != kind:
            raise ValueError(f"dst: {dst} holds an adapter with peft_type {found!r}, not {kind!r}; give another folder")
