"""Uploaded files: bytes in the files directory by id, one row each. A row exists only when its bytes are durable."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import structlog
from sqlalchemy import ColumnElement, Row, and_, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from .. import tables
from ..audit import record_audit
from ..database import Database
from ..durable import fsync
from ..errors import Conflict, Invalid, NotFound, StorageFull, Unavailable
from ..ids import new_id, now
from ..settings import Settings
from .models import FINE_TUNE, DataFile
from .sink import FileSink, Received, full_disk_translated

log = structlog.get_logger(__name__)

MAX_FILENAME = 255
_ABANDONED_AFTER_S = 24 * 3600


class FileStore:
    """Create, read and delete uploaded files; a file of another project does not exist."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._directory = settings.files_dir
        self._incoming = settings.files_dir / "incoming"
        self._limit = settings.limits.file_bytes

    @property
    def limit_bytes(self) -> int:
        """The largest file taken."""
        return self._limit

    def sink(self) -> FileSink:
        """Where an upload's bytes go until `keep`."""
        return FileSink(self._incoming / new_id("upload-"), limit_bytes=self._limit, name="file")

    async def create(
        self, stream: AsyncIterator[bytes], *, filename: str, purpose: str, actor: str, project_id: str
    ) -> DataFile:
        """Store a stream of bytes as a new file."""
        sink = self.sink()
        try:
            async for chunk in stream:
                await sink.write(chunk)
            return await self.keep(
                await sink.finish(), filename=filename, purpose=purpose, actor=actor, project_id=project_id
            )
        finally:
            sink.abort()

    async def keep(self, received: Received, *, filename: str, purpose: str, actor: str, project_id: str) -> DataFile:
        """Give received bytes an id; from here on they never change."""
        check_purpose(purpose)
        check_filename(filename)
        if received.size_bytes == 0:
            raise Invalid("the file is empty", code="empty_file", param="file")
        file = DataFile(
            id=new_id("file-"),
            project_id=project_id,
            filename=filename,
            purpose=purpose,
            size_bytes=received.size_bytes,
            digest=received.digest,
            created_at=now(),
            created_by=actor,
        )
        await asyncio.to_thread(self._place, received.path, self.path(file.id))
        await self._record(file)
        return file

    async def _record(self, file: DataFile) -> None:
        """Write the row; the bytes go again when it surely was not written.

        Where that cannot be known (the connection broke in the commit, or this process dies) they stay: a row without
        its bytes would be worse. `sweep` finds them when they are a day old.
        """
        is_committing = False
        try:
            async with self._database.write() as connection:
                await connection.execute(insert(tables.files).values(**file.model_dump(), deleted_at=None))
                await record_audit(
                    connection,
                    project_id=file.project_id,
                    actor=file.created_by,
                    action="file.create",
                    subject=file.id,
                    after={"filename": file.filename, "digest": file.digest, "size_bytes": file.size_bytes},
                )
                is_committing = True
        except BaseException as error:
            if not is_committing or _is_refusal(error):
                self.path(file.id).unlink(missing_ok=True)
            raise

    async def get(self, file_id: str, *, project_id: str) -> DataFile:
        """The file's record; raises `NotFound`."""
        query = select(tables.files).where(_visible(project_id), tables.files.c.id == file_id)
        async with self._database.read() as connection:
            row = (await connection.execute(query)).one_or_none()
        if row is None:
            raise _absent(file_id)
        return _file(row)

    async def list(
        self,
        *,
        project_id: str,
        purpose: str | None = None,
        after: str | None = None,
        limit: int = 100,
        newest_first: bool = True,
    ) -> list[DataFile]:
        """A page of files, in the order of their ids, which is the order of their creation; those beyond the file `after`."""
        column = tables.files.c.id
        query = select(tables.files).where(_visible(project_id))
        if purpose is not None:
            query = query.where(tables.files.c.purpose == purpose)
        if after is not None:
            query = query.where(column < after if newest_first else column > after)
        query = query.order_by(column.desc() if newest_first else column.asc()).limit(limit)
        async with self._database.read() as connection:
            if after is not None:
                await _check_was_ours(connection, after, project_id)
            rows = (await connection.execute(query)).all()
        return [_file(row) for row in rows]

    async def delete(self, file_id: str, *, actor: str, project_id: str) -> None:
        """Delete the record, then the bytes. Refused while an unfinished job needs the file."""
        async with self._database.write() as connection:
            gone = await connection.execute(
                update(tables.files).where(_visible(project_id), tables.files.c.id == file_id).values(deleted_at=now())
            )
            if gone.rowcount == 0:
                raise _absent(file_id)
            jobs = tables.jobs
            for row in await connection.execute(select(jobs.c.id, jobs.c.spec).where(jobs.c.finished_at.is_(None))):
                if file_id in (row.spec.get("training_file"), row.spec.get("validation_file")):
                    text = f"file {file_id} is used by the unfinished job {row.id}; cancel the job or wait for it"
                    raise Conflict(text, code="file_in_use")
            await record_audit(connection, project_id=project_id, actor=actor, action="file.delete", subject=file_id)
        self.path(file_id).unlink(missing_ok=True)

    def path(self, file_id: str) -> Path:
        """Where the bytes of a file lie. Only for ids that came from this store."""
        return self._directory / file_id

    async def sweep(self) -> int:
        """Remove what crashes left: unfinished uploads, bytes without a row, rows' bytes after a delete. Returns how many."""
        async with self._database.read() as connection:
            kept = set(
                (
                    await connection.execute(select(tables.files.c.id).where(tables.files.c.deleted_at.is_(None)))
                ).scalars()
            )
        removed = 0
        for path in [*self._directory.glob("file-*"), *self._incoming.glob("upload-*")]:
            if path.name not in kept and time.time() - path.stat().st_mtime > _ABANDONED_AFTER_S:
                path.unlink(missing_ok=True)
                removed += 1
        if removed:
            log.info("abandoned uploads removed", files=removed)
        return removed

    def _place(self, temporary: Path, final: Path) -> None:
        with full_disk_translated("file"):
            temporary.chmod(0o400)
            temporary.rename(final)
            fsync(final.parent)


