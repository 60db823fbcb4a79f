"""`turnout keys`, `turnout audit`: who may do what, and who did."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import typer

from .cli_console import clip, moment, session, table
from .client_models import AuditEntry

MAX_CHANGE = 44
MAX_REASON = 60

app = typer.Typer(no_args_is_help=True, help="API keys and their scopes.")


@app.command("create")
def create(
    context: typer.Context,
    name: str = typer.Argument(help="What the key is for; stands in the audit log."),
    scope: list[str] = typer.Option(
        ["inference"], "--scope", "-s", help="inference, preview, train or admin; repeat for several."
    ),
    expires_in_days: float | None = typer.Option(None, min=0, help="After this it stops working; default: never."),
) -> None:
    """Create a key and print it. It is shown this once and stored only as a hash."""
    shell = session(context)
    expires_at = datetime.now(UTC) + timedelta(days=expires_in_days) if expires_in_days is not None else None
    with shell.client() as client:
        made = client.create_key(name, scope, expires_at=expires_at)
    shell.show(
        made, lambda: f"{made.key}\n[dim]{made.id}, scopes {', '.join(made.scopes)}. Keep it: it is not shown again.[/]"
    )


@app.command("list")
def list_keys(context: typer.Context) -> None:
    """List keys, without their secrets."""
    shell = session(context)
    with shell.client() as client:
        found = client.keys()
    rows = [
        (
            key.id,
            key.name,
            ", ".join(key.scopes),
            moment(key.created_at),
            moment(key.expires_at),
            moment(key.revoked_at),
        )
        for key in found
    ]
    shell.show(found, lambda: table(None, ("ID", "NAME", "SCOPES", "CREATED", "EXPIRES", "REVOKED"), rows))


@app.command("revoke")
def revoke(
    context: typer.Context, key_id: str = typer.Argument(help="Id of the key, from `turnout keys list`.")
) -> None:
    """Make a key useless at once."""
    shell = session(context)
    with shell.client() as client:
        client.revoke_key(key_id)
    shell.show({"id": key_id, "revoked": True}, lambda: f"{key_id} is revoked.")


def audit(
    context: typer.Context,
    subject: str | None = typer.Option(None, "--subject", "-s", help="Only entries about this route, version or key."),
    limit: int = typer.Option(30, min=1, max=1000, help="How many."),
) -> None:
    """Show who changed what, when and why; newest first. Long reasons are cut; --json has them whole."""
    shell = session(context)
    with shell.client() as client:
        found = client.audit(subject=subject, limit=limit)
    rows = [
        (moment(row.at), row.actor, row.action, row.subject, _change(row), clip(row.reason, MAX_REASON))
        for row in found
    ]
    shell.show(found, lambda: table(None, ("WHEN (UTC)", "WHO", "DID", "TO", "CHANGE", "REASON"), rows))


def _change(entry: AuditEntry) -> str:
    before, after = _brief(entry.before), _brief(entry.after)
    return clip(f"{before} → {after}" if before and after else after or before, MAX_CHANGE)


def _brief(value: object) -> str:
    """A state in few words: what is stable, or the whole when it is short."""
    if isinstance(value, dict):
        named = value.get("stable") or value.get("state")
        return str(named) if named else ", ".join(f"{key} {item}" for key, item in value.items())
    return "" if value is None else str(value)
