"""The forgetting checks: is general knowledge intact? Base against candidate, item by item."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from .config import ForgettingCheck, LoglikelihoodCheck, suite_file
from .errors import SuiteInvalid
from .gates import GateResult, TaskCounts, Verdict, finer_margin, judge_forgetting, judge_regression
from .items import ClozeItem, digest_of, file_digest, load_cloze_items
from .power import look_rule
from .report import MOST_EXAMPLES, CheckReport, Comparison, Example, Score, Subject, score
from .scene import Scene, comparison, since
from .scores import ScoreSet, check_comparable
from .serving import Target
from .statistics import paired_counts

PROGRESS_EVERY = 100
LOGLIKELIHOOD_DTYPE = "float32"
SUBJECTS: tuple[Subject, ...] = ("base", "candidate")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Task:
    """One task answered by both: right or wrong, item by item in the same order."""

    name: str
    base: Sequence[bool]
    candidate: Sequence[bool]
    chance: float


def run_forgetting(scene: Scene, check: ForgettingCheck) -> CheckReport:
    """One-token choices through the serving path."""
    from .harness import CLOZE_TASK

    started = time.monotonic()
    tasks = {
        task.name: _of_look(load_cloze_items(suite_file(scene.folder, task.data)), check, scene.look, task.name)
        for task in check.tasks
    }
    # Items are named by what they say, so what is left to name a task by is the harness's template.
    task_digest = digest_of({"kind": "cloze", "template": file_digest(CLOZE_TASK)})
    answered = {
        "base": _ask_cloze(scene, check, scene.base, tasks, task_digest),
        "candidate": _ask_cloze(scene, check, scene.candidate, tasks, task_digest),
    }
    check_comparable(answered["base"], answered["candidate"])
    right = {subject: {name: _right(items, answered[subject]) for name, items in tasks.items()} for subject in answered}
    judged = [
        _Task(name, right["base"][name], right["candidate"][name], sum(1 / len(i.choices) for i in items) / len(items))
        for name, items in tasks.items()
    ]
    examples = {
        is_better: _examples(tasks, answered["base"], answered["candidate"], judged, candidate_right=is_better)
        for is_better in (False, True)
    }
    found = _report(scene, check, judged, since(started))
    return found.model_copy(update={"worse": examples[False], "better": examples[True]})


def run_loglikelihood(scene: Scene, check: LoglikelihoodCheck) -> CheckReport:
    """Full log-likelihood tasks of lm-eval, on hf + peft in this process."""
    from .harness import load_harness_task, score_loglikelihood

    started = time.monotonic()
    data = {task.name: (load_harness_task(scene.folder, task), task.metric) for task in check.tasks}
    items = {name: _of_look(found.items, check, scene.look, name) for name, (found, _) in data.items()}
    answered: dict[Subject, dict[str, ScoreSet]] = {}
    for subject in SUBJECTS:
        target = scene.base if subject == "base" else scene.candidate
        adapter = None if subject == "base" else scene.candidate_dir
        sets = {
            name: scene.cache.load(target.digest, name, found.digest, scene.local_fingerprint)
            for name, (found, _) in data.items()
        }
        wanted = {name: (found, metric, sets[name].missing(items[name])) for name, (found, metric) in data.items()}
        scene.say(
            f"{check.name}: {target.name}, {sum(len(missing) for _, _, missing in wanted.values())} items to score"
        )
        fresh = score_loglikelihood(scene.base_path, adapter, wanted, dtype=LOGLIKELIHOOD_DTYPE)
        answered[subject] = {name: sets[name].extended(fresh[name]) for name in data}
        for name in data:
            scene.cache.save(answered[subject][name])
    judged = []
    for name in data:
        base, candidate = answered["base"][name], answered["candidate"][name]
        check_comparable(base, candidate)
        choices = [len(base.by_item[item].logprobs) for item in items[name]]
        chance = sum(1 / count for count in choices if count) / len(choices)
        judged.append(_Task(name, _judged(base, items[name]), _judged(candidate, items[name]), chance))
    return _report(scene, check, judged, since(started))


def _ask_cloze(
    scene: Scene, check: ForgettingCheck, target: Target, tasks: Mapping[str, Sequence[ClozeItem]], task_digest: str
) -> ScoreSet:
    """The target's answers to all tasks, asked for where they are not known yet."""
    from .harness import ClozeModel, load_tokenizer, score_cloze

    scores = scene.cache.load(target.digest, check.name, task_digest, scene.fingerprint)
    missing = set(scores.missing(item.key for items in tasks.values() for item in items))
    if not missing:
        return scores
    done = _progress(scene, f"{check.name}: {target.name}", len(missing))
    model = ClozeModel(scene.serving, target, load_tokenizer(scene.base_path), done)
    wanted = {name: [item for item in items if item.key in missing] for name, items in tasks.items()}
    scores = scores.extended(score_cloze(model, wanted))
    scene.same_engine(model.engines)
    scene.cache.save(scores)
    return scores


