"""Per-item answers on disk: `<target digest>/<task digest>-<fingerprint>.json`.

What is stored is what the model said, not how it was judged, so that one file serves every metric. A file is keyed
by the weights that answered, by everything that shaped the questions, and by the conditions of the run; it repeats its
key, and one whose key disagrees with its name is not believed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import structlog
from pydantic import BaseModel, Field, ValidationError

from gateway.durable import put

from .errors import FingerprintMismatch
from .items import digest_of

SCORING_VERSION = 1  # raise it when the same request would be sent, or its answer be read, in another way
DIGEST = r"^[0-9a-f]{64}$"

log = structlog.get_logger()


class Fingerprint(BaseModel, frozen=True):
    """The conditions under which answers were made. Scores compare only under the same ones."""

    backend: str = Field(description="`gateway`, or `hf+peft`")
    base_digest: str
    engine: str = Field(description="name and version of what computed the answers, with its own configuration hash")
    dtype: str
    harness: str = Field(description="version of lm-eval")
    scoring: int = SCORING_VERSION

    @property
    def digest(self) -> str:
        """The fingerprint as one name."""
        return digest_of(self.model_dump())


class Answer(BaseModel, frozen=True):
    """What a target answered to one item."""

    item: str
    text: str = Field(default="", description="generated text")
    logprobs: tuple[float, ...] = Field(default=(), description="per choice, of the choice given the prompt")
    is_right: bool | None = Field(
        default=None, description="set where the harness itself judges (log-likelihood tasks)"
    )


class ScoreSet(BaseModel, frozen=True):
    """A target's answers to one task."""

    target_digest: str = Field(pattern=DIGEST)
    task: str
    task_digest: str = Field(pattern=DIGEST)
    fingerprint: Fingerprint
    answers: tuple[Answer, ...] = ()

    @property
    def by_item(self) -> Mapping[str, Answer]:
        """Answers by the item they answer."""
        return {answer.item: answer for answer in self.answers}

    def missing(self, items: Iterable[str]) -> tuple[str, ...]:
        """Items without an answer yet, in their order."""
        known = self.by_item
        return tuple(item for item in items if item not in known)

    def extended(self, answers: Sequence[Answer]) -> ScoreSet:
        """With more answers; an item answered before keeps its first answer."""
        known = self.by_item
        return self.model_copy(update={"answers": (*self.answers, *(a for a in answers if a.item not in known))})


def check_comparable(baseline: ScoreSet, candidate: ScoreSet) -> None:
    """Raise unless both were made under the same conditions."""
    if baseline.fingerprint != candidate.fingerprint:
        ours, theirs = candidate.fingerprint.model_dump(), baseline.fingerprint.model_dump()
        changed = "; ".join(f"{key}: {theirs[key]} against {ours[key]}" for key in ours if ours[key] != theirs[key])
        raise FingerprintMismatch(
            f"scores of {baseline.task} were made under other conditions ({changed}); score both anew"
        )


class ScoreCache:
    """Score files under one directory, written whole or not at all."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def path(self, target_digest: str, task_digest: str, fingerprint: Fingerprint) -> Path:
        """Where a set of scores lies."""
        return self.directory / target_digest / f"{task_digest}-{fingerprint.digest}.json"

    def load(self, target_digest: str, task: str, task_digest: str, fingerprint: Fingerprint) -> ScoreSet:
        """What is known; an empty set where nothing is, or where the file cannot be believed."""
        empty = ScoreSet(target_digest=target_digest, task=task, task_digest=task_digest, fingerprint=fingerprint)
        path = self.path(target_digest, task_digest, fingerprint)
        try:
            found = ScoreSet.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return empty
        except ValidationError as error:
            log.warning("score file ignored", path=str(path), fault=str(error.errors()[0]["msg"]))
            return empty
        if found.model_copy(update={"answers": (), "task": task}) != empty:
            log.warning("score file ignored", path=str(path), fault="its key is not its name")
            return empty
        return found

    def save(self, scores: ScoreSet) -> None:
        """Replace the file by one rename."""
        path = self.path(scores.target_digest, scores.task_digest, scores.fingerprint)
        path.parent.mkdir(parents=True, exist_ok=True)
        put(path, scores.model_dump_json().encode())
