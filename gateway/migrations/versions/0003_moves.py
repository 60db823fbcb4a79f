"""What a route tries and how it got there; which versions became stable through gates; answers of moves, for repeats."""

from __future__ import annotations

import json
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("adapter_versions", sa.Column("gated_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("routes", sa.Column("trial", sa.JSON(none_as_null=True), nullable=True))
    op.add_column("routes", sa.Column("last_move", sa.JSON(none_as_null=True), nullable=True))
    op.create_table(
        "moves",
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("project_id", sa.String(40), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("actor", sa.String(80), nullable=False),
        sa.Column("route", sa.String(48), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("asked", sa.String(64), nullable=False),
        sa.Column("idempotency_key", sa.String(128), nullable=True),
        sa.Column("answer", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_moves")),
        sa.UniqueConstraint("project_id", "idempotency_key", name="uq_moves_project_id_idempotency_key"),
    )
    op.create_index("ix_moves_at", "moves", ["at"])
    op.create_index("ix_moves_project_id", "moves", ["project_id"])
    op.create_index("ix_moves_route_revision", "moves", ["route", "revision"])
    if op.get_context().as_sql:  # written down for a new database, which has no rows
        return
    connection = op.get_bind()
    _name_trials(connection)
    _tell_gated_from_forced(connection)


def _name_trials(connection: sa.Connection) -> None:
    """Splits that run now: until here arms newer than stable, or never stable, were what a rollback took back."""
    versions = _versions(connection)
    for route in connection.execute(sa.text("SELECT name, revision, stable, variants FROM routes")).mappings():
        number, _ = versions.get(route["stable"], (0, False))
        arms = [variant["target"] for variant in _parsed(route["variants"]) if variant["weight"]]
        tried = [arm for arm in arms if arm != route["stable"] and _is_tried(versions.get(arm), number)]
        if tried:
            trial = {"arms": tried, "against": route["stable"], "since_revision": route["revision"]}
            change = sa.text("UPDATE routes SET trial = :trial WHERE name = :name")
            connection.execute(change, {"trial": json.dumps(trial), "name": route["name"]})


def _is_tried(version: tuple[int, bool] | None, number: int) -> bool:
    return version is not None and (version[0] > number or not version[1])


def _versions(connection: sa.Connection) -> dict[str, tuple[int, bool]]:
    rows = connection.execute(sa.text("SELECT adapter, version, promoted_at FROM adapter_versions"))
    return {f"{adapter}@{version}": (version, promoted is not None) for adapter, version, promoted in rows}


def _tell_gated_from_forced(connection: sa.Connection) -> None:
    """The audit log says which promotions were not forced."""
    rows = connection.execute(sa.text("SELECT after FROM audit WHERE action = 'route.promote'"))
    gated = {after["stable"] for after in (_parsed(row.after) for row in rows) if not after.get("force")}
    for name in gated:
        adapter, _, version = name.partition("@")
        change = sa.text(
            "UPDATE adapter_versions SET gated_at = promoted_at WHERE adapter = :adapter AND version = :version"
        )
        connection.execute(change, {"adapter": adapter, "version": int(version)})


def _parsed(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value
