"""Read safetensors files that nobody vouches for: nothing is executed, memory is bounded, every length is checked."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import Refused
from .manifest import parse_object

MAX_HEADER_BYTES = 2 * 2**20  # of 5,000 tensors at most; an adapter of an 80-layer model has 1,120
MAX_HEADER_STRUCTURE = 60_000
MAX_BASE_HEADER_BYTES = 64 * 2**20
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8,
}  # fmt: skip
_MAX_DIMENSIONS = 8


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file; `begin` and `end` count from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(descriptor: int, *, max_header_bytes: int = MAX_HEADER_BYTES) -> tuple[TensorInfo, ...]:
    """The tensors of an open file, in the order of their bytes. Raises `Refused(code="bad_safetensors")`."""
    size = os.fstat(descriptor).st_size
    if size < 8:
        raise _bad(f"it has {size} bytes, fewer than its first field")
    length = int.from_bytes(_pread(descriptor, 8, 0), "little")
    if length > max_header_bytes:
        raise _bad(f"its header claims {length} bytes, more than the {max_header_bytes} that are read")
    if 8 + length > size:
        raise _bad(f"its header claims {length} bytes and the file has {size}: it was cut short")
    # A tensor has twelve of these characters; a base model's file is the owner's own.
    most = MAX_HEADER_STRUCTURE if max_header_bytes <= MAX_HEADER_BYTES else None
    header = parse_object(_pread(descriptor, length, 8), "its header", code="bad_safetensors", max_structure=most)
    _check_metadata(header.pop("__metadata__", {}))
    tensors = [_tensor(name, value, start=8 + length) for name, value in header.items()]
    return _contiguous(tensors, start=8 + length, size=size)


def read_float32(descriptor: int, tensor: TensorInfo) -> NDArray[np.float32]:
    """One F32, F16 or BF16 tensor as float32. Raises `Refused` when the file ends inside it."""
    content = _pread(descriptor, tensor.end - tensor.begin, tensor.begin)
    match tensor.dtype:
        case "F32":
            flat = np.frombuffer(content, dtype="<f4")
        case "F16":
            with np.errstate(invalid="ignore"):  # a signalling NaN is still a NaN, for the caller to find
                flat = np.frombuffer(content, dtype="<f2").astype(np.float32)
        case "BF16":  # the upper half of a float32
            flat = (np.frombuffer(content, dtype="<u2").astype(np.uint32) << 16).view(np.float32)
        case other:
            raise ValueError(f"tensor {tensor.name!r} has dtype {other}, not a float that is read here")
    return flat.reshape(tensor.shape)


def chunks(descriptor: int, begin: int, end: int) -> Iterator[bytes]:
    """The bytes from `begin` to `end`, a mebibyte at a time."""
    while begin < end:
        content = _pread(descriptor, min(2**20, end - begin), begin)
        begin += len(content)
        yield content


def _tensor(name: str, value: Any, *, start: int) -> TensorInfo:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _bad(f"tensor {name[:80]!r} is not described by dtype, shape and data_offsets alone")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise _bad(f"tensor {name[:80]!r} has the unknown dtype {str(dtype)[:20]!r}")
    if not _are_sizes(shape) or len(shape) > _MAX_DIMENSIONS:
        raise _bad(f"tensor {name[:80]!r} has the shape {str(shape)[:60]}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _bad(f"tensor {name[:80]!r} has the data_offsets {str(offsets)[:60]}")
    if prod(shape) * DTYPE_BYTES[dtype] != offsets[1] - offsets[0]:
        raise _bad(
            f"tensor {name[:80]!r} holds {offsets[1] - offsets[0]} bytes, its shape and dtype need {prod(shape) * DTYPE_BYTES[dtype]}"
        )
    return TensorInfo(name, dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _contiguous(tensors: list[TensorInfo], *, start: int, size: int) -> tuple[TensorInfo, ...]:
    """Every byte of the data belongs to exactly one tensor: no overlap, no hole, no tail."""
    ordered = tuple(sorted(tensors, key=lambda tensor: (tensor.begin, tensor.end)))
    at = start
    for tensor in ordered:
        if tensor.begin != at:
            raise _bad(f"tensor {tensor.name[:80]!r} starts at byte {tensor.begin} where {at} was due")
        at = tensor.end
    if at != size:
        raise _bad(f"its tensors end at byte {at} and the file has {size}: it was cut short or extended")
    return ordered


def _check_metadata(value: Any) -> None:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise _bad("its __metadata__ is not a map of strings")


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _pread(descriptor: int, length: int, offset: int) -> bytes:
    parts = []
    while length:
        part = os.pread(descriptor, length, offset)
        if not part:
            raise _bad(f"it ends at byte {offset}, {length} bytes too early")
        parts.append(part)
        length, offset = length - len(part), offset + len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _bad(what: str) -> Refused:
    return Refused(f"the safetensors file is malformed: {what}; save or upload it again", code="bad_safetensors")
