"""OpenAI's `/v1/models`: every name that a request of this caller may put in `model`."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel

from ..errors import NotFound
from ..keys import Principal
from ..proxy.resolution import may_pin
from ..routing.snapshot import Snapshot
from .declared import DeclaredRoute
from .dependencies import Caller, RoutingService

router = APIRouter(route_class=DeclaredRoute, tags=["OpenAI"])


class Model(BaseModel, frozen=True):
    """One name."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str


class ModelList(BaseModel, frozen=True):
    """All of them."""

    object: Literal["list"] = "list"
    data: list[Model]


@router.get("/v1/models", summary="List the names a request may use")
async def list_models(caller: Caller, routing: RoutingService) -> ModelList:
    """Base model, routes, and the versions that this key may pin."""
    return ModelList(data=visible_models(routing.current, caller))


@router.get("/v1/models/{model}", summary="Look one name up")
async def get_model(model: str, caller: Caller, routing: RoutingService) -> Model:
    """The name, if this key may use it."""
    for found in visible_models(routing.current, caller):
        if found.id == model:
            return found
    raise NotFound(f"model {model!r:.120} does not exist or is not yours", code="model_not_found", param="model")


def visible_models(snapshot: Snapshot, principal: Principal) -> list[Model]:
    """Names in the order people look for them: base, routes, versions."""
    bases = [Model(id=name, created=0, owned_by="turnout") for name in sorted(snapshot.bases)]
    routes = [
        Model(id=route.name, created=int(route.updated_at.timestamp()), owned_by=route.project_id)
        for _, route in sorted(snapshot.routes.items())
        if route.project_id == principal.project_id
    ]
    versions = [
        Model(id=version.name, created=int(version.created_at.timestamp()), owned_by=version.project_id)
        for version in sorted(snapshot.versions.values(), key=lambda version: (version.adapter, version.version))
        if version.project_id == principal.project_id
        and version.state == "verified"
        and not version.is_retired
        and may_pin(version, principal)
    ]
    return bases + routes + versions