def check_purpose(purpose: str) -> None:
    """Only files for fine-tuning are taken."""
    if purpose != FINE_TUNE:
        raise Invalid(
            f"purpose {purpose[:40]!r} is not supported; use '{FINE_TUNE}'", code="invalid_purpose", param="purpose"
        )


def check_filename(filename: str) -> None:
    """A label for people: one path component of printable characters."""
    if not filename or len(filename) > MAX_FILENAME:
        raise Invalid(f"the file's name must have 1 to {MAX_FILENAME} characters", code="bad_filename", param="file")
    if filename in (".", "..") or "/" in filename or "\\" in filename or not filename.isprintable():
        text = f"the file's name {filename[:80]!r} looks like a path or holds control characters; send a plain name"
        raise Invalid(text, code="bad_filename", param="file")


def _is_refusal(error: BaseException) -> bool:
    """Whether the database itself said that it did not commit."""
    return isinstance(error, StorageFull) or (isinstance(error, Unavailable) and error.code == "database_busy")


def _visible(project_id: str) -> ColumnElement[bool]:
    return and_(tables.files.c.project_id == project_id, tables.files.c.deleted_at.is_(None))


async def _check_was_ours(connection: AsyncConnection, file_id: str, project_id: str) -> None:
    """A deleted file still marks a place: who deletes page by page goes on after one."""
    table = tables.files
    query = select(table.c.id).where(table.c.id == file_id, table.c.project_id == project_id)
    if (await connection.execute(query)).first() is None:
        raise NotFound(f"no file has the id {file_id[:60]!r}", code="file_not_found", param="after")


def _absent(file_id: str) -> NotFound:
    return NotFound(f"no file has the id {file_id[:60]!r}", code="file_not_found", param="file_id")


def _file(row: Row[tuple[object, ...]]) -> DataFile:
    return DataFile.model_validate({key: value for key, value in row._mapping.items() if key != "deleted_at"})
