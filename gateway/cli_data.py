"""`turnout data check`: is a file fit for training?"""

from __future__ import annotations

from pathlib import Path

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from .cli_console import ExitCode, session, short, size, table
from .datasets.models import DataCheck, DataReport, Finding
from .datasets.validation import check_files

app = typer.Typer(no_args_is_help=True, help="Training data: check it before anything is loaded.")


@app.command("check")
def check(
    context: typer.Context,
    file: Path = typer.Argument(help='Chat JSONL: one {"messages": [...]} a line.', exists=True, dir_okay=False),
    validation: Path | None = typer.Option(
        None, help="Held-out rows; also checked for leaks.", exists=True, dir_okay=False
    ),
) -> None:
    """Check training data, with line numbers: format, roles, empty answers, repeats, leaks. Exit 1 when it is not fit."""
    shell = session(context)
    with shell.waiting(f"Reading {file}"):
        found = check_files(file, validation)
    shell.show(found.model_dump(mode="json") | {"is_valid": found.is_valid}, lambda: _report(found, file, validation))
    if not found.is_valid:
        raise typer.Exit(ExitCode.FAILED)


def _report(found: DataCheck, training: Path, validation: Path | None) -> Group:
    parts: list[RenderableType] = [*_one(training, found.training)]
    if validation is not None and found.validation is not None:
        parts += ["", *_one(validation, found.validation)]
    parts += [_finding(finding, "red") for finding in found.leak_errors]
    parts += [_finding(finding, "yellow") for finding in found.leak_warnings]
    if found.leaked_rows:
        parts.append(f"{found.leaked_rows} validation rows stand in the training file too.")
    verdict = (
        "[green]Fit for training.[/]" if found.is_valid else "[red]Not fit for training: mend the errors above.[/]"
    )
    return Group(*parts, "", Text.from_markup(verdict))


def _one(path: Path, report: DataReport) -> list[RenderableType]:
    statistics = report.statistics
    facts = [
        ("rows", f"{report.valid_rows} fit of {report.rows}, {size(report.size_bytes)}, sha256 {short(report.digest)}"),
        (
            "messages",
            f"{statistics.messages}: " + ", ".join(f"{count} {role}" for role, count in statistics.roles.items()),
        ),
        ("system prompts", f"{statistics.system_prompts} distinct"),
    ]
    if statistics.row_characters:
        spread = statistics.row_characters
        facts.append(("characters a row", f"median {spread.median}, 95 % below {spread.p95}, longest {spread.maximum}"))
    if statistics.answer_characters:
        spread = statistics.answer_characters
        facts.append(
            ("characters of answers", f"median {spread.median}, shortest {spread.minimum}, longest {spread.maximum}")
        )
    shown = [_finding(finding, "red") for finding in report.errors] + [
        _finding(finding, "yellow") for finding in report.warnings
    ]
    hidden = report.error_count + report.warning_count - len(shown)
    more = (
        [f"... and {hidden} more: " + ", ".join(f"{count} {code}" for code, count in report.counts.items())]
        if hidden > 0
        else []
    )
    return [Text(str(path), style="bold"), table(None, ("", ""), facts), *shown, *more]


def _finding(finding: Finding, colour: str) -> Text:
    return Text(str(finding), style=colour)
