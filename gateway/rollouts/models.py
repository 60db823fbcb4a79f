"""What a move of traffic says when it is done."""

from __future__ import annotations

from pydantic import BaseModel, Field

from ..routing.models import Route


class Moved(BaseModel, frozen=True):
    """Traffic moved, or would."""

    before: Route
    route: Route = Field(description="as it is after the move")
    moved_from: str = Field(description="what was left: the former stable, or what a trial tried, by commas")
    moved_to: str
    revision: int
    took_ms: float = Field(description="from the call until this gateway routes by it")
    journalled: bool = Field(default=False, description="this gateway's journal has it; the database is told later")
    needs_load: bool = Field(description="no engine has the target loaded: its requests fail until one has")
    marked: tuple[str, ...] = Field(default=(), description="versions that return by force only from now on")
    answers_cut: int = Field(default=0, description="answers of what was left that were still running and were ended")
    repeated: bool = Field(default=False, description="the answer of an earlier call; this one moved nothing")
    dry_run: bool = Field(default=False, description="nothing moved: this is what would")


class RouteMoved(Route, frozen=True):
    """A route as a split left it, and as it was before."""

    before: Route
    repeated: bool = Field(default=False, description="the answer of an earlier call; this one moved nothing")
    dry_run: bool = Field(default=False, description="nothing moved: this is what would")

    @classmethod
    def of(cls, moved: Moved) -> RouteMoved:
        """The same, seen from the route."""
        return cls(**moved.route.model_dump(), before=moved.before, repeated=moved.repeated, dry_run=moved.dry_run)
