"""How the gateway starts, stops, and goes on without its database."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from gateway import tables
from gateway.app import Gateway, check_host
from gateway.errors import Invalid, Unavailable
from gateway.handover import listening_socket
from gateway.keys import Keys
from gateway.settings import load_settings
from tests.corpus import make_base
from tests.fakes.stack import BASE, Stack, chat_body, until

ROOT = Path(__file__).resolve().parents[2]
KEY = re.compile(r"tn-[A-Za-z0-9_-]{43}")


# ---- Without keys


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "example.com", "", "127.0.0.1.evil.example"])
def test_without_keys_an_address_that_others_reach_is_refused(host: str) -> None:
    with pytest.raises(Invalid) as caught:
        check_host(load_settings(auth="none", host=host))

    assert caught.value.code == "auth_required"
    assert "127.0.0.1" in caught.value.message


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_without_keys_loopback_is_served(host: str) -> None:
    check_host(load_settings(auth="none", host=host))


def test_with_keys_any_address_is_served() -> None:
    check_host(load_settings(auth="keys", host="0.0.0.0"))


def test_the_process_refuses_to_serve_everyone_without_keys(tmp_path: Path) -> None:
    make_base(tmp_path / "base", name=BASE)
    done = subprocess.run(
        [sys.executable, "-m", "gateway.app", "--home", str(tmp_path / "home")],
        env=_environment(tmp_path, TURNOUT_AUTH="none", TURNOUT_HOST="0.0.0.0", TURNOUT_PORT="0"),
        capture_output=True, text=True, timeout=60, cwd=ROOT,
    )  # fmt: skip

    assert done.returncode != 0
    assert "auth is `none`" in done.stderr
    assert "Traceback" not in done.stderr


# ---- A process of its own


def _environment(tmp_path: Path, **values: str) -> dict[str, str]:
    base = {"TURNOUT_BASE_MODEL__NAME": BASE, "TURNOUT_BASE_MODEL__PATH": str(tmp_path / "base")}
    return {**os.environ, **base, **values}


@contextmanager
def running(tmp_path: Path, port: int, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "gateway.app", "--home", str(tmp_path / "home")],
            env=_environment(tmp_path, TURNOUT_PORT=str(port)), stdout=file, stderr=subprocess.STDOUT, cwd=ROOT,
        )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_alive(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/healthz", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


async def test_the_first_start_prints_one_admin_key_and_the_second_none(tmp_path: Path) -> None:
    make_base(tmp_path / "base", name=BASE)
    port = free_port()
    with running(tmp_path, port, tmp_path / "first.log") as process:
        await until(lambda: is_alive(port), timeout_s=60)
        [key] = set(KEY.findall((tmp_path / "first.log").read_text()))
        headers = {"authorization": f"Bearer {key}"}
        made = httpx.get(f"http://127.0.0.1:{port}/api/keys", headers=headers, trust_env=False).json()
        process.send_signal(signal.SIGTERM)
        first_exit = process.wait(20)
    with running(tmp_path, port, tmp_path / "second.log") as process:
        await until(lambda: is_alive(port), timeout_s=60)
        again = httpx.get(f"http://127.0.0.1:{port}/api/keys", headers=headers, trust_env=False)

    assert [(row["name"], row["scopes"]) for row in made] == [("first-admin", ["admin"])]
    assert first_exit == 0
    assert KEY.findall((tmp_path / "second.log").read_text()) == []
    assert again.status_code == 200


async def test_the_first_key_is_made_once_even_if_two_start_at_once(tmp_path: Path) -> None:
    stack = Stack(tmp_path)
    await stack.prepare()
    async with stack.database.write() as connection:
        await connection.execute(tables.api_keys.delete())
    keys = Keys(stack.database, b"p" * 32)

    shown: list[str] = []

    made = await asyncio.gather(*(keys.create_first(shown.append) for _ in range(4)))

    assert (sum(made), len(shown)) == (1, 1)
    await stack.__aexit__(None, None, None)


async def test_a_first_key_that_could_not_be_shown_was_never_made(tmp_path: Path) -> None:
    stack = Stack(tmp_path)
    await stack.prepare()
    async with stack.database.write() as connection:
        await connection.execute(tables.api_keys.delete())
    keys, shown = Keys(stack.database, b"p" * 32), list[str]()

    def nobody_reads(raw: str) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        await keys.create_first(nobody_reads)
    assert await keys.list() == []

    assert await keys.create_first(shown.append)
    assert [key.name for key in await keys.list()] == ["first-admin"]
    await stack.__aexit__(None, None, None)


async def test_a_start_removes_what_a_killed_publish_left(tmp_path: Path) -> None:
    stack = Stack(tmp_path)
    left = stack.settings.artifacts_dir / ".staging" / "left"
    left.mkdir(parents=True)
    (left / "adapter_model.safetensors").write_bytes(b"half")

    async with stack:
        assert not left.exists()


def test_an_address_that_is_taken_is_told(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]

        with pytest.raises(Invalid, match="TURNOUT_PORT") as caught:
            listening_socket(load_settings(home=tmp_path, port=port))

    assert caught.value.code == "address_in_use"


# ---- Without the database


async def test_a_gateway_starts_from_its_snapshot_when_the_database_is_gone(tmp_path: Path) -> None:
    async with Stack(tmp_path) as stack:
        version = await stack.add_version(is_promoted=True)
        await stack.set_route("support", stable="support@1", variants=[{"target": "support@1", "weight": 100}])
        await stack.gateway.table.save()
        await stack.stop()
        file = stack.settings.home / "turnout.db"
        file.rename(file.with_suffix(".gone"))

        await stack.serve()
        async with stack.client("inference") as client, stack.client("admin") as admin:
            answer = await client.post("/v1/chat/completions", json=chat_body(model="support"))
            ready = await client.get("/readyz")
            moved = await admin.post("/api/routes/support/rollback", json={})
            listed = await admin.get("/api/routes")
            stranger = await client.get("/v1/models", headers={"authorization": "Bearer tn-x"})
            page = await client.get("/metrics")

        assert (answer.status_code, answer.headers["x-turnout-digest"]) == (200, version.digest)
        assert (ready.status_code, ready.json()["database"]) == (200, "stale")
        assert (moved.status_code, moved.json()["error"]["code"]) == (503, "database_lost")
        assert listed.status_code == 503
        assert stranger.status_code == 401
        assert "turnout_routing_age_seconds +Inf" in page.text
        assert not file.exists()

        file.with_suffix(".gone").rename(file)
        await until(lambda: stack.gateway.table.age_s < 1)
        async with stack.client("admin") as admin:
            assert (await admin.post("/api/routes/support/rollback", json={})).status_code == 200


async def test_completions_go_on_when_the_database_is_moved_away_under_way(tmp_path: Path) -> None:
    async with Stack(tmp_path) as stack:
        await stack.add_version(is_promoted=True)
        file = stack.settings.home / "turnout.db"
        file.rename(file.with_suffix(".gone"))

        async with stack.client("inference") as client, stack.client("admin") as admin:
            answers = [await client.post("/v1/chat/completions", json=chat_body(model="support")) for _ in range(3)]
            written = await admin.post("/api/keys", json={"name": "x", "scopes": ["inference"]})

        assert [answer.status_code for answer in answers] == [200, 200, 200]
        assert (written.status_code, written.json()["error"]["type"]) == (503, "server_error")
        assert not file.exists()
        file.with_suffix(".gone").rename(file)
        await until(lambda: stack.gateway.recorder.queued == 0)
        assert len(await stack.rows(tables.exposures)) == 3


async def test_without_database_and_snapshot_a_first_start_makes_both(tmp_path: Path) -> None:
    async with Stack(tmp_path) as stack:
        await stack.gateway.table.save()
        saved = stack.settings.snapshot_path

        assert saved.stat().st_mode & 0o777 == 0o600
        assert (stack.settings.home / "turnout.db").exists()


async def test_a_gateway_without_its_database_and_with_a_damaged_snapshot_does_not_start(tmp_path: Path) -> None:
    stack = Stack(tmp_path)
    stack.settings.prepare_directories()
    stack.settings.snapshot_path.write_text("{")

    with pytest.raises(Unavailable, match="put it back"):
        await Gateway(stack.settings).start()

    assert not (stack.settings.home / "turnout.db").exists()
    await stack.database.close()
    stack._sockets.cleanup()
