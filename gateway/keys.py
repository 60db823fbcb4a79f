"""API keys: 256 random bits, kept only as HMAC-SHA-256 under a pepper, with scopes."""

from __future__ import annotations

import hmac
import os
import secrets
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, get_args

from pydantic import BaseModel
from sqlalchemy import delete, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from . import tables
from .audit import record_audit
from .database import DEFAULT_PROJECT, Database, bump_revision
from .durable import fsync, write_new
from .errors import Conflict, Forbidden, Invalid, NotFound, quoted
from .ids import new_id, now
from .settings import Settings

Scope = Literal["inference", "preview", "train", "admin", "evaluate"]
SCOPES: frozenset[str] = frozenset(get_args(Scope))
KEY_PREFIX = "tn-"
# A real key has 46 characters. The limit keeps hostile ones from costing anything.
MAX_KEY_BYTES = 200
_PEPPER_BYTES = 32
_MAX_NAME = 76


@dataclass(frozen=True, slots=True)
class Principal:
    """Who is asking, and how far they may reach."""

    key_id: str
    name: str
    project_id: str
    scopes: frozenset[str]

    @property
    def actor(self) -> str:
        """How records name this principal."""
        return f"key:{self.name}"

    def allows(self, scope: str) -> bool:
        """Whether this principal has `scope`; `admin` implies every one but `evaluate`, which changes what is counted."""
        return scope in self.scopes or (scope != "evaluate" and "admin" in self.scopes)

    def require(self, scope: str) -> None:
        """Raise `Forbidden` unless this principal has `scope`."""
        if not self.allows(scope):
            have = ", ".join(sorted(self.scopes)) or "none"
            raise Forbidden(f"this needs a key with scope {scope!r}; key {self.name!r} has: {have}")


# Everyone, where the server runs without keys (loopback only).
ANONYMOUS = Principal("anonymous", "anonymous", DEFAULT_PROJECT, frozenset({"admin"}))


_FIRST_ADMIN = "first-admin"
# What is made without keys belongs to the one; the other must be free on the first start with keys.
_RESERVED_NAMES = frozenset({ANONYMOUS.name, _FIRST_ADMIN})


class ApiKey(BaseModel, frozen=True):
    """A key as it is listed: everything but the secret."""

    id: str
    name: str
    scopes: tuple[Scope, ...]
    project_id: str
    created_at: datetime
    created_by: str
    expires_at: datetime | None = None
    revoked_at: datetime | None = None


def load_pepper(settings: Settings) -> bytes:
    """The secret under which keys are hashed; made once, and the same for every process of this home."""
    path = settings.secrets_dir / "pepper"
    if not path.exists():
        # A link appears whole or not at all, and of two processes that start together one wins.
        temporary = path.with_name(f"pepper.{os.getpid()}.{secrets.token_hex(4)}")
        write_new(temporary, secrets.token_bytes(_PEPPER_BYTES), mode=0o600)
        try:
            path.hardlink_to(temporary)
        except FileExistsError:
            pass
        finally:
            temporary.unlink()
        fsync(path.parent)  # without its pepper no key of the database is good
    pepper = path.read_bytes()
    if len(pepper) != _PEPPER_BYTES:
        raise Invalid(
            f"{path} must hold {_PEPPER_BYTES} bytes, it has {len(pepper)}; restore it from a backup", code="bad_pepper"
        )
    return pepper


def hash_key(raw: str, pepper: bytes) -> str:
    """What is stored and looked up. Finding it by equality tells an attacker nothing: the pepper is secret."""
    return hmac.digest(pepper, raw.encode("utf-8", "surrogateescape"), "sha256").hex()