def _report(
    scene: Scene, check: ForgettingCheck | LoglikelihoodCheck, tasks: Sequence[_Task], seconds: float
) -> CheckReport:
    counts = {task.name: paired_counts(task.base, task.candidate) for task in tasks}
    rule = look_rule(check)
    result = judge_forgetting(
        [TaskCounts(name=t.name, counts=counts[t.name], baseline_right=sum(t.base), chance=t.chance) for t in tasks],
        rule,
    )
    pooled = sum((counts[task.name] for task in tasks[1:]), counts[tasks[0].name])
    average = GateResult(verdict=result.verdict, reason=result.reason, interval=result.interval)
    lines = [comparison(f"average, look {scene.look}", scene.base.name, average, pooled)]
    for name, count in counts.items():
        shown = judge_regression(count, max_drop=rule.margin, alpha=rule.alpha).interval
        only_shown = Comparison(name=name, baseline=scene.base.name, verdict=None, reason="", interval=shown)
        lines.append(only_shown.model_copy(update={"better": count.better, "worse": count.worse}))
    finer = finer_margin(pooled, margin=check.margin / 2, alpha=rule.alpha)
    return CheckReport(
        kind=check.kind, name=check.name, verdict=result.verdict, seconds=seconds,
        reason=result.reason + _next_look(check, scene.look, result.verdict),
        scores=tuple(_scores(tasks)), comparisons=tuple(lines), warnings=(*result.warnings, finer),
    )  # fmt: skip


def _scores(tasks: Sequence[_Task]) -> list[Score]:
    found: list[Score] = []
    for task in tasks:
        found.append(score("base", task.name, "accuracy", list(task.base)))
        found.append(score("candidate", task.name, "accuracy", list(task.candidate)))
    return found


def _next_look(check: ForgettingCheck | LoglikelihoodCheck, look: int, verdict: Verdict) -> str:
    if verdict is not Verdict.INCONCLUSIVE:
        return ""
    if look == 1:
        return f"; the one larger look takes {check.items[1] * len(check.tasks)} items"
    return "; both looks are spent, so this version is not promoted"


def _of_look(items: Sequence[T], check: ForgettingCheck | LoglikelihoodCheck, look: int, name: str) -> tuple[T, ...]:
    """The first items: files are shuffled once, when they are made."""
    wanted = check.items[look - 1]
    if len(items) < wanted:
        raise SuiteInvalid(f"task {name} has {len(items)} items, and look {look} of check {check.name} takes {wanted}")
    return tuple(items[:wanted])


def _right(items: Sequence[ClozeItem], scores: ScoreSet) -> list[bool]:
    """Right is an answer strictly above every other choice: a tie knows nothing."""
    known = scores.by_item
    return [
        all(
            known[item.key].logprobs[item.answer] > value
            for place, value in enumerate(known[item.key].logprobs)
            if place != item.answer
        )
        for item in items
    ]


def _judged(scores: ScoreSet, items: Sequence[str]) -> list[bool]:
    known = scores.by_item
    return [bool(known[item].is_right) for item in items]


def _examples(
    tasks: Mapping[str, Sequence[ClozeItem]], base: ScoreSet, candidate: ScoreSet, judged: Sequence[_Task], *,
    candidate_right: bool,
) -> tuple[Example, ...]:  # fmt: skip
    found = [
        Example(
            item=item.id, prompt=item.prompt, expected=item.choices[item.answer],
            base=_said(item, base), candidate=_said(item, candidate),
        )
        for task in judged
        for item, was_right, is_right in zip(tasks[task.name], task.base, task.candidate, strict=True)
        if is_right is candidate_right is not was_right
    ]  # fmt: skip
    return tuple(found[:MOST_EXAMPLES])


def _said(item: ClozeItem, scores: ScoreSet) -> str:
    logprobs = scores.by_item[item.key].logprobs
    best = max(range(len(logprobs)), key=lambda place: logprobs[place])
    return f"{item.choices[best]} ({logprobs[best]:.2f})"


def _progress(scene: Scene, what: str, total: int) -> Callable[[int], None]:
    def done(finished: int) -> None:
        if finished % PROGRESS_EVERY == 0 or finished == total:
            scene.say(f"{what}, {finished} of {total} answered")

    return done
