"""What tests of moving traffic share: a server with two suites, and short ways to move and to look."""

from __future__ import annotations

from typing import Any

import httpx

from gateway import tables
from gateway.registry.models import AdapterVersion
from tests.fakes.stack import Stack, chat_body

FORCED: dict[str, Any] = {"force": True, "reason": "test"}


def add_suites(stack: Stack) -> None:
    """Suites `target` and `forgetting`, which routes may name as gates."""
    for name in ("target", "forgetting"):
        folder = stack.settings.suites_dir / name
        folder.mkdir(parents=True)
        (folder / "suite.yaml").write_text(f"name: {name}\n")


async def promote(admin: httpx.AsyncClient, target: str | None, **fields: Any) -> httpx.Response:
    return await admin.post("/api/routes/support/promote", json={"target": target, **fields})


async def roll_back(admin: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    return await admin.post("/api/routes/support/rollback", json=fields)


async def promoted(stack: Stack, admin: httpx.AsyncClient, *numbers: int) -> list[AdapterVersion]:
    """Versions that were published, and promoted in this order."""
    versions = [await stack.add_version("support", number) for number in sorted(set(numbers))]
    for number in numbers:
        assert (await promote(admin, f"support@{number}", **FORCED)).status_code == 200
    return versions


async def split(admin: httpx.AsyncClient, arms: list[dict[str, Any]], **fields: Any) -> httpx.Response:
    return await admin.put("/api/routes/support/variants", json={"variants": arms, **fields})


async def pointers(admin: httpx.AsyncClient) -> tuple[str, str]:
    route = (await admin.get("/api/routes/support")).json()
    assert route["variants"] == [{"target": route["stable"], "weight": 100}]
    return route["stable"], route["previous"]


async def answering(stack: Stack) -> str:
    async with stack.client("inference") as client:
        response = await client.post("/v1/chat/completions", json=chat_body(model="support"))
        assert response.status_code == 200
        return str(response.headers["x-turnout-version"])


def code(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


async def audited(stack: Stack, action: str) -> list[Any]:
    return [row for row in await stack.rows(tables.audit) if row.action == action]


async def current_digest(stack: Stack, suite: str) -> str:
    return stack.gateway.services.suites.find(suite).digest
