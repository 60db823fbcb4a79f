"""A suite: a folder with `suite.yaml` and its data. Typed, and strict about names it does not know.

```yaml
schema: 1
name: support-emails
description: What the adapter is for, and what it must not break.
checks:
  - kind: target                      # generation through the gateway; the last assistant message is the expected answer
    name: emails
    data: held_out.jsonl              # chat JSONL
    metric: exact_match_json
    required_keys: [intent, order_id]
    max_tokens: 64
    few_shot: {data: examples.jsonl, k: 4, seed: 0}
    gates:
      base: {min_gain: 0.0}           # must be surely better than the base model
      few_shot: {min_gain: 0.0}       # ... and than the base model shown k examples
      stable: {max_drop: 0.05}        # ... and not surely worse than what is stable now
    report_only: [{name: unseen_phrasings, data: unseen.jsonl}]
  - kind: forgetting                  # one-token choices, scored through the gateway
    name: general
    tasks: [{name: opposites, data: opposites.jsonl}]
    margin: 0.04
    items: [80, 120]                  # per task: first look, the one larger look
```

A parity check always runs first; it need not be written down.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from .errors import SuiteInvalid

NAME = r"^[a-z0-9][a-z0-9_-]{0,47}$"
CHECK_ORDER = ("parity", "target", "forgetting", "loglikelihood")


def _inside(value: str) -> str:
    path = Path(value)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError("must be a path inside the suite's folder: copy the file there")
    return value


class _Strict(BaseModel, frozen=True, extra="forbid"):
    """Unknown keys are errors: a misspelt gate must not silently gate nothing."""


class ParityCheck(_Strict, frozen=True):
    """What is served agrees with the weights that were verified, and is not the base model."""

    kind: Literal["parity"] = "parity"
    name: str = Field(default="parity", pattern=NAME)
    max_median_gap: float = Field(default=0.25, gt=0, description="nats between served and reference log-probabilities")


class Improvement(_Strict, frozen=True):
    """Candidate minus baseline must surely exceed `min_gain`."""

    min_gain: float = Field(default=0.0, ge=0, lt=1)
    items: int | None = Field(default=None, ge=1, description="compare on the first n items only; unset: all")


class Regression(_Strict, frozen=True):
    """Candidate minus baseline must surely be above `-max_drop`."""

    max_drop: float = Field(gt=0, lt=1)
    items: int | None = Field(default=None, ge=1, description="compare on the first n items only; unset: all")


class TargetGates(_Strict, frozen=True):
    """Which baselines the candidate is held against; one left out is not computed."""

    base: Improvement | None = None
    few_shot: Improvement | None = None
    stable: Regression | None = None

    @model_validator(mode="after")
    def _something(self) -> Self:
        if self.base is None and self.few_shot is None and self.stable is None:
            raise ValueError("name at least one of base, few_shot, stable")
        return self


class FewShot(_Strict, frozen=True):
    """Examples put before the question, as chat turns; the same for every item."""

    data: str
    k: int = Field(default=4, ge=1, le=32)
    seed: int = 0

    _check = field_validator("data")(_inside)


class ExtraSet(_Strict, frozen=True):
    """Items that are reported and decide nothing."""

    name: str = Field(pattern=NAME)
    data: str
    items: int | None = Field(default=None, ge=1, description="first n only; unset: all")

    _check = field_validator("data")(_inside)


class TargetCheck(_Strict, frozen=True):
    """Is the version better at what it was made for? Generation through the gateway, greedy."""

    kind: Literal["target"] = "target"
    name: str = Field(default="target", pattern=NAME)
    data: str
    metric: Literal["exact_match", "exact_match_json", "valid_format"] = "exact_match"
    required_keys: tuple[str, ...] = Field(default=(), description="keys that an answer's JSON object must have")
    max_tokens: int = Field(default=128, ge=1, le=4096, description="longest answer; the cost of a rambling base model")
    stop: tuple[str, ...] = Field(default=(), max_length=8)
    items: int | None = Field(default=None, ge=1, description="first n only; unset: all")
    few_shot: FewShot | None = None
    gates: TargetGates
    alpha: float = Field(default=0.05, gt=0, lt=0.5, description="one-sided error of each gate")
    report_only: tuple[ExtraSet, ...] = ()
    training_overlap: Literal["drop", "report"] = Field(
        default="drop",
        description="items sharing 13 words with a training row: dropped, or (templated data) only counted",
    )

    _check = field_validator("data")(_inside)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.gates.few_shot is not None and self.few_shot is None:
            raise ValueError("gates.few_shot needs few_shot: {data: ..., k: 4}")
        if self.metric == "valid_format" and not self.required_keys:
            raise ValueError("metric valid_format needs required_keys")
        _distinct("report_only", [extra.name for extra in self.report_only])
        return self


class ClozeTask(_Strict, frozen=True):
    """Rows {id, prompt, choices, answer}: every choice is one token after its prompt."""

    name: str = Field(pattern=NAME)
    data: str

    _check = field_validator("data")(_inside)


class HarnessTask(_Strict, frozen=True):
    """A task of lm-eval: its YAML, over a JSONL file in the suite's folder."""

    name: str = Field(pattern=NAME)
    config: str = Field(description="the task's YAML")
    metric: Literal["acc", "acc_norm", "exact_match"] = "acc"

    _check = field_validator("config")(_inside)


