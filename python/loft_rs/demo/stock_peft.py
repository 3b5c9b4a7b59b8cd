"""Run as a script of its own: encode a batch with an exported LoRA in stock PEFT, where loft_rs
cannot be imported.

usage: stock_peft.py BASE BATCH.safetensors OUT.safetensors NAME=ADAPTER...
"""

import sys

sys.modules["loft_rs"] = None  # type: ignore[assignment]  # any `import loft_rs` from here on raises ModuleNotFoundError

from pathlib import Path  # noqa: E402

import torch  # noqa: E402
from peft import PeftModel  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModel  # noqa: E402


def main(base: str, batch: str, out: str, *named: str) -> None:
    inputs = load_file(batch)
    hidden = {}
    for each in named:
        name, _, adapter = each.partition("=")
        model = PeftModel.from_pretrained(AutoModel.from_pretrained(base, dtype=torch.float32), adapter).eval()
        with torch.no_grad():
            hidden[name] = model(**inputs).last_hidden_state.contiguous()
    if any(module.split(".")[0] == "loft_rs" and found for module, found in sys.modules.items()):
        raise SystemExit("loft_rs was imported")
    save_file(hidden, Path(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
