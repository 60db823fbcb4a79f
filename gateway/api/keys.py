"""API keys: made, listed and revoked by admins."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

from fastapi import APIRouter, Response
from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field

from ..keys import ApiKey, Scope
from .declared import DeclaredRoute
from .dependencies import Admin, KeysService, RoutingService

router = APIRouter(route_class=DeclaredRoute, prefix="/api/keys", tags=["Keys"])


_MAX_SCOPES = 16


def _in_utc(moment: datetime) -> datetime:
    try:
        return moment.astimezone(UTC)
    except OverflowError as error:
        raise ValueError("its moment in UTC is outside the years 1 to 9999") from error


class NewKeyRequest(BaseModel):
    """What the key is for, and how far it reaches."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    scopes: list[Scope] = Field(max_length=_MAX_SCOPES)
    expires_at: Annotated[AwareDatetime, AfterValidator(_in_utc)] | None = None


class NewKey(BaseModel, frozen=True):
    """A key with its secret, which is shown this once."""

    id: str
    name: str
    scopes: tuple[Scope, ...]
    created_at: datetime
    expires_at: datetime | None
    key: str


@router.get("", summary="List keys")
async def list_keys(caller: Admin, keys: KeysService) -> list[ApiKey]:
    """Every key, without secrets."""
    return await keys.list(project_id=caller.project_id)


@router.post("", status_code=201, summary="Make a key")
async def create_key(
    request: NewKeyRequest, response: Response, caller: Admin, keys: KeysService, routing: RoutingService
) -> NewKey:
    """A new key, good at once."""
    made, raw = await keys.create(
        request.name, request.scopes, actor=caller.actor, project_id=caller.project_id, expires_at=request.expires_at
    )
    await routing.catch_up()
    response.headers["cache-control"] = "no-store"
    return NewKey(**made.model_dump(include=set(NewKey.model_fields) - {"key"}), key=raw)


@router.delete("/{key_id}", summary="Revoke a key")
async def revoke_key(key_id: str, caller: Admin, keys: KeysService, routing: RoutingService) -> ApiKey:
    """The key is useless from now on."""
    revoked = await keys.revoke(key_id, caller.actor, project_id=caller.project_id)
    await routing.catch_up()
    return revoked