class _NonInferiority(_Strict, frozen=True):
    name: str = Field(pattern=NAME)
    margin: float = Field(gt=0, lt=0.5, description="drop of the average over tasks that is tolerated")
    items: tuple[int, int] = Field(description="items per task at the first look and at the one larger look")
    alpha: float = Field(default=0.05, gt=0, lt=0.5, description="one-sided error over both looks; each spends half")
    veto_drop: float = Field(default=0.02, ge=0, lt=1, description="a task vetoes only beyond this observed drop")
    tasks: tuple[ClozeTask | HarnessTask, ...]

    @property
    def task_names(self) -> tuple[str, ...]:
        """Names of the tasks, in the suite's order."""
        return tuple(task.name for task in self.tasks)

    @model_validator(mode="after")
    def _looks(self) -> Self:
        if not 1 <= self.items[0] < self.items[1]:
            raise ValueError(f"items must be two growing counts, got {list(self.items)}")
        _distinct("tasks", list(self.task_names))
        return self


class ForgettingCheck(_NonInferiority, frozen=True):
    """Is general knowledge intact? One-token choices through the serving path."""

    kind: Literal["forgetting"] = "forgetting"
    tasks: tuple[ClozeTask, ...] = Field(min_length=1)


class LoglikelihoodCheck(_NonInferiority, frozen=True):
    """Is general knowledge intact? Full log-likelihood tasks, on hf + peft in this process."""

    kind: Literal["loglikelihood"] = "loglikelihood"
    tasks: tuple[HarnessTask, ...] = Field(min_length=1)


Check = Annotated[ParityCheck | TargetCheck | ForgettingCheck | LoglikelihoodCheck, Field(discriminator="kind")]


class Suite(_Strict, frozen=True):
    """What a version must pass to be promoted."""

    schema_version: Literal[1] = Field(alias="schema")
    name: str = Field(pattern=NAME)
    description: str = ""
    checks: tuple[Check, ...]

    @model_validator(mode="after")
    def _named(self) -> Self:
        _distinct("checks", [check.name for check in self.checks])
        return self

    @property
    def ordered(self) -> tuple[Check, ...]:
        """Parity first (added if the suite is silent about it), then the cheap and decisive before the long."""
        checks = list(self.checks)
        if not any(check.kind == "parity" for check in checks):
            checks.append(ParityCheck())
        return tuple(sorted(checks, key=lambda check: CHECK_ORDER.index(check.kind)))

    @property
    def has_larger_look(self) -> bool:
        """Whether an inconclusive first look may be followed by the one larger look."""
        return any(isinstance(check, _NonInferiority) for check in self.checks)


def load_suite(folder: Path) -> Suite:
    """Read and check `suite.yaml`; raises `SuiteInvalid` that names the file, the field and the value."""
    path = folder / "suite.yaml"
    try:
        suite = Suite.model_validate(yaml.safe_load(path.read_text()))
    except FileNotFoundError:
        raise SuiteInvalid(f"{path} does not exist: a suite is a folder with suite.yaml and its data") from None
    except yaml.YAMLError as error:
        raise SuiteInvalid(f"{path} is not plain YAML: {error}") from error
    except ValidationError as error:
        faults = "; ".join(f"{_place(e['loc'])}: {e['msg']} (got {e['input']!r})" for e in error.errors())
        raise SuiteInvalid(f"{path}: {faults}") from error
    if suite.name != folder.name:
        raise SuiteInvalid(f"{path}: name is {suite.name!r} but the folder is {folder.name!r}; make them equal")
    return suite


def suite_file(folder: Path, name: str) -> Path:
    """A file of the suite; one that is missing or leads out of the folder is refused."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise SuiteInvalid(f"{folder / name} leads out of the suite's folder: copy the file into it")
    if not path.is_file():
        raise SuiteInvalid(f"{folder / name} does not exist, but suite.yaml names it")
    return path


def _place(location: tuple[int | str, ...]) -> str:
    return ".".join(map(str, location)) or "suite"


def _distinct(what: str, names: list[str]) -> None:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"{what} repeat the name {', '.join(repeated)}")
