"""What one start of an engine was asked to load. On disk, because a controller may die and the engine live on."""

from __future__ import annotations

from pathlib import Path

LEDGER_SUFFIX = ".loads"


class LoadLedger:
    """Names ever loaded since one start of an engine, and how many loads that were: unloading frees no memory."""

    def __init__(self, path: Path, epoch: str) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path.is_file() else []
        loads = lines[1:] if lines[:1] == [epoch] else []
        self.names = set(loads)
        self.loads = len(loads)
        if lines[:1] != [epoch]:
            path.write_text(f"{epoch}\n")

    def add(self, name: str) -> None:
        """Note a load before it is asked for: one that fails takes a place too, and each takes a place of its own."""
        with self._path.open("a") as file:
            file.write(f"{name}\n")
        self.names.add(name)
        self.loads += 1


def names_in(directory: Path, epochs: set[str]) -> set[str]:
    """Names that these starts of engines may still read the files of."""
    found: set[str] = set()
    for path in directory.glob(f"*{LEDGER_SUFFIX}"):
        epoch, _, names = path.read_text().partition("\n")
        if epoch in epochs:
            found.update(names.splitlines())
    return found
