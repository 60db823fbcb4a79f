"""The plugin's kernels against arithmetic written out row by row, on vLLM's own CPU wrapper."""

from __future__ import annotations

import subprocess
import sys

import pytest

# In a process of its own: vLLM patches much of torch when it is imported.
CHECK = r"""
import sys
import torch
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from deploy.engine import base_rows

if sys.argv[1] == "with":
    base_rows.register()
    base_rows.register()
torch.manual_seed(0)
SLOTS, RANK, WIDTHS, INPUTS = 3, 4, (6, 2), 8
worst_base = worst_adapter = 0.0
for dtype, weights_dtype in ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)):
    for tokens in ([-1, -1, -1], [0, 0], [-1, 0, -1, 1], [2, 2, -1, 0, 1, -1], [1, -1], [-1]):
        wrapper = PunicaWrapperCPU(64, 64, "cpu")
        ids = [slot + 1 if slot >= 0 else 0 for slot in tokens]
        wrapper.update_metadata(LoRAMapping(tuple(ids), tuple(ids), is_prefill=True), [1, 2, 3], SLOTS, 100)
        a = tuple(torch.randn(SLOTS, 1, RANK, INPUTS, dtype=weights_dtype) for _ in WIDTHS)
        b = tuple(torch.randn(SLOTS, 1, width, RANK, dtype=weights_dtype) for width in WIDTHS)
        x = torch.randn(len(tokens), INPUTS, dtype=dtype)
        y = torch.randn(len(tokens), sum(WIDTHS), dtype=dtype)
        expected, start = y.double(), 0
        for one_a, one_b, width in zip(a, b, WIDTHS):
            for row, slot in enumerate(tokens):
                if slot >= 0:
                    expected[row, start:start + width] += one_b[slot, 0].double() @ (one_a[slot, 0].double() @ x[row].double())
            start += width
        before = y.clone()
        wrapper.add_lora_linear(y, x, a, b, 1.0, WIDTHS)
        for row, slot in enumerate(tokens):
            off = (y[row].double() - expected[row]).abs().max() / expected.abs().max()
            if slot < 0:
                worst_base = max(worst_base, float((y[row] - before[row]).abs().max()))
            else:
                worst_adapter = max(worst_adapter, float(off))
        logits = torch.randn(len(tokens), 5, dtype=dtype)
        kept = logits.clone()
        wrapper.add_lora_logits(logits, x, a[0], torch.randn(SLOTS, 1, 5, RANK, dtype=weights_dtype), 1.0)
        for row, slot in enumerate(tokens):
            if slot < 0:
                worst_base = max(worst_base, float((logits[row] - kept[row]).abs().max()))
print("worst", worst_base, worst_adapter)
"""


def worst(plugin: str) -> tuple[float, float]:
    """Largest change of a base row, and largest relative error of an adapter's."""
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHECK, plugin], capture_output=True, text=True, check=False, timeout=300
    )
    assert found.returncode == 0, found.stderr[-3000:]
    base, adapter = found.stdout.rpartition("worst")[2].split()
    return float(base), float(adapter)


@pytest.mark.heavy
@pytest.mark.invariant(3)
def test_base_rows_are_untouched_and_adapters_rows_are_right() -> None:
    base, adapter = worst("with")

    assert base == 0
    assert adapter < 0.02  # bf16 rounds twice


@pytest.mark.heavy
@pytest.mark.mutant(3)
def test_without_the_plugin_base_rows_get_the_last_slots_weights() -> None:
    base, _ = worst("without")

    assert base > 0.1
