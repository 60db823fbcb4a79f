"""The list of faults, and how one is planted."""

from __future__ import annotations

from pathlib import Path
from typing import Self

import yaml
from pydantic import BaseModel, Field, model_validator

LIST = Path(__file__).parent / "faults.yaml"


class Fault(BaseModel, frozen=True, extra="forbid"):
    """One change of the code that its tests must notice."""

    name: str = Field(pattern=r"^[a-z0-9_]+$")
    harm: str = Field(description="what happens to users while it stands")
    file: str
    old: str = Field(min_length=1, description="text that stands in the file exactly once")
    new: str
    tests: tuple[str, ...] = ()
    equivalent: str | None = Field(default=None, description="why no test can notice it")

    @model_validator(mode="after")
    def _is_noticeable_or_says_why(self) -> Self:
        if self.old == self.new:
            raise ValueError(f"{self.name} changes nothing")
        if bool(self.tests) == bool(self.equivalent):
            raise ValueError(f"{self.name} needs either tests or the reason why none can notice it")
        return self

    def planted(self, text: str) -> str:
        """The file's text with the fault in it. Raises `ValueError` where the guard does not stand exactly once."""
        times = text.count(self.old)
        if times != 1:
            raise ValueError(f"{self.name}: its text stands {times} times in {self.file}; write the fault anew")
        return text.replace(self.old, self.new)


def load_faults(path: Path = LIST) -> list[Fault]:
    """Every fault, in the list's order: the most harmful first."""
    return [Fault.model_validate(entry) for entry in yaml.safe_load(path.read_text())]
