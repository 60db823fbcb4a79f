"""What PEFT itself saves passes pre-flight, and PEFT reads the published bundle as the very same adapter."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from gateway.registry.preflight import preflight
from tests.corpus import CONFIG, WEIGHTS, make_base

pytestmark = pytest.mark.heavy

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "down_proj"]},
    "rslora": {"target_modules": ["v_proj", "up_proj"], "use_rslora": True},
    "all-linear": {"target_modules": "all-linear"},
    "some layers": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "patterns": {
        "target_modules": ["q_proj", "k_proj"], "rank_pattern": {"k_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 3},
    },
    "expression": {"target_modules": r".*layers\.\d\.mlp\.(up|down)_proj"},
}  # fmt: skip


@pytest.mark.parametrize("kind", OPTIONS)
def test_the_published_bundle_is_the_adapter_that_peft_saved(tmp_path: Path, kind: str) -> None:
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    base = make_base(tmp_path / "base")
    torch.manual_seed(0)
    config = LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.1, task_type="CAUSAL_LM", init_lora_weights=False, **OPTIONS[kind]
    )
    trained = get_peft_model(AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32), config).eval()
    tokens = torch.arange(16).reshape(1, -1)
    with torch.no_grad():
        expected = trained(tokens).logits
    trained.save_pretrained(str(tmp_path / "saved"))
    saved = json.loads((tmp_path / "saved" / CONFIG).read_text())
    saved["auto_mapping"] = {"base_model_class": "Planted", "parent_library": "tests.planted_by_config"}
    (tmp_path / "saved" / CONFIG).write_text(json.dumps(saved))

    checked = preflight(tmp_path / "saved", base, max_rank=16)
    (tmp_path / "published").mkdir()
    (tmp_path / "published" / CONFIG).write_bytes(checked.config_bytes)
    (tmp_path / "published" / WEIGHTS).write_bytes((tmp_path / "saved" / WEIGHTS).read_bytes())
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    with torch.no_grad():
        alone = model(tokens).logits
        published = PeftModel.from_pretrained(model, str(tmp_path / "published")).eval()(tokens).logits

    assert torch.equal(published, expected)
    assert not torch.allclose(published, alone, atol=1e-3)
    assert "tests.planted_by_config" not in sys.modules
