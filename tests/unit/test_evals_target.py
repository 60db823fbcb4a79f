"""The target check decided directly: who is asked, against whom the version is held, and what that makes the verdict."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import pytest

from evals.config import Improvement, Regression, TargetCheck, TargetGates
from evals.errors import FingerprintMismatch
from evals.gates import Verdict
from evals.items import Message
from evals.report import CheckReport
from evals.scene import Scene
from evals.scores import Fingerprint, ScoreCache
from evals.serving import Generated, Serving, Target
from evals.target import run_target

BASE, STABLE, CANDIDATE = Target("tiny", "a" * 64), Target("support@1", "b" * 64), Target("support@2", "c" * 64)
CONDITIONS = Fingerprint(backend="gateway", base_digest=BASE.digest, engine="e1", dtype="d", harness="h")


class Answering:
    """Each target is right on the first so many of the items; all answers come from one engine."""

    def __init__(self, *, engine: str = "e1", **right: int) -> None:
        self.right, self.engine = right, engine
        self.asked: dict[str, int] = {}

    def chats(
        self, target: Target, prompts: Sequence[Sequence[Message]], *, max_tokens: int, stop: Sequence[str] = (),
        done: Callable[[int], None] = lambda _: None,
    ) -> list[Generated]:  # fmt: skip
        self.asked[target.name] = self.asked.get(target.name, 0) + len(prompts)
        right = self.right[target.name.replace("@", "")]
        return [
            Generated(f"answer {number}" if number < right else "no idea", "stop", self.engine)
            for prompt in prompts
            for number in [int(prompt[-1].content.split()[-1])]
        ]


def judged(
    folder: Path, serving: Answering, gates: TargetGates, *, stable: Target = STABLE, training: Sequence[str] = ()
) -> CheckReport:
    rows = [
        {"messages": [{"role": "user", "content": f"question {n}"}, {"role": "assistant", "content": f"answer {n}"}]}
        for n in range(100)
    ]
    (folder / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen = folder / "train.jsonl"
    seen.write_text("".join(json.dumps(rows[int(number)]) + "\n" for number in training))
    scene = Scene(
        folder=folder, serving=cast(Serving, serving), candidate=CANDIDATE, base=BASE, stable=stable,
        cache=ScoreCache(folder / "scores"), fingerprint=CONDITIONS, local_fingerprint=CONDITIONS, base_path=folder,
        candidate_dir=folder, reference=folder, training_files=(seen,) if training else (), look=1, say=lambda _: None,
    )  # fmt: skip
    return run_target(scene, TargetCheck(data="held_out.jsonl", gates=gates))


def test_the_stable_version_is_asked_and_not_base_in_its_place(tmp_path: Path) -> None:
    serving = Answering(tiny=10, support1=95, support2=60)

    report = judged(tmp_path, serving, TargetGates(stable=Regression(max_drop=0.05)))

    assert report.verdict is Verdict.FAILED
    assert [line.baseline for line in report.comparisons] == ["support@1"]
    assert serving.asked == {"support@1": 100, "support@2": 100}


@pytest.mark.parametrize(("right", "verdict"), [(95, Verdict.PASSED), (70, Verdict.FAILED), (52, Verdict.FAILED)])
def test_every_gate_must_pass(tmp_path: Path, right: int, verdict: Verdict) -> None:
    """Better than base and worse than stable is worse."""
    gates = TargetGates(base=Improvement(), stable=Regression(max_drop=0.05))

    report = judged(tmp_path, Answering(tiny=10, support1=94, support2=right), gates)

    assert report.verdict is verdict


def test_what_is_no_better_than_base_does_not_pass(tmp_path: Path) -> None:
    report = judged(tmp_path, Answering(tiny=60, support2=61), TargetGates(base=Improvement()), stable=BASE)

    assert report.verdict is Verdict.INCONCLUSIVE


def test_with_nothing_to_compare_with_nothing_passes(tmp_path: Path) -> None:
    report = judged(tmp_path, Answering(support2=100), TargetGates(stable=Regression(max_drop=0.05)), stable=CANDIDATE)

    assert report.verdict is Verdict.INCONCLUSIVE
    assert "nothing to compare with" in report.reason


def test_an_answer_of_another_engine_ends_the_check(tmp_path: Path) -> None:
    with pytest.raises(FingerprintMismatch, match="e2"):
        judged(tmp_path, Answering(engine="e2", tiny=0, support2=100), TargetGates(base=Improvement()), stable=BASE)


def test_a_set_of_which_training_saw_much_judges_nobody(tmp_path: Path) -> None:
    seen = [str(number) for number in range(30)]

    report = judged(
        tmp_path, Answering(tiny=0, support2=100), TargetGates(base=Improvement()), stable=BASE, training=seen
    )

    assert report.verdict is Verdict.ERROR
    assert "void" in report.reason