class Keys:
    """Make, list and revoke keys."""

    def __init__(self, database: Database, pepper: bytes) -> None:
        self._database = database
        self._pepper = pepper

    def hash(self, raw: str) -> str:
        """The stored form of a raw key."""
        return hash_key(raw, self._pepper)

    async def create(
        self,
        name: str,
        scopes: Collection[str],
        *,
        actor: str,
        project_id: str = DEFAULT_PROJECT,
        expires_at: datetime | None = None,
    ) -> tuple[ApiKey, str]:
        """A new key and its secret, which is not kept and cannot be shown again. Its name must never have been used."""
        if name in _RESERVED_NAMES:
            text = f"the name {name!r} is kept for the server's own use; choose another"
            raise Invalid(text, code="key_name_reserved", param="name")
        async with self._database.write() as connection:
            return await self._create(
                connection, name, scopes, actor=actor, project_id=project_id, expires_at=expires_at
            )

    async def create_first(self, show: Callable[[str], None]) -> bool:
        """Show the secret of a new admin key on the very first start; False once any admin key was ever made.

        It is shown before it counts: a crash in between leaves a key that does not work, and the next start shows another.
        """
        async with self._database.write() as connection:
            rows = await connection.execute(select(tables.api_keys.c.scopes))
            if any("admin" in scopes for (scopes,) in rows):
                return False
            _, raw = await self._create(
                connection,
                _FIRST_ADMIN,
                ["admin"],
                actor="system:first-start",
                project_id=DEFAULT_PROJECT,
                expires_at=None,
            )
            show(raw)
        return True

    async def _create(
        self,
        connection: AsyncConnection,
        name: str,
        scopes: Collection[str],
        *,
        actor: str,
        project_id: str,
        expires_at: datetime | None,
    ) -> tuple[ApiKey, str]:
        # Before all else: on PostgreSQL this row makes those who ask for the same name take turns.
        await bump_revision(connection)
        _check_name(name)
        _check_scopes(scopes)
        if expires_at is not None and expires_at <= now():
            raise Invalid(f"expires_at {expires_at.isoformat()} is in the past", param="expires_at")
        await _check_name_is_new(connection, name, project_id)
        raw = KEY_PREFIX + secrets.token_urlsafe(32)
        key = ApiKey(
            id=new_id("key-"),
            name=name,
            scopes=tuple(sorted(set(scopes))),
            project_id=project_id,
            created_at=now(),
            created_by=actor,
            expires_at=expires_at,
        )
        await connection.execute(
            insert(tables.api_keys).values(
                id=key.id,
                project_id=project_id,
                created_at=key.created_at,
                created_by=actor,
                name=name,
                hash=self.hash(raw),
                scopes=list(key.scopes),
                expires_at=expires_at,
            )
        )
        await record_audit(
            connection,
            project_id=project_id,
            actor=actor,
            action="key.create",
            subject=name,
            after={"id": key.id, "scopes": list(key.scopes)},
        )
        return key, raw

    async def list(self, *, project_id: str = DEFAULT_PROJECT) -> list[ApiKey]:
        """Every key of the project, oldest first, revoked ones too."""
        async with self._database.read() as connection:
            found = await connection.execute(
                select(tables.api_keys).where(tables.api_keys.c.project_id == project_id).order_by(tables.api_keys.c.id)
            )
            rows = found.mappings().all()
        return [_api_key(row) for row in rows]

    async def revoke(self, key_id: str, actor: str, *, project_id: str = DEFAULT_PROJECT) -> ApiKey:
        """Make the key useless, at once on this gateway and within a poll on others. Safe to repeat."""
        table = tables.api_keys
        async with self._database.write() as connection:
            found = await connection.execute(
                select(table).where(table.c.id == key_id, table.c.project_id == project_id)
            )
            row = found.mappings().one_or_none()
            if row is None:
                raise NotFound(f"no key {quoted(key_id)}", param="key_id")
            key = _api_key(row)
            if key.revoked_at is not None:
                return key
            moment = now()
            await connection.execute(update(table).where(table.c.id == key_id).values(revoked_at=moment))
            await _record_end(connection, key, actor)
            return key.model_copy(update={"revoked_at": moment})

    async def discard(self, key: ApiKey, actor: str) -> None:
        """Make a key useless and forget it, all but what the audit log says; for keys that own nothing. Safe to repeat."""
        table = tables.api_keys
        async with self._database.write() as connection:
            gone = await connection.execute(delete(table).where(table.c.id == key.id).returning(table.c.revoked_at))
            row = gone.one_or_none()
            if row is not None and row.revoked_at is None:
                await _record_end(connection, key, actor)


def _check_name(name: str) -> None:
    if not name or len(name) > _MAX_NAME or not name.isprintable() or name != name.strip():
        raise Invalid(f"key name {name!r:.100} must be 1 to {_MAX_NAME} printable characters", param="name")


def _check_scopes(scopes: Collection[str]) -> None:
    unknown = sorted(set(scopes) - SCOPES)
    if unknown or not scopes:
        raise Invalid(f"scopes {unknown or '[]'} are not among: {', '.join(sorted(SCOPES))}", param="scopes")


async def _check_name_is_new(connection: AsyncConnection, name: str, project_id: str) -> None:
    """What a key makes belongs to its name: whoever got a name that was used would get that too."""
    table = tables.api_keys
    query = select(table.c.id).where(table.c.name == name, table.c.project_id == project_id).limit(1)
    if (await connection.execute(query)).first() is not None:
        text = f"a key was named {name!r} before, and what that key made belongs to the name; choose a new name"
        raise Conflict(text, code="key_name_taken", param="name")


async def _record_end(connection: AsyncConnection, key: ApiKey, actor: str) -> None:
    await record_audit(
        connection,
        project_id=key.project_id,
        actor=actor,
        action="key.revoke",
        subject=key.name,
        before={"id": key.id},
    )
    await bump_revision(connection)


def _api_key(row: Any) -> ApiKey:
    return ApiKey.model_validate({name: row[name] for name in ApiKey.model_fields})
