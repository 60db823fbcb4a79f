"""Judging what an engine answers: the probe of a version, the self-test of an engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gateway.engine.probe import MAX_MEDIAN_DIFFERENCE_NATS, judge_probe, read_reference
from gateway.engine.self_test import judge_self_test, write_adapter
from gateway.errors import Refused, Unavailable

BASE = [-1.0, -2.0, -3.0]
ADAPTED = [-1.4, -1.5, -3.3]


@pytest.mark.invariant(4)
def test_passes_what_agrees_with_its_reference() -> None:
    assert judge_probe(ADAPTED, BASE, [value + 0.1 for value in ADAPTED]) is None


@pytest.mark.invariant(4)
def test_finds_an_adapter_without_effect() -> None:
    fault = judge_probe(BASE, BASE, ADAPTED)

    assert fault is not None
    assert fault.code == "no_effect"


@pytest.mark.invariant(4)
def test_finds_weights_that_are_not_the_verified_ones() -> None:
    off = MAX_MEDIAN_DIFFERENCE_NATS + 0.01
    fault = judge_probe([value - off for value in ADAPTED], BASE, ADAPTED)

    assert fault is not None
    assert fault.code == "parity"
    assert "0.260" in fault.reason


@pytest.mark.invariant(4)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_finds_numbers_that_are_none(bad: float) -> None:
    for adapter, base in (([bad, -1.5, -3.3], BASE), (ADAPTED, [bad, -2.0, -3.0])):
        fault = judge_probe(adapter, base, ADAPTED)

        assert fault is not None
        assert fault.code == "non_finite"


def test_one_candidate_far_off_is_noise_and_half_of_them_is_not() -> None:
    assert judge_probe([-1.4, -1.5, -9.0], BASE, ADAPTED) is None
    assert judge_probe([-1.4, -6.5, -9.0], BASE, ADAPTED) is not None


def a_reference(**fields: object) -> dict[str, object]:
    prompt = {"token_ids": [1, 2], "candidates": [3, 4], "adapter": [-1, -2], "base": [-1.5, -2.5]}
    return {"schema": 1, "digest": "d" * 64, "prompts": [prompt | fields], "fingerprint": {"torch": "2"}}


def test_reads_a_reference(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps(a_reference()))

    assert read_reference(tmp_path / "r.json").prompts[0].candidates == (3, 4)


@pytest.mark.parametrize(
    "content",
    [
        None, "", "{}", '{"digest":"d","prompts":[]}',
        json.dumps(a_reference(candidates=list(range(21)))),
        json.dumps(a_reference(adapter=[-1.0])),
        json.dumps(a_reference(token_ids=[])),
    ],
)  # fmt: skip
def test_refuses_what_is_no_reference(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "r.json").write_text(content)

    with pytest.raises(Refused) as refused:
        read_reference(tmp_path / "r.json")

    assert refused.value.code == "no_reference"


def test_a_reference_that_cannot_be_read_now_is_not_called_absent(tmp_path: Path) -> None:
    with pytest.raises(Unavailable):  # a directory: EISDIR, standing for a disk that fails
        read_reference(tmp_path)


@pytest.mark.invariant(3)
def test_self_test_passes_when_base_is_the_same_in_company() -> None:
    assert judge_self_test(BASE, [BASE, BASE], [value - 3 for value in BASE]) is None


@pytest.mark.invariant(3)
def test_self_test_fails_when_one_answer_in_company_is_off() -> None:
    fault = judge_self_test(BASE, [BASE, [-1.0, -2.0, -4.0]], [value - 3 for value in BASE])

    assert fault is not None
    assert fault.code == "self_test_failed"


@pytest.mark.invariant(3)
@pytest.mark.parametrize(("beside", "adapter"), [([], [-9.0, -9.0, -9.0]), ([BASE], BASE)])
def test_self_test_that_proves_nothing_does_not_pass(beside: list[list[float]], adapter: list[float]) -> None:
    fault = judge_self_test(BASE, beside, adapter)

    assert fault is not None
    assert fault.code == "self_test_void"


def test_the_test_adapter_is_made_once_and_fits_the_base(tmp_path: Path) -> None:
    shapes = {"model.layers.0.mlp.down_proj": (8, 16), "model.layers.0.self_attn.q_proj": (8, 8)}

    directory = write_adapter(tmp_path, shapes)
    before = (directory / "adapter_model.safetensors").stat().st_mtime_ns

    assert write_adapter(tmp_path, shapes) == directory
    assert (directory / "adapter_model.safetensors").stat().st_mtime_ns == before
    assert json.loads((directory / "adapter_config.json").read_text())["target_modules"] == ["down_proj"]
    assert write_adapter(tmp_path, {"model.layers.0.mlp.down_proj": (8, 32)}) != directory
