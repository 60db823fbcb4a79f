"""What tests of the command line share: one command in a process of its own, and an adapter to move."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from typing import Any

from gateway.database import DEFAULT_PROJECT
from gateway.keys import ANONYMOUS
from gateway.registry.models import VersionState
from tests.corpus import make_adapter
from tests.fakes.stack import Stack


async def turnout(
    stack: Stack, *arguments: str, key: str | None = "admin", url: str | None = None
) -> subprocess.CompletedProcess[str]:
    """One command in a process of its own, as a user's shell starts it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TURNOUT_")}
    environment = kept | {"TURNOUT_URL": url or stack.url, "TURNOUT_HOME": str(stack.settings.home), "COLUMNS": "250"}
    if key is not None:
        environment["TURNOUT_API_KEY"] = stack.keys.get(key, key)
    argv = [sys.executable, "-m", "gateway.cli", *arguments]
    done = await asyncio.to_thread(
        subprocess.run, argv, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert "Traceback" not in done.stdout + done.stderr
    return done


async def as_json(stack: Stack, *arguments: str) -> Any:
    """What a command prints for programs."""
    done = await turnout(stack, *arguments, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


async def two_versions(stack: Stack) -> None:
    """support@1 is stable; support@2 is ready to follow."""
    services = stack.gateway.services
    for seed in (1, 2):
        folder = make_adapter(stack.settings.home / f"peft{seed}", services.registry.base, seed=seed)
        made, _ = await services.registry.publish("support", folder, actor="test", project_id=DEFAULT_PROJECT)
        await services.registry.set_state(made.id, VersionState.VERIFIED, code=None, reason=None, actor="test")
        await stack.load(made)
    await services.promotions.promote("support", "support@1", force=True, reason="first", principal=ANONYMOUS)
