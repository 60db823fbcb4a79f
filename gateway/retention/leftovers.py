"""What lies on disk and nobody names any more: found by kind, removed so that whoever just took it up again keeps it."""

from __future__ import annotations

import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from sqlalchemy import ColumnElement, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from .. import tables
from ..database import sqlite_file
from ..settings import Settings

_ASIDE = ".gone-"
_UPLOAD_AGE = timedelta(days=1)  # a slow upload goes on for hours


@dataclass(frozen=True)
class Leftovers:
    """One kind of files or directories. What `named_by` names is kept, however old it is."""

    name: str
    paths: Callable[[Settings], Iterable[Path]]
    age: Callable[[Settings], timedelta]
    named_by: tuple[ColumnElement[str], ...] = ()
    unless: Callable[[datetime], ColumnElement[bool]] | None = None
    """Of the rows that could name it, those that do."""


@dataclass(frozen=True)
class Leftover:
    """One of them."""

    path: Path
    at: datetime
    size_bytes: int


_versions, _jobs, _files = tables.adapter_versions.c, tables.jobs.c, tables.files.c

LEFTOVERS: tuple[Leftovers, ...] = (
    Leftovers(
        # Any version keeps its bytes, whatever became of it: an engine may read them again.
        name="artifacts",
        paths=lambda settings: _matching(settings.artifacts_dir, "[0-9a-f][0-9a-f]/*"),
        age=lambda settings: timedelta(hours=settings.retention.orphans_hours),
        named_by=(_versions.digest,),
    ),
    Leftovers(
        name="manifests",
        paths=lambda settings: _matching(settings.manifests_dir, "*.json"),
        age=lambda settings: timedelta(hours=settings.retention.orphans_hours),
        named_by=(_versions.manifest_digest,),
    ),
    Leftovers(
        name="references",
        paths=lambda settings: _matching(settings.references_dir, "*.json"),
        age=lambda settings: timedelta(hours=settings.retention.orphans_hours),
        named_by=(_versions.digest,),
    ),
    Leftovers(
        name="uploads",
        paths=lambda settings: _matching(
            settings.files_dir, "file-*", "incoming/upload-*", f"{_ASIDE}*", f"incoming/{_ASIDE}*"
        ),
        age=lambda settings: _UPLOAD_AGE,
        named_by=(_files.id,),
        unless=lambda before: _files.deleted_at.is_(None),
    ),
    Leftovers(
        name="job_directories",
        paths=lambda settings: _matching(settings.jobs_dir, "*"),
        age=lambda settings: timedelta(days=settings.retention.job_directories_days),
        named_by=(_jobs.id,),
        unless=lambda before: or_(_jobs.finished_at.is_(None), _jobs.finished_at >= before),
    ),
    Leftovers(
        name="scores",
        paths=lambda settings: _matching(settings.scores_dir, "*/*.json"),
        age=lambda settings: timedelta(days=settings.retention.scores_days),
    ),
    Leftovers(name="backups", paths=lambda settings: _old_backups(settings), age=lambda settings: timedelta()),
)


async def kept_names(connection: AsyncConnection, kind: Leftovers, before: datetime) -> frozenset[str]:
    """What rows name."""
    kept: set[str] = set()
    for column in kind.named_by:
        query = select(column).distinct()
        if kind.unless is not None:
            query = query.where(kind.unless(before))
        kept.update((await connection.execute(query)).scalars())
    return frozenset(kept)


def find(kind: Leftovers, settings: Settings, before: datetime) -> list[Leftover]:
    """What is older than `before`, the oldest first; which of it rows name is asked after, so that no new one is missed."""
    found = []
    for path in kind.paths(settings):
        try:
            at = _moment(path)
            if at < before:
                found.append(Leftover(path, at, _size(path)))
        except OSError:  # gone meanwhile, or not ours to read
            continue
    return sorted(found, key=lambda leftover: leftover.at)


def name_of(leftover: Leftover) -> str:
    """What a row would name it by; of one that a killed process had set aside, the name it had before."""
    name = leftover.path.name
    if name.startswith(_ASIDE):
        name = name.removeprefix(_ASIDE).partition("-")[2]
    return name.removesuffix(".json")


def remove(leftover: Leftover, before: datetime) -> bool:
    """Remove it, unless somebody took it up again: a publish of the same bytes makes them young first.

    It is set aside by one rename and looked at once more; so either the publish sees it gone, or we see it young.
    """
    path = leftover.path
    aside = path if path.name.startswith(_ASIDE) else path.with_name(f"{_ASIDE}{secrets.token_hex(4)}-{path.name}")
    try:
        mode = path.lstat().st_mode
        if stat.S_ISDIR(mode):
            path.chmod(stat.S_IMODE(mode) | stat.S_IRWXU)  # a read-only directory can be neither moved nor emptied
        path.rename(aside)
        if _moment(aside) >= before:
            aside.rename(path)
            path.chmod(stat.S_IMODE(mode))
            return False
        if stat.S_ISDIR(mode):
            shutil.rmtree(aside)
        else:
            aside.unlink()
    except OSError:  # another controller's or the publish's turn, or not ours to remove: the next look sees it again
        return False
    return True


def _matching(directory: Path, *patterns: str) -> Iterator[Path]:
    for pattern in patterns:
        yield from directory.glob(pattern)


def _old_backups(settings: Settings) -> list[Path]:
    """Copies from before upgrades, all but the newest."""
    file = sqlite_file(settings.database)
    if file is None:
        return []
    known = sorted(file.parent.glob(f"{file.name}.*.bak"), key=lambda path: path.stat().st_mtime, reverse=True)
    return [*known[settings.retention.backups_kept :], *file.parent.glob(f"{_ASIDE}*-{file.name}.*.bak")]


def _moment(path: Path) -> datetime:
    return datetime.fromtimestamp(path.lstat().st_mtime, UTC)


def _size(path: Path) -> int:
    if path.is_symlink() or not path.is_dir():
        return path.lstat().st_size
    return sum(inner.lstat().st_size for inner in path.rglob("*") if not inner.is_dir())
