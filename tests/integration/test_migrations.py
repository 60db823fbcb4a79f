"""The schema: what migrations make is what the code expects, and they never harm what is there."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, MetaData, create_engine, insert, select, text, update
from sqlalchemy.exc import IntegrityError

from gateway.audit import record_audit
from gateway.database import DEFAULT_PROJECT, Database
from gateway.errors import Invalid
from gateway.migrations import run as module
from gateway.migrations.run import head, migrate
from gateway.routing.models import Trial
from gateway.routing.store import get_route
from gateway.settings import Settings
from gateway.tables import adapter_versions, audit, metadata, replicas
from tests.factories import a_version


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home")


@pytest.fixture
async def database(settings: Settings) -> AsyncIterator[Database]:
    await migrate(settings)
    database = Database(settings.database)
    yield database
    await database.close()


def file_of(settings: Settings) -> Path:
    return settings.home / "turnout.db"


async def test_migrations_make_exactly_the_tables_of_the_code(database: Database) -> None:
    def differences(connection: Connection) -> list[object]:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        return list(compare_metadata(context, metadata))

    async with database.read() as connection:
        assert await connection.run_sync(differences) == []


async def test_migrating_again_changes_nothing_and_makes_no_backup(settings: Settings, database: Database) -> None:
    await migrate(settings)

    assert list(settings.home.glob("*.bak")) == []


async def test_processes_that_start_together_migrate_once(settings: Settings) -> None:
    await asyncio.gather(*(migrate(settings) for _ in range(8)))

    with closing(sqlite3.connect(file_of(settings))) as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [(head(),)]


async def test_the_file_is_for_its_owner_alone(settings: Settings, database: Database) -> None:
    assert file_of(settings).stat().st_mode & 0o777 == 0o600


async def test_a_newer_schema_is_refused_and_left_alone(settings: Settings, database: Database) -> None:
    async with database.write() as connection:
        await connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    before = file_of(settings).read_bytes()

    with pytest.raises(Invalid, match="9999") as caught:
        await migrate(settings)

    assert caught.value.code == "schema_newer"
    assert file_of(settings).read_bytes() == before
    assert list(settings.home.glob("*.bak")) == []


async def test_another_programs_database_is_left_alone(settings: Settings) -> None:
    settings.home.mkdir()
    with closing(sqlite3.connect(file_of(settings))) as connection:
        connection.execute("CREATE TABLE theirs (id INTEGER)")

    with pytest.raises(Invalid) as caught:
        await migrate(settings)

    assert caught.value.code == "schema_unknown"


def add_a_second_migration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, upgrade: str) -> None:
    """A later release of the program: the same migrations and one more."""
    scripts = tmp_path / "scripts"
    (scripts / "versions").mkdir(parents=True)
    here = Path(module.__file__).parent
    for file in ("env.py", "script.py.mako", *(f"versions/{path.name}" for path in (here / "versions").glob("0*.py"))):
        (scripts / file).write_text((here / file).read_text())
    (scripts / "versions" / "9000_later.py").write_text(
        f"from alembic import op\nimport sqlalchemy as sa\nrevision = '9000'\ndown_revision = '{head()}'\n\n\ndef upgrade():\n    {upgrade}\n"
    )

    original = module._config

    def config() -> object:
        found = original()
        found.set_main_option("script_location", str(scripts))
        return found

    monkeypatch.setattr(module, "_config", config)


async def write_something(database: Database) -> None:
    async with database.write() as connection:
        await record_audit(connection, project_id=DEFAULT_PROJECT, actor="key:a", action="x", subject="support@1")


async def test_an_upgrade_keeps_the_rows_and_a_backup_from_before(
    settings: Settings, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = head()
    await write_something(database)
    add_a_second_migration(tmp_path, monkeypatch, "op.add_column('files', sa.Column('note', sa.Text()))")

    await migrate(settings)

    backup = settings.home / f"turnout.db.{old}.bak"
    for file, revision, columns in ((file_of(settings), "9000", 1), (backup, old, 0)):
        with closing(sqlite3.connect(file)) as connection:
            assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [(revision,)]
            assert connection.execute("SELECT count(*) FROM audit").fetchone() == (1,)
            found = connection.execute("SELECT count(*) FROM pragma_table_info('files') WHERE name = 'note'").fetchone()
            assert found == (columns,)
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert backup.stat().st_mode & 0o777 == 0o600


def make_old(settings: Settings, revision: str, rows: dict[str, list[dict[str, Any]]]) -> None:
    """A database as an older program left it, with rows by table. Timestamps are what that program wrote."""
    settings.home.mkdir()
    config = module._config()
    engine = create_engine(f"sqlite:///{file_of(settings)}")
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
        old = MetaData()
        old.reflect(connection)
        for name, several in rows.items():
            for row in several:
                connection.execute(insert(old.tables[name]).values(row))
    engine.dispose()


async def test_what_was_tried_and_what_was_forced_is_known_after_an_upgrade(settings: Settings) -> None:
    at = datetime(2026, 11, 1, tzinfo=UTC)
    made = {"project_id": "p", "created_at": at, "created_by": "a"}
    version = made | {"adapter": "s", "base_model": "base", "base_digest": "b", "manifest_digest": "m", "rank": 8}
    version |= {"size_bytes": 1, "state": "verified"}
    route = made | {"revision": 7, "salt": "x", "previous": "base", "gates": [], "updated_at": at, "updated_by": "a"}
    shares = {"s@1": 5, "s@2": 85, "s@3": 5, "base": 5}
    split = [{"target": target, "weight": weight} for target, weight in shares.items()]
    moved = {"project_id": "p", "at": at, "actor": "a", "action": "route.promote", "subject": "s"}
    rows: dict[str, list[dict[str, Any]]] = {
        "adapter_versions": [
            version | {"id": f"v{n}", "version": n, "digest": f"d{n}", "promoted_at": at if n < 3 else None}
            for n in (1, 2, 3)
        ],
        "routes": [
            route | {"name": "s", "stable": "s@2", "variants": split},
            route | {"name": "t", "stable": "base", "variants": [{"target": "base", "weight": 100}]},
        ],
        "audit": [
            moved | {"id": "1", "after": {"stable": "s@1"}},
            moved | {"id": "2", "after": {"stable": "s@2", "force": True}},
        ],
    }
    make_old(settings, "0002", rows)

    await migrate(settings)

    database = Database(settings.database)
    async with database.read() as reading:
        tried, whole = [await get_route(reading, name, project_id="p") for name in ("s", "t")]
        gated = (await reading.execute(select(adapter_versions.c.version, adapter_versions.c.gated_at))).all()
    await database.close()
    assert tried.trial == Trial(arms=("s@3",), against="s@2", since_revision=7)
    assert (whole.trial, whole.last_move) == (None, None)
    assert [version for version, moment in gated if moment is not None] == [1]


async def test_a_replica_of_the_first_schema_is_kept_and_has_not_failed(settings: Settings) -> None:
    replica = {"id": "engine-0", "state": "ready", "socket": "/e.sock", "epoch": "1", "self_test": "passed"}
    make_old(settings, "0001", {"replicas": [replica | {"revision": 3}]})

    await migrate(settings)

    found = Database(settings.database)
    async with found.read() as reading:
        [row] = (await reading.execute(select(replicas))).mappings()
    await found.close()
    assert (row["id"], row["state"], row["revision"]) == ("engine-0", "ready", 3)
    assert (row["failures"], row["futile_starts"], row["last_failure"], row["batch_noise"]) == (0, 0, None, None)


async def test_an_upgrade_that_fails_half_way_changes_nothing(
    settings: Settings, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = head()
    await write_something(database)
    add_a_second_migration(tmp_path, monkeypatch, "op.add_column('files', sa.Column('note', sa.Text())); 1 / 0")

    with pytest.raises(ZeroDivisionError):
        await migrate(settings)

    with closing(sqlite3.connect(file_of(settings))) as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [(old,)]
        assert connection.execute("SELECT count(*) FROM pragma_table_info('files') WHERE name = 'note'").fetchone() == (
            0,
        )


@pytest.mark.parametrize(
    "change",
    ["UPDATE audit SET reason = 'forged'", "DELETE FROM audit", "INSERT OR REPLACE INTO audit SELECT * FROM audit"],
)
async def test_the_audit_log_only_grows(database: Database, change: str) -> None:
    await write_something(database)

    with pytest.raises(IntegrityError, match="append-only"):
        async with database.write() as connection:
            await connection.execute(text(change))

    await write_something(database)
    async with database.read() as connection:
        assert len((await connection.execute(select(audit))).all()) == 2


async def with_a_version(database: Database) -> None:
    async with database.write() as connection:
        await connection.execute(insert(adapter_versions).values(**a_version().model_dump()))


@pytest.mark.invariant(1)
@pytest.mark.parametrize(
    "column", ["digest", "manifest_digest", "version", "adapter", "base_digest", "rank", "parent", "job_id"]
)
async def test_a_versions_identity_cannot_be_rewritten(database: Database, column: str) -> None:
    await with_a_version(database)
    value: object = 2 if column in ("version", "rank") else "f" * 40

    with pytest.raises(IntegrityError, match="immutable"):
        async with database.write() as connection:
            await connection.execute(update(adapter_versions).values({column: value}))


@pytest.mark.invariant(1)
@pytest.mark.parametrize(
    "change", ["DELETE FROM adapter_versions", "INSERT OR REPLACE INTO adapter_versions SELECT * FROM adapter_versions"]
)
async def test_a_version_cannot_be_removed_or_replaced(database: Database, change: str) -> None:
    await with_a_version(database)

    with pytest.raises(IntegrityError, match="immutable"):
        async with database.write() as connection:
            await connection.execute(text(change))


async def test_a_versions_state_can_move(database: Database) -> None:
    await with_a_version(database)

    async with database.write() as connection:
        moved = await connection.execute(update(adapter_versions).values(state="verified", digest=a_version().digest))

    assert moved.rowcount == 1


@pytest.mark.mutant(1)
async def test_mutant_without_the_trigger_a_version_is_rewritten(database: Database) -> None:
    await with_a_version(database)
    async with database.write() as connection:
        await connection.execute(text("DROP TRIGGER adapter_versions_identity"))
        await connection.execute(update(adapter_versions).values(digest="f" * 64))

    async with database.read() as connection:
        assert (await connection.execute(select(adapter_versions.c.digest))).scalar_one() == "f" * 64


def test_postgresql_gets_the_same_tables_and_guards() -> None:
    config = module._config()
    config.set_main_option("dialect", "postgresql")
    config.output_buffer = StringIO()

    command.upgrade(config, "head", sql=True)

    statements = config.output_buffer.getvalue()
    for table in metadata.tables:
        assert f"CREATE TABLE {table} (" in statements
    for guard in (
        "UPDATE OR TRUNCATE ON audit",
        "DELETE ON audit",
        "UPDATE ON adapter_versions",
        "DELETE OR TRUNCATE ON adapter_versions",
    ):
        assert f"BEFORE {guard}" in statements
    assert "TIMESTAMP WITH TIME ZONE" in statements


async def test_an_older_home_keeps_its_verdicts_and_their_jobs_reports(settings: Settings) -> None:
    """The report was kept twice; the copy of the verdict goes, the job's stays."""
    settings.home.mkdir()
    with closing(sqlite3.connect(file_of(settings))) as old:
        engine = create_engine(f"sqlite:///{file_of(settings)}")
        with engine.begin() as connection:
            config = module._config()
            config.attributes["connection"] = connection
            command.upgrade(config, "0002")
        engine.dispose()
        moment = "2026-01-01 00:00:00.000000"
        old.execute(
            "INSERT INTO jobs (id, project_id, created_at, created_by, kind, state, spec, result, attempt, cancel_requested, revision) "
            """VALUES ('evaljob-1', 'p', ?, 't', 'evaluation', 'succeeded', '{}', '{"report": {"rows": [1]}}', 1, 0, 1)""",
            (moment,),
        )
        old.execute(
            "INSERT INTO verdicts (id, project_id, created_at, created_by, digest, suite, suite_digest, fingerprint, baseline, verdict, "
            "reason, report, job_id, looks) VALUES ('v', 'p', ?, 't', 'd', 's', 'sd', 'f', 'b', 'passed', 'r', '{}', 'evaljob-1', 1)",
            (moment,),
        )
        old.commit()

    await migrate(settings)

    with closing(sqlite3.connect(file_of(settings))) as new:
        assert new.execute("SELECT verdict, job_id FROM verdicts").fetchall() == [("passed", "evaljob-1")]
        assert new.execute("SELECT result FROM jobs").fetchone() == ('{"report": {"rows": [1]}}',)
        new.execute(
            "INSERT INTO verdicts (id, project_id, created_at, created_by, digest, suite, suite_digest, fingerprint, baseline, verdict, "
            "reason, job_id, looks) VALUES ('w', 'q', '2026', 't', 'd', 's', 'sd', 'f', 'b', 'failed', 'r', 'evaljob-2', 1)"
        )
