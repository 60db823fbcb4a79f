"""`turnout jobs`: fine-tuning, verification and evaluation jobs of the server."""

from __future__ import annotations

from functools import partial

import typer
from rich.console import RenderableType
from rich.text import Text

from .cli_console import ExitCode, moment, poll, session, table
from .client_models import Job, JobEvent

app = typer.Typer(no_args_is_help=True, help="Jobs of the server: list, show, follow, cancel.")


@app.command("list")
def list_jobs(context: typer.Context) -> None:
    """List jobs, newest first."""
    shell = session(context)
    with shell.client() as client:
        found = client.jobs()
    shell.show(found, lambda: jobs_table(found) if found else "No job yet.")


def jobs_table(jobs: list[Job]) -> RenderableType:
    """Jobs, one a line."""
    rows = [
        (job.id, job.kind, about(job), job.state, job.attempt, moment(job.created_at), job.error_code) for job in jobs
    ]
    return table(None, ("JOB", "KIND", "ABOUT", "STATE", "ATTEMPT", "CREATED", "ERROR"), rows)


def about(job: Job) -> str:
    """What a job works on, in a few words."""
    named = job.spec.get("target") or job.spec.get("adapter") or ""
    suite = job.spec.get("suite")
    return f"{named} on {suite}" if suite else str(named)


@app.command("show")
def show(context: typer.Context, job_id: str = typer.Argument(help="Job id.")) -> None:
    """Show one job."""
    shell = session(context)
    with shell.client() as client:
        job = client.job(job_id)
    facts = [
        ("kind", job.kind),
        ("about", about(job)),
        ("state", job.state),
        ("attempt", job.attempt),
        ("created", moment(job.created_at)),
        ("started", moment(job.started_at)),
        ("finished", moment(job.finished_at)),
        ("error", f"{job.error_code}: {job.error_message}" if job.error_code else None),
    ]
    shell.show(job, lambda: table(job.id, ("", ""), facts))
    if job.state == "failed":
        raise typer.Exit(ExitCode.FAILED)


@app.command("logs")
def logs(
    context: typer.Context,
    job_id: str = typer.Argument(help="Job id."),
    follow: bool = typer.Option(False, "--follow", "-f", help="Go on until the job ends."),
) -> None:
    """Print what a job said, oldest first."""
    shell = session(context)
    seen: set[str] = set()

    def show_new(events: list[JobEvent]) -> None:
        for event in events:
            if event.id not in seen:
                seen.add(event.id)
                shell.show_line(event, partial(event_line, event))

    def look() -> bool | None:
        final = client.job(job_id).is_final
        show_new(client.job_events(job_id))
        return True if final or not follow else None

    with shell.client() as client:
        poll(look)


def event_line(event: JobEvent) -> Text:
    """One line of a log."""
    colour = {"warn": "yellow", "error": "red"}.get(event.level, "")
    return Text.assemble((f"{moment(event.at)}  ", "dim"), (event.message, colour))


@app.command("cancel")
def cancel(context: typer.Context, job_id: str = typer.Argument(help="Job id.")) -> None:
    """Ask a job to stop."""
    shell = session(context)
    with shell.client() as client:
        job = client.cancel_job(job_id)
    shell.show(job, lambda: f"{job.id} is {job.state}" + ("" if job.is_final else ", and stops as soon as it can"))
