"""A home that an earlier release made, under today's program: upgraded, with a way back, and nothing of it is lost."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.errors import Invalid
from gateway.migrations import run as migrations
from gateway.migrations.run import head, migrate
from gateway.settings import Settings
from tests.homes.make import SEEN, wait_loaded
from tests.homes.rebuild import DATABASE, HOMES, KNOWN, kept, rebuild
from tests.homes.server import answer_of, serving, settings_of, until

TABLES = ("adapter_versions", "routes", "api_keys", "jobs", "job_events", "verdicts", "files", "audit")
# What is so of the running server, not of the home.
OF_THE_MOMENT = ("residency",)


@dataclass
class Upgraded:
    """A home that today's program serves."""

    version: str
    settings: Settings
    client: httpx.Client

    @property
    def known(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((HOMES / self.version / KNOWN).read_text())
        return found

    def use_key(self, name: str) -> None:
        self.client.headers["authorization"] = f"Bearer {self.known['keys'][name]}"

    def get(self, path: str) -> Any:
        return answer_of(self.client.get(path))

    def chat(self, model: str) -> httpx.Response:
        messages = [{"role": "user", "content": "Where is my order?"}]
        return self.client.post("/v1/chat/completions", json={"model": model, "messages": messages, "max_tokens": 4})


@pytest.fixture(scope="module", params=kept())
def upgraded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Upgraded]:
    scratch = tmp_path_factory.mktemp("home")
    settings = settings_of(*rebuild(request.param, scratch))
    with serving(settings, scratch) as client:
        yield Upgraded(request.param, settings, client)


def schema_of(file: Path) -> str:
    with closing(sqlite3.connect(file)) as connection:
        return str(connection.execute("SELECT version_num FROM alembic_version").fetchone()[0])


def counts(file: Path) -> dict[str, int]:
    with closing(sqlite3.connect(file)) as connection:
        return {table: connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in TABLES}


def missing(known: Any, found: Any, where: str = "") -> list[str]:
    """What was told then and is not told now; what is told beside it is no loss."""
    if isinstance(known, dict) and isinstance(found, dict):
        names = [name for name in known if name not in OF_THE_MOMENT]
        return [fault for name in names for fault in missing(known[name], found.get(name), f"{where}.{name}")]
    if isinstance(known, list) and isinstance(found, list):
        if len(known) != len(found):
            return [f"{where}: {len(known)} were {len(found)}"]
        return [
            f
            for n, (one, other) in enumerate(zip(known, found, strict=True))
            for f in missing(one, other, f"{where}.{n}")
        ]
    return [] if known == found else [f"{where}: {known!r} is {found!r}"]


def test_the_homes_are_kept_and_small() -> None:
    assert "0.1.0" in kept()
    for version in kept():
        files = [path for path in (HOMES / version).rglob("*") if path.is_file()]
        assert sum(path.stat().st_size for path in files) < 200_000


def test_the_database_is_of_todays_schema_and_its_backup_is_not(upgraded: Upgraded) -> None:
    home = upgraded.settings.home
    [backup] = home.glob(f"{DATABASE}.*.bak")

    assert schema_of(home / DATABASE) == head()
    assert backup.name == f"{DATABASE}.{schema_of(backup)}.bak"
    assert schema_of(backup) != head()
    assert {table: count for table, count in counts(backup).items() if count > counts(home / DATABASE)[table]} == {}


@pytest.mark.parametrize("what", [name for name in SEEN if name != "audit"])
def test_what_was_there_is_told_as_it_was(upgraded: Upgraded, what: str) -> None:
    upgraded.use_key("admin")

    assert missing(upgraded.known[what], upgraded.get(SEEN[what]), what) == []


def test_every_act_is_in_the_audit_log_as_it_was(upgraded: Upgraded) -> None:
    upgraded.use_key("admin")
    now = {row["id"]: row for row in upgraded.get("/api/audit?limit=200")["data"]}

    assert [
        fault for row in upgraded.known["audit"]["data"] for fault in missing(row, now.get(row["id"]), row["id"])
    ] == []


