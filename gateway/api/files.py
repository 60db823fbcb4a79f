"""OpenAI's files API: upload training data, look at it, delete it."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse
from pydantic import BaseModel

from ..datasets.models import DataFile
from ..datasets.store import check_filename, check_purpose
from .declared import DeclaredRoute
from .dependencies import FilesService, Trainer
from .multipart import FilePart, TextPart, received_form

router = APIRouter(route_class=DeclaredRoute, prefix="/v1/files", tags=["files"])

_MAX_PURPOSE_BYTES = 100
_MAX_PAGE = 10_000


class FileObject(BaseModel, frozen=True):
    """A file as OpenAI's SDK knows it."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"
    status_details: None = None
    expires_at: None = None


class FileList(BaseModel, frozen=True):
    """One page of files."""

    object: Literal["list"] = "list"
    data: tuple[FileObject, ...]
    has_more: bool
    first_id: str | None
    last_id: str | None


class FileDeleted(BaseModel, frozen=True):
    """The file is gone."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


@router.post(
    "",
    summary="Upload a file",
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": {
                    "schema": {
                        "type": "object",
                        "required": ["file", "purpose"],
                        "properties": {
                            "file": {"type": "string", "format": "binary"},
                            "purpose": {"type": "string", "enum": ["fine-tune"]},
                        },
                    }
                }
            },
        }
    },
)
async def upload_file(request: Request, caller: Trainer, files: FilesService) -> FileObject:
    """Store training data. The format is checked when a job uses it, or at once by `turnout data check`."""
    parts: dict[str, TextPart | FilePart] = {
        "purpose": TextPart(_MAX_PURPOSE_BYTES),
        "file": FilePart(files.limit_bytes, files.sink),
    }
    async with received_form(request, parts) as form:
        check_purpose(form.text("purpose"))
        found = form.file("file")
        filename = found.filename or "file.jsonl"
        check_filename(filename)
        file = await files.keep(
            found.received,
            filename=filename,
            purpose=form.text("purpose"),
            actor=caller.actor,
            project_id=caller.project_id,
        )
    return _file_object(file)


@router.get("", summary="List files")
async def list_files(
    caller: Trainer,
    files: FilesService,
    purpose: str | None = None,
    after: str | None = None,
    limit: int = Query(_MAX_PAGE, ge=1, le=_MAX_PAGE),
    order: Literal["asc", "desc"] = "desc",
) -> FileList:
    """Files of the key's project."""
    found = await files.list(
        project_id=caller.project_id, purpose=purpose, after=after, limit=limit + 1, newest_first=order == "desc"
    )
    page = tuple(_file_object(file) for file in found[:limit])
    ends = (page[0].id, page[-1].id) if page else (None, None)
    return FileList(data=page, has_more=len(found) > limit, first_id=ends[0], last_id=ends[1])


@router.get("/{file_id}", summary="Show a file")
async def get_file(file_id: str, caller: Trainer, files: FilesService) -> FileObject:
    """One file's record."""
    return _file_object(await files.get(file_id, project_id=caller.project_id))


@router.get("/{file_id}/content", summary="Read a file", response_class=FileResponse)
async def get_content(file_id: str, caller: Trainer, files: FilesService) -> FileResponse:
    """The file's bytes, as they were uploaded."""
    file = await files.get(file_id, project_id=caller.project_id)
    return FileResponse(files.path(file.id), media_type="application/octet-stream", filename=file.filename)


@router.delete("/{file_id}", summary="Delete a file")
async def delete_file(file_id: str, caller: Trainer, files: FilesService) -> FileDeleted:
    """Refused while an unfinished job uses the file."""
    await files.delete(file_id, actor=caller.actor, project_id=caller.project_id)
    return FileDeleted(id=file_id)


def _file_object(file: DataFile) -> FileObject:
    return FileObject(
        id=file.id,
        bytes=file.size_bytes,
        created_at=int(file.created_at.timestamp()),
        filename=file.filename,
        purpose=file.purpose,
    )
