"""The safetensors reader against files that lie."""

from __future__ import annotations

import json
import os
import struct
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gateway.errors import Refused
from gateway.registry.tensors import MAX_HEADER_BYTES, TensorInfo, read_float32, read_header
from tests.corpus import encode, write_raw, write_safetensors

SHAPE, OFFSETS = [2, 3], [0, 24]


@contextmanager
def opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def header_of(path: Path) -> tuple[TensorInfo, ...]:
    with opened(path) as descriptor:
        return read_header(descriptor)


def a_header(**changes: Any) -> dict[str, Any]:
    return {"x": {"dtype": "F32", "shape": SHAPE, "data_offsets": OFFSETS, **changes}}


@pytest.mark.parametrize(("dtype", "tolerance"), [("F32", 0.0), ("F16", 1e-3), ("BF16", 8e-3)])
def test_reads_every_float_that_adapters_come_in(tmp_path: Path, dtype: str, tolerance: float) -> None:
    values = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    write_safetensors(tmp_path / "w", {"a": (dtype, values), "b": (dtype, values.T.copy())})

    with opened(tmp_path / "w") as descriptor:
        first, second = read_header(descriptor)
        found = read_float32(descriptor, second)

    assert (first.name, second.shape, str(found.dtype)) == ("a", (7, 5), "float32")
    np.testing.assert_allclose(found, values.T, rtol=tolerance)


def test_reads_what_the_reference_library_writes(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    values = {name: np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32) for name in ("z", "a")}
    save_file(values, tmp_path / "w")

    with opened(tmp_path / "w") as descriptor:
        found = {tensor.name: read_float32(descriptor, tensor) for tensor in read_header(descriptor)}

    assert sorted(found) == ["a", "z"]
    np.testing.assert_array_equal(found["z"], values["z"])


def test_bfloat16_keeps_infinity_and_nan(tmp_path: Path) -> None:
    values = np.array([np.inf, -np.inf, np.nan, 1.5], dtype=np.float32)
    write_safetensors(tmp_path / "w", {"a": ("BF16", values)})

    with opened(tmp_path / "w") as descriptor:
        found = read_float32(descriptor, read_header(descriptor)[0])

    np.testing.assert_array_equal(found, values)


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "F33"}, {"dtype": 4}, {"dtype": ["F32"]}, {"shape": [2, -3]}, {"shape": [2, 3.0]}, {"shape": [True, 6]}, {"shape": "23"},
        {"shape": [2, 4]}, {"shape": [1] * 9}, {"shape": [2**62, 2**62]}, {"data_offsets": [0, 23]}, {"data_offsets": [24, 0]},
        {"data_offsets": [4, 28]}, {"data_offsets": [0]}, {"data_offsets": [0, 2**64]}, {"data_offsets": None}, {"more": 1},
    ],
)  # fmt: skip
def test_refuses_a_description_that_does_not_add_up(tmp_path: Path, changes: dict[str, Any]) -> None:
    write_raw(tmp_path / "w", json.dumps(a_header(**changes)).encode(), bytes(24))

    with pytest.raises(Refused) as caught:
        header_of(tmp_path / "w")

    assert caught.value.code == "bad_safetensors"


