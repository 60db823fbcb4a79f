"""Every bad adapter is turned away before the serving engine sees it."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from gateway.registry.base_family import BaseFamily
from gateway.settings import Settings
from tests.corpus import BAD

from .stack import Stack, wait_for

pytestmark = pytest.mark.engine


def engine_names(stack: Stack) -> set[str]:
    """What the engine itself says it serves."""
    socket = next(Settings(home=stack.home).run_dir.glob("*.sock"))
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(socket)), base_url="http://engine") as client:
        return {model["id"] for model in client.get("/v1/models").json()["data"]}


@pytest.mark.invariant(4)
@pytest.mark.parametrize(
    "kind", sorted(name for name, bad in BAD.items() if bad.refused_by == "preflight" and not bad.needs_directory)
)
def test_preflight_refuses_it_with_a_reason(stack: Stack, base_family: BaseFamily, tmp_path: Path, kind: str) -> None:
    BAD[kind].build(tmp_path / "bad", base_family)

    answer = stack.publish(tmp_path / "bad", "badapple")

    assert answer.status_code in (400, 413, 422), answer.text
    if answer.status_code == 422:
        assert answer.json()["error"]["code"] == BAD[kind].code
    assert not any(name.startswith("badapple") for name in engine_names(stack))


@pytest.mark.invariant(4)
# Its other kinds are refused by the same job without an engine in test_evals_verify.py.
@pytest.mark.parametrize("kind", ["bit_flips"])
def test_verify_refuses_it_with_a_reason(stack: Stack, base_family: BaseFamily, tmp_path: Path, kind: str) -> None:
    BAD[kind].build(tmp_path / "bad", base_family)
    published = stack.publish(tmp_path / "bad", f"bad-{kind.replace('_', '-')}"[:40])
    assert published.status_code == 201, published.text
    version = published.json()

    def rejected() -> dict[str, str] | None:
        found: dict[str, str] = stack.get(f"/api/adapters/{version['adapter']}/versions/{version['version']}")
        return found if found["state"] != "received" else None

    found = wait_for(rejected, timeout_s=540, what=f"{kind} is judged")

    assert (found["state"], found["state_code"]) == ("rejected", BAD[kind].code)
    assert not any(name.startswith(version["adapter"]) for name in engine_names(stack))
