"""Routes: what a request's `model` names, and the only thing that moves traffic."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Literal, Protocol

from pydantic import BaseModel, Field

from ..errors import Invalid, quoted
from ..names import NAME_PATTERN


class Variant(BaseModel, frozen=True):
    """One arm of a route: a base model (`smollm2-135m`) or an adapter version (`support@3`)."""

    target: str
    weight: int = Field(ge=0, le=10_000, description="share of the traffic, relative to the sum over variants")


class Trial(BaseModel, frozen=True):
    """What a route is trying: arms with a share, which a rollback takes back and leaves stable alone."""

    arms: tuple[str, ...] = Field(min_length=1)
    against: str = Field(description="the stable that stays when the trial ends")
    since_revision: int = Field(description="the revision by which these arms began to be tried")


class LastMove(BaseModel, frozen=True):
    """How traffic came to be where it is."""

    action: Literal["promote", "rollback", "split"]
    moved_from: str
    moved_to: str
    revision: int = Field(description="the route's revision that the move made")
    at: datetime
    by: str


class Route(BaseModel, frozen=True):
    """Weighted variants, what is being tried, and the pointers `stable`, `previous`, `candidate`.

    Every change raises `revision` by one.
    """

    name: str = Field(pattern=NAME_PATTERN)
    revision: int
    salt: str = Field(description="seed of the sticky assignment; never changes")
    stable: str
    previous: str = Field(description="where a rollback goes")
    candidate: str | None = None
    variants: tuple[Variant, ...]
    trial: Trial | None = Field(default=None, description="what a rollback ends; null: a rollback moves stable")
    last_move: LastMove | None = Field(default=None, description="the last move of traffic; null: there was none yet")
    gates: tuple[str, ...] = Field(default=(), description="suites a version must pass to be promoted")
    project_id: str
    updated_at: datetime
    updated_by: str

    @property
    def targets(self) -> tuple[str, ...]:
        """Everything this route may send traffic to, now or by a rollback; most important first, without repeats."""
        named = [self.stable, self.previous, *(v.target for v in self.variants if v.weight)]
        if self.candidate:
            named.append(self.candidate)
        return tuple(dict.fromkeys(named))

    @property
    def arms(self) -> tuple[str, ...]:
        """Targets that have a share now."""
        return tuple(variant.target for variant in self.variants if variant.weight)

    @property
    def tried(self) -> tuple[str, ...]:
        """What is being tried; empty when nothing is."""
        return self.trial.arms if self.trial is not None else ()

    def audited(self) -> dict[str, Any]:
        """What the audit log keeps of it."""
        kept = {"revision", "stable", "previous", "candidate", "variants", "trial", "gates"}
        return self.model_dump(mode="json", include=kept)


class Weighted(Protocol):
    """An arm, as the server has it or as its client does."""

    @property
    def target(self) -> str:
        """What answers."""

    @property
    def weight(self) -> int:
        """Its share, relative to the others'."""


def shares_text(variants: Sequence[Weighted]) -> str:
    """`support@1 50 %, tiny 50 %`."""
    total = sum(variant.weight for variant in variants) or 1
    return ", ".join(f"{variant.target} {100 * variant.weight / total:.3g} %" for variant in variants if variant.weight)


def check_variants(variants: tuple[Variant, ...]) -> None:
    """Raise `Invalid` unless targets are distinct and some weight is positive."""
    targets = [variant.target for variant in variants]
    if len(set(targets)) != len(targets):
        raise Invalid(f"variants name a target twice: {quoted(targets)}", code="duplicate_variant", param="variants")
    if not any(variant.weight for variant in variants):
        raise Invalid("at least one variant needs a positive weight", code="no_weight", param="variants")