@pytest.mark.parametrize(
    "header",
    [
        b'{"x":{"dtype":"F32","shape":[6],"data_offsets":[0,24]},"x":{"dtype":"F32","shape":[6],"data_offsets":[0,24]}}',
        b'{"x":{"dtype":"F32","shape":[6],"data_offsets":[0,24],"shape":[2,3]}}',
        b'{"x":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"y":{"dtype":"F32","shape":[4],"data_offsets":[8,24]}}',
        b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"y":{"dtype":"F32","shape":[2],"data_offsets":[16,24]}}',
        b'{"x":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
        b'{"__metadata__":{"a":1},"x":{"dtype":"F32","shape":[6],"data_offsets":[0,24]}}',
        b'{"__metadata__":[],"x":{"dtype":"F32","shape":[6],"data_offsets":[0,24]}}',
        b'{"x":{"dtype":"F32","shape":[NaN],"data_offsets":[0,24]}}', b'{"x":null}', b"[]", b"", b"\xff\xfe", b'{"x":' + b"9" * 5000 + b"}",
    ],
    ids=["twice", "field twice", "overlap", "hole", "tail", "metadata number", "metadata list", "NaN", "null", "list", "nothing", "not text",
         "long number"],
)  # fmt: skip
def test_refuses_a_malformed_header(tmp_path: Path, header: bytes) -> None:
    write_raw(tmp_path / "w", header, bytes(24))

    with pytest.raises(Refused) as caught:
        header_of(tmp_path / "w")

    assert caught.value.code == "bad_safetensors"


@pytest.mark.parametrize("length", [MAX_HEADER_BYTES + 1, 2**32, 2**63, 2**64 - 1])
def test_a_header_bomb_is_refused_before_anything_is_allocated(tmp_path: Path, length: int) -> None:
    with (tmp_path / "w").open("wb") as file:
        file.write(struct.pack("<Q", length))
        file.truncate(8 + min(length, 2**33))  # sparse: the bytes that are claimed do exist
    tracemalloc.start()

    with pytest.raises(Refused) as caught:
        header_of(tmp_path / "w")

    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert caught.value.code == "bad_safetensors"
    assert peak < 2**20


def test_a_header_of_more_tensors_than_any_adapter_has_is_refused_unparsed(tmp_path: Path) -> None:
    header = b"{" + b",".join(b'"%d":{}' % index for index in range(180_000)) + b"}"
    assert 0.8 * MAX_HEADER_BYTES < len(header) <= MAX_HEADER_BYTES
    write_raw(tmp_path / "w", header)
    tracemalloc.start()

    with pytest.raises(Refused):
        header_of(tmp_path / "w")

    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * MAX_HEADER_BYTES


@settings(max_examples=250, deadline=1000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200))
@example(content=struct.pack("<Q", 2) + b"{}")
def test_any_bytes_are_read_or_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w").write_bytes(content)

    _read_all_or_refuse(tmp_path / "w")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10) | st.sampled_from(["F32", "BF16"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "x"]), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=250, deadline=1000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=st.dictionaries(st.text(max_size=5), json_values, max_size=3), body=st.binary(max_size=32))
def test_any_json_header_is_read_or_refused(tmp_path: Path, header: dict[str, Any], body: bytes) -> None:
    write_raw(tmp_path / "w", json.dumps(header).encode(), body)

    _read_all_or_refuse(tmp_path / "w")


@settings(max_examples=250, deadline=1000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(min_value=0), value=st.integers(0, 255), cut=st.integers(min_value=0, max_value=400))
def test_a_good_file_with_a_byte_changed_is_read_or_refused(tmp_path: Path, at: int, value: int, cut: int) -> None:
    path = tmp_path / "w"
    write_safetensors(path, {"a": ("F32", np.ones((2, 2), np.float32)), "b": ("BF16", np.ones(3, np.float32))})
    content = bytearray(path.read_bytes())
    content[at % len(content)] = value
    path.write_bytes(content[: max(len(content) - cut, 0)])

    _read_all_or_refuse(path)


def _read_all_or_refuse(path: Path) -> None:
    with opened(path) as descriptor:
        try:
            tensors = read_header(descriptor)
        except Refused:
            return
        size = path.stat().st_size
        for tensor in tensors:
            assert 8 <= tensor.begin <= tensor.end <= size
            if tensor.dtype in ("F32", "F16", "BF16"):
                assert read_float32(descriptor, tensor).shape == tensor.shape


def test_encoding_of_the_corpus_is_that_of_the_format() -> None:
    assert encode("BF16", np.array([1.0, -2.0], np.float32)) == b"\x80\x3f\x00\xc0"
