import json
import random
from pathlib import Path

import pytest

from evals.errors import EvaluationError
from evals.gates import Verdict
from evals.parity import judge_parity, load_reference
from gateway.registry.reference import Reference, ReferencePrompt

DIGEST = "a" * 64
ADAPTER, BASE = (-1.0, -2.0, -3.0), (-2.0, -1.0, -3.5)


def a_reference(adapter: tuple[float, ...] = ADAPTER, base: tuple[float, ...] = BASE) -> Reference:
    prompt = ReferencePrompt(token_ids=(1, 2), candidates=(5, 6, 7), adapter=adapter, base=base)
    return Reference.model_validate({"schema": 1, "digest": DIGEST, "prompts": [prompt] * 4, "fingerprint": {}})


def served(values: tuple[float, ...], noise: float = 0.0) -> list[list[float]]:
    return [[value + noise for value in values]] * 4


@pytest.mark.parametrize(
    ("candidate", "base", "verdict", "complaint"),
    [
        (served(ADAPTER), served(BASE), Verdict.PASSED, "median gap to the verified weights 0.000"),
        (served(ADAPTER, 0.1), served(BASE, -0.1), Verdict.PASSED, "0.100 nats"),
        (served(BASE), served(BASE), Verdict.FAILED, "not applied"),
        (served(BASE, 0.02), served(BASE), Verdict.FAILED, "not applied"),
        (served((-3.0, -0.5, -9.0)), served(BASE), Verdict.FAILED, "other weights are served"),
        (served(ADAPTER), served(BASE, 0.6), Verdict.ERROR, "disagrees even about the base"),
    ],
)
def test_verdict(candidate: list[list[float]], base: list[list[float]], verdict: Verdict, complaint: str) -> None:
    found = judge_parity(a_reference(), candidate, base, max_median_gap=0.25)

    assert found.verdict is verdict
    assert complaint in found.reason


def noisy(strength: float, noise: float, seed: int) -> tuple[Reference, list[list[float]], list[list[float]]]:
    """A reference of sixteen prompts, and what an engine answers that applies so much of the adapter."""
    draw = random.Random(seed)
    prompts, candidate, base = [], [], []
    for number in range(16):
        plain = tuple(draw.uniform(-9, -1) for _ in range(15))
        tuned = tuple(value + draw.uniform(-3, 3) for value in plain)
        prompts.append(ReferencePrompt(token_ids=(number,), candidates=tuple(range(15)), adapter=tuned, base=plain))
        candidate.append(
            [b + strength * (a - b) + draw.uniform(-noise, noise) for a, b in zip(tuned, plain, strict=True)]
        )
        base.append([b + draw.uniform(-noise, noise) for b in plain])
    return Reference(schema=1, digest=DIGEST, prompts=tuple(prompts)), candidate, base


@pytest.mark.parametrize("noise", [0.0, 0.2, 0.5])
@pytest.mark.parametrize(("strength", "verdict"), [(0.0, Verdict.FAILED), (0.5, Verdict.FAILED), (1.0, Verdict.PASSED)])
def test_the_noise_of_batches_hides_no_half_adapter_and_condemns_no_whole_one(
    noise: float, strength: float, verdict: Verdict
) -> None:
    for seed in range(20):
        found = judge_parity(*noisy(strength, noise, seed), max_median_gap=0.25)

        assert found.verdict is verdict, found.reason


def test_a_faint_adapter_that_is_applied_passes() -> None:
    faint = (-2.01, -1.01, -3.49)

    found = judge_parity(a_reference(faint), served(faint, 0.05), served(BASE, 0.05), max_median_gap=0.25)

    assert found.verdict is Verdict.PASSED


def test_a_faint_adapter_that_is_not_applied_fails() -> None:
    found = judge_parity(
        a_reference((-2.01, -1.01, -3.49)), served(BASE, 0.05), served(BASE, 0.05), max_median_gap=0.25
    )

    assert found.verdict is Verdict.FAILED


def test_a_reference_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "reference.json"
    path.write_text(a_reference().model_dump_json(by_alias=True))

    assert load_reference(path, digest=DIGEST) == a_reference()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(None, "never verified"), ("{", "damaged"), (json.dumps({"schema": 1}), "damaged")],
)
def test_a_missing_or_damaged_reference_is_told(tmp_path: Path, content: str | None, complaint: str) -> None:
    path = tmp_path / "reference.json"
    if content is not None:
        path.write_text(content)

    with pytest.raises(EvaluationError, match=complaint):
        load_reference(path, digest=DIGEST)


def test_anothers_reference_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "reference.json"
    path.write_text(a_reference().model_dump_json(by_alias=True))

    with pytest.raises(EvaluationError, match="is about aaaaaaaaaaaa, not bbbbbbbbbbbb"):
        load_reference(path, digest="b" * 64)
