"""What retention found, or removed."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, Field


class KindReport(BaseModel, frozen=True):
    """One kind of what grows."""

    kind: str
    unit: Literal["rows", "files"]
    count: int = Field(description="rows or files that are due, or that went")
    is_more: bool = Field(default=False, description="there are more; nobody waits for an exact count of millions")
    size_bytes: int = Field(description="about what they take")
    oldest: datetime | None = Field(default=None, description="the oldest of them")


class GcReport(BaseModel, frozen=True):
    """Every kind of which something is due."""

    dry_run: bool
    is_complete: bool = Field(default=True, description="false: time was up; the controller goes on with the rest")
    kinds: tuple[KindReport, ...]
    notes: tuple[str, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether there was nothing to do."""
        return not any(kind.count for kind in self.kinds)