def test_what_jobs_said_and_what_was_uploaded_can_be_read(upgraded: Upgraded) -> None:
    upgraded.use_key("admin")
    for job in upgraded.known["tuning_jobs"]["data"]:
        assert upgraded.get(f"/v1/fine_tuning/jobs/{job['id']}/events")["data"]
    for file in upgraded.known["files"]["data"]:
        assert len(upgraded.client.get(f"/v1/files/{file['id']}/content").content) == file["bytes"]


def test_keys_open_what_they_opened(upgraded: Upgraded) -> None:
    upgraded.use_key("train")
    assert upgraded.get("/v1/fine_tuning/jobs")["data"]
    upgraded.use_key("inference")
    assert upgraded.client.get("/api/keys").status_code == 403
    for name in upgraded.known["revoked"]:
        upgraded.use_key(name)
        assert upgraded.client.get("/v1/models").status_code == 401


def test_versions_are_loaded_and_the_route_answers_by_its_arms(upgraded: Upgraded) -> None:
    upgraded.use_key("admin")
    for version in upgraded.known["versions"]["versions"]:
        wait_loaded(upgraded.client, f"support/versions/{version['version']}")
        pinned = upgraded.chat(version["full_name"])
        assert pinned.status_code == 200, pinned.text
        assert pinned.headers["x-turnout-digest"] == version["digest"]
    upgraded.use_key("inference")
    arms = {
        arm["target"] for route in upgraded.known["routes"] for arm in route["variants"] if route["name"] == "support"
    }

    answers = [upgraded.chat("support") for _ in range(5)]

    assert {answer.status_code for answer in answers} == {200}
    assert {answer.headers["x-turnout-version"] for answer in answers} <= arms


def test_a_rollback_ends_the_split_that_was_there(upgraded: Upgraded) -> None:
    upgraded.use_key("admin")
    [before] = [route for route in upgraded.known["routes"] if route["name"] == "support"]

    answer_of(upgraded.client.post("/api/routes/support/rollback", json={"reason": "after the upgrade"}))

    route = upgraded.get("/api/routes/support")
    assert route["stable"] == before["stable"]
    assert [arm["target"] for arm in route["variants"] if arm["weight"]] == [before["stable"]]
    until(
        lambda: upgraded.chat("support").headers["x-turnout-version"] == before["stable"],
        lambda: f"{before['stable']} answers",
    )


def the_program_of(version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Migrations as that release had them: none that is newer than its home's schema."""
    scripts, here = tmp_path / "scripts", Path(migrations.__file__).parent
    (scripts / "versions").mkdir(parents=True)
    known = schema_of(rebuild(version, tmp_path / "old")[0] / DATABASE)
    for path in (here / "versions").glob("0*.py"):
        if path.name[: len(known)] <= known:
            (scripts / "versions" / path.name).write_text(path.read_text())
    (scripts / "env.py").write_text((here / "env.py").read_text())
    original = migrations._config

    def config() -> object:
        found = original()
        found.set_main_option("script_location", str(scripts))
        return found

    monkeypatch.setattr(migrations, "_config", config)


@pytest.mark.parametrize("version", kept())
async def test_the_release_that_made_it_refuses_it_now_and_takes_the_backup(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(*rebuild(version, tmp_path))
    database = settings.home / DATABASE
    await migrate(settings)
    after = database.read_bytes()
    the_program_of(version, tmp_path, monkeypatch)

    with pytest.raises(Invalid, match="restore the backup") as refused:
        await migrate(settings)

    assert refused.value.code == "schema_newer"
    assert database.read_bytes() == after
    [backup] = settings.home.glob("*.bak")
    assert backup.name in refused.value.message
    backup.replace(database)
    await migrate(settings)
