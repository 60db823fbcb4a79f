"""A base model that trains in seconds: random weights, two narrow layers, the real tokenizer and chat template."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

REAL_BASE = Path("build/models/smollm2-135m-instruct")
_KEPT = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def make_tiny_base(folder: Path, *, seed: int = 0) -> Path:
    """Write the folder; the same seed gives the same weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    real = json.loads((REAL_BASE / "config.json").read_text())
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=real["vocab_size"], hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=1024, tie_word_embeddings=True,
        initializer_range=0.2,  # wide enough for an adapter on the linear layers to move the answers
        bos_token_id=real["bos_token_id"], eos_token_id=real["eos_token_id"], pad_token_id=real["pad_token_id"],
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in _KEPT:
        shutil.copyfile(REAL_BASE / name, folder / name)
    return folder
