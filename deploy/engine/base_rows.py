"""A vLLM plugin (`vllm.general_plugins`) that keeps adapters out of the base model's rows on CPU.

vLLM 0.32's CPU LoRA kernels index the stacked adapter weights with -1 for "no adapter", which torch reads as the last
slot: a base-model request that shares a batch with any adapter gets the adapter of the last slot. Here every kernel
sees only the rows that belong to an adapter. The linear layers, which are nearly all of the work, also run as one matrix
product per adapter instead of gathering a copy of the weights for every token (prefill with an adapter: 5 to 8 times
faster). Importing this module imports nothing; other platforms are left as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_KERNELS = ("bgmv_shrink", "bgmv_expand", "bgmv_expand_slice")


def register() -> None:
    """Patch the CPU kernels; called by vLLM in each of its processes, perhaps more than once."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    wrapper = punica_cpu.PunicaWrapperCPU
    if hasattr(wrapper, "adapter_rows"):
        return
    for name in _KERNELS:
        guarded = _only_adapter_rows(getattr(lora_ops, name))
        setattr(lora_ops, name, guarded)  # the sgmv kernels call these by their module's name
        setattr(punica_cpu, name, guarded)
    wrapper.adapter_rows, wrapper.adapter_rows_of = (), -1
    wrapper.update_metadata = _noting_rows(wrapper.update_metadata)
    wrapper.add_lora_linear = _one_product_per_adapter(wrapper.add_lora_linear)


def _only_adapter_rows(kernel: Callable[..., None]) -> Callable[..., None]:
    """`kernel` for the rows with an adapter; the others keep what is in the output."""

    def guarded(inputs: Any, weights: Any, output: Any, indices: Any, *rest: Any, **named: Any) -> None:
        rows = (indices >= 0).nonzero(as_tuple=True)[0]
        if len(rows) == len(indices):
            kernel(inputs, weights, output, indices, *rest, **named)
        elif len(rows):
            part = output[rows]
            kernel(inputs[rows], weights, part, indices[rows], *rest, **named)
            output[rows] = part

    return guarded


def _noting_rows(update: Callable[..., None]) -> Callable[..., None]:
    """`update_metadata` that also sorts the batch's rows by adapter, once for all layers."""

    def noting(self: Any, *arguments: Any, **named: Any) -> None:
        update(self, *arguments, **named)
        indices = self.token_lora_indices
        self.adapter_rows = tuple(
            (slot, (indices == slot).nonzero(as_tuple=True)[0]) for slot in indices.unique().tolist() if slot >= 0
        )
        self.adapter_rows_of = len(indices)

    return noting


def _one_product_per_adapter(gathering: Callable[..., None]) -> Callable[..., None]:
    """`add_lora_linear` that multiplies each adapter's rows at once; `gathering`, guarded, for what it was not made for."""

    def add(self: Any, y: Any, x: Any, a_stacked: Any, b_stacked: Any, scale: float, slices: Any, **named: Any) -> None:
        flat_y, flat_x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        if len(flat_x) != self.adapter_rows_of or not (flat_x.dtype == flat_y.dtype == a_stacked[0].dtype):
            gathering(self, y, x, a_stacked, b_stacked, scale, slices, **named)
            return
        for slot, rows in self.adapter_rows:
            own = flat_x if len(rows) == len(flat_x) else flat_x[rows]
            start = 0
            for a, b, width in zip(a_stacked, b_stacked, slices, strict=True):
                change = (own @ a[slot, 0].T).mul_(scale) @ b[slot, 0].T
                part = flat_y[:, start : start + width]
                if own is flat_x:
                    part += change
                else:
                    part.index_add_(0, rows, change)
                start += width

    return add
