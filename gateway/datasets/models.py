"""Uploaded files, and what a check of one found."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, Field

FINE_TUNE = "fine-tune"


class DataFile(BaseModel, frozen=True):
    """One uploaded file; its bytes never change."""

    id: str
    project_id: str
    filename: str = Field(description="what the client called it; a label, never a path")
    purpose: str
    size_bytes: int
    digest: str = Field(description="sha256 of the bytes")
    created_at: datetime
    created_by: str


class Finding(BaseModel, frozen=True):
    """One thing wrong with one line."""

    line: int | None = Field(description="counted from 1; None: about the file as a whole")
    code: str
    message: str

    def __str__(self) -> str:
        where = "file" if self.line is None else f"line {self.line}"
        return f"{where}: {self.message} [{self.code}]"


class Lengths(BaseModel, frozen=True):
    """How a length is spread over rows."""

    minimum: int
    median: int
    p95: int
    maximum: int
    total: int


class Statistics(BaseModel, frozen=True):
    """What the readable rows look like."""

    messages: int = 0
    roles: dict[str, int] = Field(default_factory=dict)
    system_prompts: int = Field(default=0, description="distinct ones")
    row_characters: Lengths | None = None
    answer_characters: Lengths | None = None
    row_tokens: Lengths | None = Field(default=None, description="only when a tokenizer was at hand")


class DataReport(BaseModel, frozen=True):
    """All that `turnout data check` says of one file. Findings are shown up to a bound, and counted in full."""

    format: Literal["openai-chat"] = "openai-chat"
    digest: str = Field(description="sha256 of the bytes")
    size_bytes: int
    rows: int = Field(description="lines that are not blank")
    valid_rows: int = Field(description="rows without an error")
    error_count: int
    warning_count: int
    counts: dict[str, int] = Field(description="findings by code")
    errors: tuple[Finding, ...]
    warnings: tuple[Finding, ...]
    statistics: Statistics

    @property
    def is_valid(self) -> bool:
        """Whether training may use the file."""
        return self.error_count == 0

    def summary(self, *, limit: int = 3) -> str:
        """One sentence with the first errors."""
        first = "; ".join(str(finding) for finding in self.errors[:limit])
        more = self.error_count - min(limit, len(self.errors))
        return f"{self.error_count} error(s) in {self.rows} rows: {first}" + (f"; and {more} more" if more > 0 else "")


class DataCheck(BaseModel, frozen=True):
    """A training file, perhaps its validation file, and rows that stand in both."""

    training: DataReport
    validation: DataReport | None = None
    leak_errors: tuple[Finding, ...] = ()
    leak_warnings: tuple[Finding, ...] = ()
    leaked_rows: int = Field(default=0, description="validation rows that the training file holds too")

    @property
    def is_valid(self) -> bool:
        """Whether training may use the files together."""
        return self.training.is_valid and (self.validation is None or self.validation.is_valid) and not self.leak_errors
