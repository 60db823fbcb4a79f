"""Bytes from the network onto the disk: capped, hashed as they pass, and gone again unless somebody keeps them."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from pydantic import BaseModel

from ..errors import StorageFull, TooLarge

_BUFFER_BYTES = 2**20
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class Received(BaseModel, frozen=True):
    """Bytes that are safely on disk, at a temporary place."""

    path: Path
    size_bytes: int
    digest: str


class FileSink:
    """Writes one new file outside the event loop. Raises `TooLarge` over the cap, `StorageFull` when the disk is full."""

    def __init__(self, path: Path, *, limit_bytes: int, name: str) -> None:
        self.path = path
        self._limit = limit_bytes
        self._name = name
        self._size = 0
        self._digest = hashlib.sha256()
        self._buffer = bytearray()
        self._file: BinaryIO | None = None

    async def write(self, data: bytes) -> None:
        """Take some more bytes."""
        self._size += len(data)
        if self._size > self._limit:
            raise TooLarge(f"{self._name} is larger than the {self._limit:,} bytes that are allowed", param=self._name)
        self._buffer += data
        if len(self._buffer) >= _BUFFER_BYTES:
            await asyncio.to_thread(self._flush)

    async def finish(self) -> Received:
        """Make the bytes durable."""
        await asyncio.to_thread(self._close)
        return Received(path=self.path, size_bytes=self._size, digest=self._digest.hexdigest())

    def abort(self) -> None:
        """Leave nothing behind."""
        if self._file is not None:
            self._file.close()
        self.path.unlink(missing_ok=True)

    def _flush(self) -> None:
        with full_disk_translated(self._name):
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("xb")
            self._file.write(self._buffer)
        self._digest.update(self._buffer)
        self._buffer.clear()

    def _close(self) -> None:
        self._flush()
        assert self._file is not None  # noqa: S101  (_flush opened it)
        with full_disk_translated(self._name):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()


@contextmanager
def full_disk_translated(name: str) -> Iterator[None]:
    """Say that the disk is full in the service's own words."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StorageFull(f"the disk is full: {name} could not be stored; free some space and try again") from error
        raise
