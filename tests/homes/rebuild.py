"""A kept home as it was: the database from its SQL, files with their modes, and the places where it lies now."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

HOMES = Path(__file__).parent
DATABASE = "turnout.db"
KNOWN = "known.json"
HOME_MARK, BASE_MARK = "@HOME@", "@BASE@"
TEXT = (".json", ".jsonl", ".md", ".yaml")


def kept() -> list[str]:
    """Versions whose homes are kept."""
    return sorted(path.name for path in HOMES.iterdir() if (path / KNOWN).is_file())


def rebuild(version: str, scratch: Path) -> tuple[Path, Path]:
    """The home and its base model below `scratch`."""
    home, base = scratch / "home", scratch / "base"
    shutil.copytree(HOMES / version / "home", home)
    shutil.copytree(HOMES / version / "base", base)
    for path in home.rglob("*"):
        if path.suffix in TEXT:
            path.write_text(_placed(path.read_text(), home, base))
    (home / "secrets").chmod(0o700)
    for path in (home / "secrets").iterdir():
        path.chmod(0o600)
    (home / DATABASE).touch(mode=0o600)
    with closing(sqlite3.connect(home / DATABASE)) as connection:
        connection.executescript(_placed((HOMES / version / "database.sql").read_text(), home, base))
    return home, base


def _placed(text: str, home: Path, base: Path) -> str:
    return text.replace(HOME_MARK, str(home)).replace(BASE_MARK, str(base))
