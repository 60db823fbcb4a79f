"""`turnout gc`: what is over, and away with it."""

from __future__ import annotations

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from .cli_console import moment, session, size, table
from .client_models import GcReport


def gc(
    context: typer.Context,
    dry_run: bool = typer.Option(False, "--dry-run", help="Only show what would go."),
) -> None:
    """Remove what is past its retention now. The controller does so by itself, bit by bit; settings say how long things stay."""
    shell = session(context)
    with shell.client() as client:
        report = client.collect(dry_run=dry_run)
    shell.show(report, lambda: render_gc(report))


def render_gc(report: GcReport) -> Group:
    """What it says to people."""
    if not report.kinds:
        return Group(Text("Nothing is past its retention."))
    rows = [
        (
            kind.kind,
            f"{kind.count:,}{'+' if kind.is_more else ''} {kind.unit}",
            f"about {size(kind.size_bytes)}",
            moment(kind.oldest),
        )
        for kind in report.kinds
    ]
    title = "Would go" if report.dry_run else "Gone"
    parts: list[RenderableType] = [table(title, ("KIND", "HOW MANY", "BYTES", "OLDEST (UTC)"), rows)]
    parts += [Text(note) for note in report.notes]
    if not report.is_complete:
        parts.append(Text("There is more: the controller goes on with it."))
    return Group(*parts)
