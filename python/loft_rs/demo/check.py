"""Does an adapter survive the disk? Reload into a fresh base, and exported LoRA in stock PEFT in
another process.

Both differences are the largest absolute difference between last hidden states on real tokens of
one probe batch, in fp32.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from .encoder import TokenPairs, load_encoder

PROBE = 64


class Probe:
    """A batch of held-out passages and the outputs that must come back."""

    def __init__(self, pairs: TokenPairs, base: Path) -> None:
        tokens, mask = pairs.passages.batch(range(min(PROBE, len(pairs))))
        self.inputs = {"input_ids": tokens, "attention_mask": mask}
        self.base = base

    @torch.no_grad()
    def output(self, model: nn.Module) -> Tensor:
        return model(**self.inputs).last_hidden_state

    def difference(self, one: Tensor, other: Tensor) -> float:
        return ((one - other).abs().amax(-1) * self.inputs["attention_mask"]).max().item()

    def reload_difference(self, output: Tensor, adapter: Path) -> float:
        """Against the adapter read from disk into a base read from disk."""
        from peft import PeftModel

        return self.difference(output, self.output(PeftModel.from_pretrained(load_encoder(self.base), adapter).eval()))

    def export_differences(
        self, outputs: Mapping[str, Tensor], exports: Mapping[str, Path], tick: Callable[[], None]
    ) -> dict[str, float]:
        """Against each exported LoRA, loaded by stock PEFT in a process in which loft_rs cannot be
        imported.
        """
        from safetensors.torch import load_file, save_file

        with tempfile.TemporaryDirectory() as folder:
            batch, out = Path(folder, "batch.safetensors"), Path(folder, "hidden.safetensors")
            save_file({name: each.contiguous() for name, each in self.inputs.items()}, batch)
            named = [f"{name}={path}" for name, path in exports.items()]
            _run_alone([str(self.base), str(batch), str(out), *named], tick)
            hidden = load_file(out)
        return {name: self.difference(outputs[name], hidden[name]) for name in exports}


def _run_alone(arguments: list[str], tick: Callable[[], None]) -> None:
    script = Path(__file__).with_name("stock_peft.py")
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    # -P: the script's own folder is part of loft_rs, and stays off the path.
    command = [sys.executable, "-P", str(script), *arguments]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as alone:
        while True:
            try:
                _, errors = alone.communicate(timeout=1)
                break
            except subprocess.TimeoutExpired:
                tick()
    if alone.returncode:
        last = (errors.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"stock PEFT could not use the exported LoRA: {last}")
