"""Judging what an engine answers about a version that it has loaded."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import pytest

from gateway.engine.admin import EngineAdmin
from gateway.engine.probe import LEAST_ALLOWED_GAP_NATS, Prober, judge_probe, read_reference
from gateway.errors import Refused, Unavailable
from gateway.registry.reference import Reference, ReferencePrompt

DRAW = random.Random(7)
PROMPTS = [
    ReferencePrompt(
        token_ids=(number + 1,),
        candidates=tuple(range(10)),
        base=tuple(DRAW.uniform(-9, -1) for _ in range(10)),
        adapter=tuple(DRAW.uniform(-9, -1) for _ in range(10)),
    )
    for number in range(16)
]
BASE = [list(prompt.base) for prompt in PROMPTS]
ADAPTED = [list(prompt.adapter) for prompt in PROMPTS]


def rounded(answers: list[list[float]], noise: float, seed: int) -> list[list[float]]:
    """As an engine gives them whose batches move a log-probability by up to `noise` nats."""
    draw = random.Random(seed)
    return [[value + draw.uniform(-noise, noise) for value in answer] for answer in answers]


def at_strength(share: float) -> list[list[float]]:
    return [[b + share * (a - b) for a, b in zip(*pair, strict=True)] for pair in zip(ADAPTED, BASE, strict=True)]


@pytest.mark.invariant(4)
@pytest.mark.parametrize("noise", [0.0, 0.1, 0.2, 0.5])
def test_passes_what_agrees_with_its_reference(noise: float) -> None:
    found = judge_probe(PROMPTS, rounded(ADAPTED, noise, 1), rounded(BASE, noise, 2))

    assert found.fault is None
    assert found.is_well


@pytest.mark.invariant(4)
@pytest.mark.parametrize("noise", [0.0, 0.2, 0.5])
@pytest.mark.parametrize(("share", "code"), [(0.0, "no_effect"), (0.5, "parity"), (2.0, "parity")])
def test_finds_an_adapter_that_is_not_applied_in_full(noise: float, share: float, code: str) -> None:
    found = judge_probe(PROMPTS, rounded(at_strength(share), noise, 1), rounded(BASE, noise, 2))

    assert found.fault is not None
    assert found.fault.code == code


@pytest.mark.invariant(4)
def test_finds_weights_that_match_nothing_however_faint_the_effect() -> None:
    faint = [p.model_copy(update={"adapter": tuple(b + 0.01 for b in p.base)}) for p in PROMPTS]

    found = judge_probe(faint, BASE, BASE)

    assert found.fault is not None
    assert found.fault.code == "no_effect"


@pytest.mark.invariant(4)
def test_finds_weights_that_are_not_the_verified_ones() -> None:
    off = LEAST_ALLOWED_GAP_NATS + 0.01
    found = judge_probe(PROMPTS, [[value - off for value in answer] for answer in ADAPTED], BASE)

    assert found.fault is not None
    assert found.fault.code == "parity"
    assert "0.260" in found.fault.reason


@pytest.mark.invariant(4)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("of", ["adapter", "base"])
def test_finds_numbers_that_are_none(bad: float, of: str) -> None:
    spoiled = [[bad, *ADAPTED[0][1:]], *ADAPTED[1:]]
    adapter, base = (spoiled, BASE) if of == "adapter" else (ADAPTED, spoiled)

    found = judge_probe(PROMPTS, adapter, base)

    assert found.fault is not None
    assert found.fault.code == "non_finite"


@pytest.mark.invariant(4)
def test_an_effect_that_drowns_in_noise_is_neither_a_fault_nor_well() -> None:
    faint = [p.model_copy(update={"adapter": tuple(b + 0.01 for b in p.base)}) for p in PROMPTS]

    found = judge_probe(faint, rounded(BASE, 0.5, 1), rounded(BASE, 0.5, 2))

    assert (found.fault, found.is_well) == (None, False)


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


class Engine:
    """Answers the probe's prompts; the adapter at these strengths, one for each look."""

    base_model = "tiny"

    def __init__(self, *strengths: float) -> None:
        self.looks = [at_strength(share) for share in strengths]
        self.asked = 0

    async def first_token(self, model: str, prompt: Sequence[int], candidates: Sequence[int]) -> list[float]:
        number = prompt[0] - 1
        if model == self.base_model:
            return BASE[number]
        look = self.asked // len(PROMPTS)
        self.asked += 1
        return self.looks[look][number]


@pytest.mark.invariant(4)
@pytest.mark.parametrize(
    ("strengths", "code"), [((1.0,), None), ((0.5, 1.0), None), ((0.5, 0.5), "parity"), ((0.0, 0.0), "no_effect")]
)
async def test_a_fault_must_show_in_every_look(strengths: tuple[float, ...], code: str | None) -> None:
    engine, reference = Engine(*strengths), Reference(schema=1, digest="d" * 64, prompts=tuple(PROMPTS))

    fault = await Prober(cast(EngineAdmin, engine)).probe("support.v1", reference)

    assert (fault.code if fault else None) == code
    assert engine.asked == len(strengths) * len(PROMPTS)
