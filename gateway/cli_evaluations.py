"""`turnout eval`, `turnout suite`: is a version better, and did it lose anything?"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from .cli_console import (
    WAIT_HELP,
    ExitCode,
    Patience,
    Session,
    moment,
    poll,
    session,
    settings_of,
    short,
    size,
    table,
    verdict_exit,
    verdict_text,
)
from .client import Client
from .client_models import Job, Suite
from .errors import GatewayError, Invalid
from .jobs.suites import Suites

eval_app = typer.Typer(no_args_is_help=True, help="Evaluations: run a suite on a version, read its verdict.")
suite_app = typer.Typer(no_args_is_help=True, help="Suites: the tasks and gates that a version must pass.")
STALLED_AFTER_S = 3600.0

HOME = typer.Option(None, "--home", help="Home directory of the server; default TURNOUT_HOME.")


@eval_app.command("run")
def run(
    context: typer.Context,
    target: str = typer.Argument(help="Version, such as support@1."),
    suite: str = typer.Option(..., "--suite", "-s", help="Name of the suite."),
    wait: bool = typer.Option(False, "--wait", help="Until there is a verdict; it becomes the exit code."),
    larger_look: bool = typer.Option(False, help="The one larger look that an inconclusive first one allows."),
    timeout: float | None = typer.Option(None, help=WAIT_HELP),
) -> None:
    """Run a suite on a version. With --wait: exit 0 passed, 1 failed or error, 2 inconclusive."""
    shell = session(context)
    with shell.client() as client:
        job = client.evaluate(target, suite, larger_look=larger_look)
        if wait:
            job = wait_for_job(shell, client, job.id, timeout_s=timeout)
    shell.show(
        job, lambda: render_evaluation(job) if job.is_final else f"Started {job.id}.  Next: turnout eval show {job.id}"
    )
    if wait:
        raise typer.Exit(_exit_code(job))


def wait_for_job(shell: Session, client: Client, job_id: str, *, timeout_s: float | None) -> Job:
    """Until a job is final, showing the last thing it said."""
    patience = Patience(timeout_s, STALLED_AFTER_S)

    def look() -> Job | None:
        job = client.job(job_id)
        events = client.job_events(job_id)
        tell(f"{job.state}: {events[-1].message}" if events else job.state)
        patience.saw((job.state, job.attempt, [event.id for event in events[-1:]]))
        return job if job.is_final else None

    with shell.waiting(job_id) as tell:
        found = poll(look, every_s=1.0, patience=patience)
    if found is None:
        raise GatewayError(
            f"{job_id} is not done: {patience.why}; it goes on: turnout jobs show {job_id}", code="timeout"
        )
    return found


def _exit_code(job: Job) -> ExitCode:
    return verdict_exit(verdict_of(job) or "error")


def verdict_of(job: Job) -> str | None:
    """The verdict of a finished evaluation."""
    found = (job.result or {}).get("verdict")
    return str(found) if found else None


@eval_app.command("show")
def show(
    context: typer.Context,
    job_id: str | None = typer.Argument(None, help="Evaluation; left out: the latest of --target."),
    target: str | None = typer.Option(None, "--target", "-t", help="Version, such as support@1."),
) -> None:
    """Show an evaluation: verdict, every gate with its numbers, and the report."""
    shell = session(context)
    with shell.client() as client:
        job = client.evaluation(job_id) if job_id else _latest(client, target)
    shell.show(job, lambda: render_evaluation(job))


def _latest(client: Client, target: str | None) -> Job:
    if target is None:
        raise typer.BadParameter("name an evaluation, or a version with --target", param_hint="JOB_ID")
    found = client.evaluations(target)
    if not found:
        raise Invalid(
            f"{target} has no evaluation yet: turnout eval run {target} --suite NAME --wait", code="no_evaluation"
        )
    return client.evaluation(found[0].id)  # lists leave reports out


@eval_app.command("list")
def list_evaluations(
    context: typer.Context, target: str | None = typer.Option(None, "--target", "-t", help="Only of this version.")
) -> None:
    """List evaluations, newest first."""
    shell = session(context)
    with shell.client() as client:
        found = client.evaluations(target)
    rows = [
        (job.id, job.spec.get("target"), job.spec.get("suite"), job.state, verdict_of(job), moment(job.finished_at))
        for job in found
    ]
    columns = ("EVALUATION", "TARGET", "SUITE", "STATE", "VERDICT", "FINISHED")
    shell.show(
        found,
        lambda: table(None, columns, rows) if rows else "No evaluation yet: turnout eval run support@1 --suite NAME",
    )


def render_evaluation(job: Job) -> Group:
    """Verdict, every gate with its numbers, and what was left out."""
    head = Text.assemble((str(job.spec.get("target")), "bold"), f" on {job.spec.get('suite')}: ")
    result = job.result or {}
    verdict = verdict_of(job)
    if verdict is None:
        why = f"  {job.error_code}: {job.error_message}" if job.error_code else ""
        return Group(head.append(f"{job.state}{why}  ({job.id})"))
    head.append_text(verdict_text(verdict)).append(f"  ({job.id})", "dim")
    report = result.get("report")
    if not isinstance(report, dict) or not report.get("checks"):
        return Group(head, Text(str(result.get("reason") or "")))
    return Group(head, *_gates(report))


def _gates(report: dict[str, Any]) -> list[RenderableType]:
    """A line and two tables for each check of the report."""
    made: list[RenderableType] = []
    for check in report.get("checks", ()):
        head = Text.assemble("\n", (f"{check['name']} ({check['kind']}): ", "bold"), verdict_text(check["verdict"]))
        made.append(head.append(f"  {check['reason']}"))
        compared = [_comparison_row(row) for row in check.get("comparisons", ())]
        if compared:
            made.append(table(None, ("COMPARISON", "AGAINST", "VERDICT", "DIFFERENCE", "BETTER", "WORSE"), compared))
        scored = [_score_row(row) for row in check.get("scores", ())]
        if scored:
            made.append(table(None, ("ITEMS", "WHO", "METRIC", "SCORE", "95 %", "N"), scored))
        made += [Text(str(warning), style="yellow") for warning in check.get("warnings", ())]
    if report.get("not_run"):
        made.append(Text(f"\nNot run after that: {', '.join(report['not_run'])}."))
    return made


def _comparison_row(row: dict[str, Any]) -> tuple[object, ...]:
    interval = row.get("interval")
    difference = (
        f"{interval['estimate']:+.3f} in [{interval['lower']:+.3f}, {interval['upper']:+.3f}]" if interval else None
    )
    verdict = verdict_text(row["verdict"]) if row.get("verdict") else "reported"
    return row["name"], row["baseline"], verdict, difference, row["better"], row["worse"]


def _score_row(row: dict[str, Any]) -> tuple[object, ...]:
    bounds = f"{row['lower']:.3f} to {row['upper']:.3f}"
    return row["set"], row["subject"], row["metric"], f"{row['value']:.3f}", bounds, row["n"]


@eval_app.command("power")
def power(
    context: typer.Context,
    suite: str = typer.Argument(help="Name of a suite, or a folder with suite.yaml."),
    home: Path | None = HOME,
) -> None:
    """Tell how often a suite's forgetting gate passes a harmless version, and one that lost twice the margin."""
    shell = session(context)
    folder = Path(suite) if (Path(suite) / "suite.yaml").is_file() else _suites(home).find(suite).path
    argv = [sys.executable, "-m", "evals.power", str(folder), *(["--json"] if shell.as_json else [])]
    if subprocess.run(argv, check=False).returncode:
        raise typer.Exit(ExitCode.FAILED)


