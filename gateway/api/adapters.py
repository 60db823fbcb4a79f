"""Adapters and their versions: publish, list, look at one with all that is known of it."""

from __future__ import annotations

import asyncio
from datetime import datetime
from pathlib import Path

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from ..datasets.sink import FileSink
from ..errors import NotFound
from ..jobs.residence import ResidencyRow, residency_rows
from ..jobs.verdicts import VerdictRow, verdict_rows
from ..keys import Principal
from ..registry.manifest import CONFIG_FILE, MANIFEST_FILE, WEIGHTS_FILE, Manifest
from ..registry.models import Adapter, AdapterVersion
from ..settings import Limits
from .declared import DeclaredRoute
from .dependencies import (
    Admin,
    Caller,
    CurrentSettings,
    DatabaseService,
    RegistryService,
    RetirementService,
    RoutingService,
    Trainer,
)
from .multipart import FilePart, received_form

router = APIRouter(route_class=DeclaredRoute, prefix="/api/adapters", tags=["adapters"])


class VersionView(AdapterVersion, frozen=True):
    """A version with its names spelled out."""

    full_name: str
    served_as: str


class VersionDetail(VersionView, frozen=True):
    """A version, where it is loaded, what its evaluations said, and where it comes from."""

    residency: tuple[ResidencyRow, ...]
    verdicts: tuple[VerdictRow, ...]
    manifest: Manifest


class VersionAct(BaseModel, frozen=True, extra="forbid"):
    """What an operator says when a version is released, retired or restored."""

    reason: str = Field(description="goes into the audit log")


class AdapterView(BaseModel, frozen=True):
    """An adapter and its versions, oldest first."""

    name: str
    created_at: datetime
    created_by: str
    versions: tuple[VersionView, ...]


class AdapterList(BaseModel, frozen=True):
    """Every adapter of the key's project."""

    data: tuple[AdapterView, ...]


_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["adapter_config", "adapter_model"],
                    "properties": {
                        name: {"type": "string", "format": "binary"}
                        for name in ("adapter_config", "adapter_model", "manifest")
                    },
                }
            }
        },
    }
}


@router.post("/{name}/versions", status_code=201, summary="Publish a version", openapi_extra=_FORM)
async def publish(
    name: str,
    request: Request,
    response: Response,
    caller: Trainer,
    registry: RegistryService,
    settings: CurrentSettings,
) -> VersionView:
    """Upload a bundle or a plain PEFT folder, file by file. 201 for a new version, 200 when these bytes are one already."""
    with registry.staging() as directory:
        async with received_form(request, _parts(directory, settings.limits)):
            version, created = await registry.publish(name, directory, actor=caller.actor, project_id=caller.project_id)
    response.status_code = 201 if created else 200
    return _view(version)


@router.get("", summary="List adapters")
async def list_adapters(caller: Caller, registry: RegistryService) -> AdapterList:
    """Every adapter with its versions."""
    found = [adapter for adapter in await registry.adapters() if _is_visible(adapter, caller.project_id)]
    return AdapterList(data=tuple(_adapter_view(adapter) for adapter in found))


@router.get("/{name}", summary="Show an adapter")
async def get_adapter(name: str, caller: Caller, registry: RegistryService) -> AdapterView:
    """One adapter with its versions."""
    adapter = await registry.adapter(name)
    if not _is_visible(adapter, caller.project_id):
        raise NotFound(
            f"adapter {name[:80]!r} does not exist; publish its first version", code="adapter_not_found", param="name"
        )
    return _adapter_view(adapter)


@router.get("/{name}/versions/{number}", summary="Show a version")
async def get_version(
    name: str,
    number: int,
    caller: Caller,
    registry: RegistryService,
    database: DatabaseService,
    routing: RoutingService,
) -> VersionDetail:
    """One version with residency, verdicts and lineage."""
    version = await registry.version(f"{name}@{number}")
    if version.project_id != caller.project_id:
        raise NotFound(f"version {version.name!r} does not exist", code="version_not_found", param="number")
    detail = VersionDetail(
        **_view(version).model_dump(),
        residency=await residency_rows(database, version.engine_name),
        verdicts=await verdict_rows(database, version.digest, project_id=caller.project_id),
        manifest=await asyncio.to_thread(registry.manifest, version),
    )
    await routing.catch_up()  # who reads here that it is loaded asks it something next
    return detail


@router.post("/{name}/versions/{number}/release", summary="Release a version from quarantine")
async def release(
    name: str, number: int, asked: VersionAct, caller: Admin, retirement: RetirementService, routing: RoutingService
) -> VersionView:
    """Verified once more, then loaded and probed like a new one. For a quarantine that was not the version's fault."""
    released = await retirement.release(f"{name}@{number}", **_by(caller, asked))
    await routing.catch_up()
    return _view(released)


@router.post("/{name}/versions/{number}/retire", summary="Retire a version")
async def retire(
    name: str, number: int, asked: VersionAct, caller: Admin, retirement: RetirementService, routing: RoutingService
) -> VersionView:
    """Engines load it no more. Row and digest stay; its bytes go when no engine can need them."""
    retired = await retirement.retire(f"{name}@{number}", **_by(caller, asked))
    await routing.catch_up()
    return _view(retired)


@router.post("/{name}/versions/{number}/restore", summary="Bring a retired version back")
async def restore(
    name: str, number: int, asked: VersionAct, caller: Admin, retirement: RetirementService, routing: RoutingService
) -> VersionView:
    """As it was. 409 `bytes_gone` when its files were removed: publishing them again brings it back too."""
    restored = await retirement.restore(f"{name}@{number}", **_by(caller, asked))
    await routing.catch_up()
    return _view(restored)


def _by(caller: Principal, asked: VersionAct) -> dict[str, str]:
    return {"reason": asked.reason, "actor": caller.actor, "project_id": caller.project_id}


def _parts(directory: Path, limits: Limits) -> dict[str, FilePart]:
    sizes = {
        "adapter_config": (CONFIG_FILE, limits.config_bytes),
        "adapter_model": (WEIGHTS_FILE, limits.adapter_bytes),
        "manifest": (MANIFEST_FILE, limits.config_bytes),
    }
    return {field: _part(directory / filename, field, limit) for field, (filename, limit) in sizes.items()}


def _part(path: Path, field: str, limit_bytes: int) -> FilePart:
    return FilePart(limit_bytes, lambda: FileSink(path, limit_bytes=limit_bytes, name=field))


def _is_visible(adapter: Adapter, project_id: str) -> bool:
    return all(version.project_id == project_id for version in adapter.versions)


def _adapter_view(adapter: Adapter) -> AdapterView:
    return AdapterView(
        name=adapter.name,
        created_at=adapter.created_at,
        created_by=adapter.created_by,
        versions=tuple(_view(version) for version in adapter.versions),
    )


def _view(version: AdapterVersion) -> VersionView:
    return VersionView(**version.model_dump(), full_name=version.name, served_as=version.engine_name)
