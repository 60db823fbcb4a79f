"""Suites: folders `<name>/` with a `suite.yaml` and its data. The shipped ones, and those that the owner registered.

A suite is code (lm-eval's YAML can name functions), so it enters by the owner's file system only, never over HTTP.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal

from pydantic import BaseModel, Field

from ..durable import fsync, fsync_tree
from ..errors import Conflict, Invalid, NotFound, Refused, TooLarge
from ..names import NAME_PATTERN
from ..settings import Settings

SUITE_FILE = "suite.yaml"
MAX_FILES = 1_000
MAX_BYTES = 256 * 2**20
SHIPPED_SUITES = Path(__file__).resolve().parents[2] / "evals" / "suites"

_Signature = tuple[tuple[str, int, int, int], ...]


class Suite(BaseModel, frozen=True):
    """One suite as it lies on disk now."""

    name: str = Field(pattern=NAME_PATTERN)
    digest: str = Field(description="sha256 over the sorted paths and digests of its files")
    source: Literal["shipped", "registered"]
    files: int
    size_bytes: int
    path: Path = Field(exclude=True)


class Suites:
    """Find and register suites. Reads files: call it outside the event loop."""

    def __init__(self, settings: Settings, *, shipped: Path = SHIPPED_SUITES) -> None:
        self._registered = settings.suites_dir
        self._shipped = shipped
        self._digests: dict[Path, tuple[_Signature, str]] = {}

    def list(self) -> tuple[Suite, ...]:
        """Every suite, by name; a registered one hides a shipped one of the same name."""
        names = {
            path.name
            for root in (self._shipped, self._registered)
            if root.is_dir()
            for path in root.iterdir()
            if _is_suite(path)
        }
        return tuple(self.find(name) for name in sorted(names))

    def find(self, name: str) -> Suite:
        """The suite of that name; raises `NotFound`."""
        roots: tuple[tuple[Literal["registered", "shipped"], Path], ...] = (
            ("registered", self._registered),
            ("shipped", self._shipped),
        )
        if re.fullmatch(NAME_PATTERN, name):
            for source, root in roots:
                if _is_suite(root / name):
                    return self._suite(root / name, source)
        text = (
            f"no suite is called {name[:60]!r}; `turnout suite list` shows them, `turnout suite add DIR` registers one"
        )
        raise NotFound(text, code="suite_not_found", param="suite")

    def register(self, folder: Path, *, replace: bool = False) -> Suite:
        """Copy a folder of the owner's into the home; its name is the suite's. The same bytes again change nothing."""
        name = folder.absolute().name
        if not re.fullmatch(NAME_PATTERN, name):
            text = f"a suite is called after its folder, and {name!r} is not a name; use lower-case letters, digits and hyphens"
            raise Invalid(text, code="bad_name", param="suite")
        if not _is_suite(folder):
            raise Invalid(f"{folder} is not a folder with a {SUITE_FILE}", code="bad_suite", param="suite")
        final = self._registered / name
        incoming = self._registered / f".{name}.incoming"
        shutil.rmtree(incoming, ignore_errors=True)
        try:
            copy_suite(folder, incoming)
            if final.is_dir():
                if suite_digest(incoming) == suite_digest(final):
                    return self._suite(final, "registered")
                if not replace:
                    text = f"suite {name!r} is registered with other files; register it with --replace to change it"
                    raise Conflict(text, code="suite_exists", param="suite")
                _swap(incoming, final)
            else:
                incoming.rename(final)
            fsync(self._registered)
        finally:
            shutil.rmtree(incoming, ignore_errors=True)
        return self._suite(final, "registered")

    def _suite(self, path: Path, source: Literal["shipped", "registered"]) -> Suite:
        files = list(_suite_files(path))
        signature = tuple((name, found.st_ino, found.st_size, found.st_mtime_ns) for name, found in files)
        known = self._digests.get(path)
        digest = known[1] if known and known[0] == signature else suite_digest(path)
        self._digests[path] = (signature, digest)
        return Suite(
            name=path.name,
            digest=digest,
            source=source,
            files=len(files),
            size_bytes=sum(found.st_size for _, found in files),
            path=path,
        )


def suite_digest(path: Path) -> str:
    """sha256 over the sorted (relative path, sha256 of the file) of a suite's folder."""
    total = hashlib.sha256()
    for name, _ in _suite_files(path):
        with (path / name).open("rb") as file:
            total.update(f"{name}\x00{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def copy_suite(source: Path, target: Path) -> None:
    """Copy exactly the files that the digest covers."""
    for name, _ in _suite_files(source):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        with _open_plain(source / name) as descriptor, (target / name).open("xb") as copy:
            shutil.copyfileobj(descriptor, copy)
    fsync_tree(target)


def _suite_files(root: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Regular files by relative path, sorted. Raises `Refused` for links, devices, too many or too large files."""
    found: dict[str, os.stat_result] = {}
    size = 0
    pending = [root]
    while pending:
        for path in pending.pop().iterdir():
            if path.name.startswith(".") or path.name == "__pycache__":
                continue
            status = path.lstat()
            if stat.S_ISDIR(status.st_mode):
                pending.append(path)
            elif stat.S_ISREG(status.st_mode):
                found[path.relative_to(root).as_posix()] = status
                size += status.st_size
            else:
                name = path.relative_to(root).as_posix()
                text = (
                    f"{name} of suite {root.name!r} is a link or a device; a suite holds plain files and folders only"
                )
                raise Refused(text, code="suite_has_link", param="suite")
            if len(found) > MAX_FILES or size > MAX_BYTES:
                text = f"suite {root.name!r} holds more than {MAX_FILES} files or {MAX_BYTES:,} bytes"
                raise TooLarge(text, code="suite_too_large", param="suite")
    yield from sorted(found.items())


def _open_plain(path: Path) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb")


def _is_suite(path: Path) -> bool:
    return not path.is_symlink() and not path.name.startswith(".") and (path / SUITE_FILE).is_file()


def _swap(incoming: Path, final: Path) -> None:
    """Replace a folder; a crash in between leaves the suite unregistered, never half of each."""
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    final.rename(old)
    incoming.rename(final)
    shutil.rmtree(old)