@suite_app.command("add")
def add(
    context: typer.Context,
    folder: Path = typer.Argument(help="Folder with suite.yaml and its data; its name becomes the suite's."),
    replace: bool = typer.Option(False, help="Also when another suite of that name is registered."),
    home: Path | None = HOME,
) -> None:
    """Register a suite with the server of this machine. Suites are code: they never come in over HTTP."""
    shell = session(context)
    suite = _suites(home).register(folder, replace=replace)
    shell.show(
        suite,
        lambda: (
            f"Suite [bold]{suite.name}[/] registered: {suite.files} files, digest {short(suite.digest)}\n"
            f"Next: turnout routes gates ROUTE --suite {suite.name}"
        ),
    )


@suite_app.command("list")
def list_suites(context: typer.Context) -> None:
    """List the suites that the server knows."""
    shell = session(context)
    with shell.client() as client:
        found = client.suites()
    shell.show(found, lambda: table(None, ("SUITE", "SOURCE", "DIGEST", "FILES", "SIZE"), map(_suite_row, found)))


def _suite_row(suite: Suite) -> tuple[object, ...]:
    more = suite.model_extra or {}
    return suite.name, more.get("source"), short(suite.digest), more.get("files"), size(more.get("size_bytes", 0))


def _suites(home: Path | None) -> Suites:
    settings = settings_of(home)
    settings.prepare_directories()
    return Suites(settings)
