"""The target check: is the version better at what it was made for? Generation on held-out items, through the gateway."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from .config import Improvement, Regression, TargetCheck, suite_file
from .gates import Verdict, combine, judge_improvement, judge_regression
from .items import (
    MOST_CONTAMINATED,
    ChatItem,
    Message,
    contamination,
    digest_of,
    few_shot_turns,
    load_chat_items,
    with_examples,
)
from .metrics import scorer, valid_format
from .report import MOST_EXAMPLES, CheckReport, Comparison, Example, Score, Subject, score
from .scene import Scene, comparison, since
from .scores import Answer, ScoreSet, check_comparable
from .serving import Target
from .statistics import paired_counts

CHUNK = 64  # answers are saved this often: an attempt that dies loses at most so many
GATE_NAMES: dict[Subject, str] = {
    "stable": "no regression",
    "base": "improvement",
    "few_shot": "improvement over examples in the prompt",
}


@dataclass(frozen=True, slots=True)
class _Answers:
    """One subject's answers to a list of items, and whether each is right."""

    scores: ScoreSet
    right: dict[str, bool]


def run_target(scene: Scene, check: TargetCheck) -> CheckReport:
    """Candidate against base, few-shot base and stable, as the suite asks."""
    started = time.monotonic()
    items = load_chat_items(suite_file(scene.folder, check.data))[: check.items]
    items, warnings, is_void = _uncontaminated(scene, check, items)
    if is_void or not items:
        reason = f"{warnings[-1]}: the set is void" if is_void else f"{check.data} has no items"
        return CheckReport(kind=check.kind, name=check.name, verdict=Verdict.ERROR, reason=reason, warnings=warnings)
    asked: dict[Subject, _Answers] = {"candidate": _generate(scene, check, scene.candidate, check.name, items)}
    comparisons: list[Comparison] = []
    for subject, target, gate in _baselines(scene, check):
        chosen = items[: gate.items]
        asked[subject] = _generate(scene, check, target, check.name, chosen, few_shot=subject == "few_shot")
        comparisons.append(_compare(check, subject, target, gate, asked, chosen))
    verdict = combine([line.verdict for line in comparisons if line.verdict])
    scores = [line for subject, answers in asked.items() for line in _scores(check, subject, check.name, answers)]
    if verdict is not Verdict.FAILED:
        scores += _extra_scores(scene, check)
    return CheckReport(
        kind=check.kind, name=check.name, verdict=verdict, reason=_reason(comparisons, verdict), seconds=since(started),
        scores=tuple(scores), comparisons=tuple(comparisons), warnings=warnings,
        worse=_examples(items, asked, candidate_right=False), better=_examples(items, asked, candidate_right=True),
    )  # fmt: skip


def _baselines(scene: Scene, check: TargetCheck) -> list[tuple[Subject, Target, Improvement | Regression]]:
    """What the candidate is held against; stable first, whose answers are known since its own evaluation."""
    found: list[tuple[Subject, Target, Improvement | Regression]] = []
    is_weaker_base_gate = scene.stable.digest == scene.base.digest and check.gates.base is not None
    if check.gates.stable and scene.stable.digest != scene.candidate.digest and not is_weaker_base_gate:
        found.append(("stable", scene.stable, check.gates.stable))
    if check.gates.base:
        found.append(("base", scene.base, check.gates.base))
    if check.gates.few_shot:
        found.append(("few_shot", scene.base, check.gates.few_shot))
    return found


def _generate(
    scene: Scene, check: TargetCheck, target: Target, name: str, items: Sequence[ChatItem], *, few_shot: bool = False
) -> _Answers:
    """Answers to the items, asked for where they are not known yet."""
    examples = _few_shot(scene, check) if few_shot else ()
    # Items are named by what they say, so what is left to name a task by is the request around them.
    shape = {
        "kind": "chat", "max_tokens": check.max_tokens, "stop": list(check.stop), "temperature": 0,
        "examples": [message.model_dump() for message in examples],
    }  # fmt: skip
    scores = scene.cache.load(target.digest, name, digest_of(shape), scene.fingerprint)
    prompts = {item.id: with_examples(item.prompt, examples) for item in items}
    missing = scores.missing(prompts)
    for start in range(0, len(missing), CHUNK):
        chunk = missing[start : start + CHUNK]
        scene.say(f"{name}: {target.name}{' with examples' if examples else ''}, {start} of {len(missing)} answered")
        chats = [prompts[item] for item in chunk]
        answers = scene.serving.chats(target, chats, max_tokens=check.max_tokens, stop=check.stop)
        scene.same_engine(answer.engine for answer in answers)
        scores = scores.extended([Answer(item=i, text=a.text) for i, a in zip(chunk, answers, strict=True)])
        scene.cache.save(scores)
    is_right = scorer(check.metric, check.required_keys)
    known = scores.by_item
    return _Answers(scores, {item.id: is_right(known[item.id].text, item.expected) for item in items})


def _few_shot(scene: Scene, check: TargetCheck) -> tuple[Message, ...]:
    if check.few_shot is None:
        return ()
    return few_shot_turns(suite_file(scene.folder, check.few_shot.data), k=check.few_shot.k, seed=check.few_shot.seed)


def _compare(
    check: TargetCheck, subject: Subject, target: Target, gate: Improvement | Regression,
    asked: dict[Subject, _Answers], items: Sequence[ChatItem],
) -> Comparison:  # fmt: skip
    candidate, baseline = asked["candidate"], asked[subject]
    check_comparable(baseline.scores, candidate.scores)
    counts = paired_counts([baseline.right[i.id] for i in items], [candidate.right[i.id] for i in items])
    match gate:
        case Improvement():
            result = judge_improvement(counts, min_gain=gate.min_gain, alpha=check.alpha)
        case Regression():
            result = judge_regression(counts, max_drop=gate.max_drop, alpha=check.alpha)
    examples = f" with {check.few_shot.k} examples" if subject == "few_shot" and check.few_shot else ""
    return comparison(GATE_NAMES[subject], target.name + examples, result, counts)


def _reason(comparisons: Sequence[Comparison], verdict: Verdict) -> str:
    """What decided: the comparisons with the check's own verdict."""
    if not comparisons:
        return (
            "nothing to compare with: the version is the stable one, or stable is the base model and base has no gate"
        )
    return "; ".join(f"{c.name} ({c.baseline}): {c.reason}" for c in comparisons if c.verdict is verdict)


def _scores(check: TargetCheck, subject: Subject, name: str, answers: _Answers) -> list[Score]:
    found = [score(subject, name, check.metric, list(answers.right.values()))]
    if check.required_keys and check.metric != "valid_format":
        known = answers.scores.by_item
        formats = [valid_format(known[item].text, check.required_keys) for item in answers.right]
        found.append(score(subject, name, "valid_format", formats))
    return found


def _extra_scores(scene: Scene, check: TargetCheck) -> list[Score]:
    found: list[Score] = []
    for extra in check.report_only:
        items = load_chat_items(suite_file(scene.folder, extra.data))[: extra.items]
        found += _scores(check, "candidate", extra.name, _generate(scene, check, scene.candidate, extra.name, items))
    return found


def _uncontaminated(
    scene: Scene, check: TargetCheck, items: tuple[ChatItem, ...]
) -> tuple[tuple[ChatItem, ...], tuple[str, ...], bool]:
    """Items that training has not seen, what was found, and whether so much was seen that the set is void."""
    if not scene.training_files:
        return items, (), False
    found = contamination(items, scene.training_files)
    dropped = found.exact | (found.overlapping if check.training_overlap == "drop" else frozenset())
    warnings = []
    if found.overlapping and check.training_overlap == "report":
        warnings.append(f"{len(found.overlapping)} of {len(items)} items share 13 words with a training row; kept")
    if dropped:
        warnings.append(f"{len(dropped)} of {len(items)} items stand in the training data and were dropped")
    is_void = len(dropped) > MOST_CONTAMINATED * len(items)
    return tuple(item for item in items if item.id not in dropped), tuple(warnings), is_void


def _examples(
    items: Sequence[ChatItem], asked: dict[Subject, _Answers], *, candidate_right: bool
) -> tuple[Example, ...]:
    """The first items on which candidate and base differ in this direction."""
    if "base" not in asked:
        return ()
    candidate, base = asked["candidate"], asked["base"]
    said, plain = candidate.scores.by_item, base.scores.by_item
    differ = [
        item
        for item in items
        if item.id in base.right and candidate.right[item.id] is candidate_right is not base.right[item.id]
    ]
    return tuple(
        Example(item=i.id, prompt=i.question, expected=i.expected, base=plain[i.id].text, candidate=said[i.id].text)
        for i in differ[:MOST_EXAMPLES]
    )
