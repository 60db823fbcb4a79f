"""`turnout serve`, `turnout doctor`, `turnout status`, `turnout chat`: the server itself."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer
from rich.console import Group
from rich.text import Text

from .cli_console import WAIT_HELP, ExitCode, session, settings_of, short, table
from .cli_jobs import jobs_table
from .cli_ready import wait_ready
from .cli_routes import routes_table
from .client_models import Completion, Readiness, Replica
from .errors import GatewayError
from .settings import Settings, load_settings

if TYPE_CHECKING:
    from .doctor import Check


def serve(
    home: Path | None = typer.Option(None, help="Where database, adapters and jobs live. [TURNOUT_HOME]"),
    host: str | None = typer.Option(None, help="Address to listen on; without keys only loopback. [TURNOUT_HOST]"),
    port: int | None = typer.Option(None, min=0, max=65535, help="Port of the gateway. [TURNOUT_PORT]"),
    auth: Literal["keys", "none"] | None = typer.Option(None, help="`none`: no keys, loopback only. [TURNOUT_AUTH]"),
    base_model_path: Path | None = typer.Option(None, help="Base model's folder. [TURNOUT_BASE_MODEL__PATH]"),
    base_model_name: str | None = typer.Option(None, help="What requests call it. [TURNOUT_BASE_MODEL__NAME]"),
) -> None:
    """Run gateway, controller and engine until Ctrl-C. The first start with keys prints one admin key, once.

    Everything else is set in HOME/turnout.yaml or by TURNOUT_* variables: docs/reference/configuration.md.
    """
    chosen = {
        "TURNOUT_HOME": home.expanduser().resolve() if home else None,
        "TURNOUT_HOST": host,
        "TURNOUT_PORT": port,
        "TURNOUT_AUTH": auth,
        "TURNOUT_BASE_MODEL__PATH": base_model_path.expanduser().resolve() if base_model_path else None,
        "TURNOUT_BASE_MODEL__NAME": base_model_name,
    }
    os.environ.update({name: str(value) for name, value in chosen.items() if value is not None})
    settings = load_settings()
    _check_base_model(settings)
    sys.stdout.flush()
    argv = [sys.executable, "-m", "gateway.supervisor", "--home", str(settings.home)]
    os.execv(argv[0], argv)  # noqa: S606 - the supervisor takes this process over: one less between it and Ctrl-C


def _check_base_model(settings: Settings) -> None:
    path = settings.base_model.path
    if not (path / "config.json").is_file():
        raise GatewayError(
            f"base model {settings.base_model.name!r}: {path} has no config.json; run `make base-model`, or set "
            "--base-model-path to a folder in Hugging Face format",
            code="no_base_model",
        )


def doctor(context: typer.Context, home: Path | None = typer.Option(None, help="Home directory to look at.")) -> None:
    """Say what this machine can do and what is missing, each line with its remedy. Exit 1 when something is missing."""
    from .doctor import examine  # what it looks at takes longer to import than other commands take

    shell = session(context)
    checks = examine(settings_of(home))
    shell.show([vars(check) for check in checks], lambda: _diagnosis(checks))
    if any(check.state == "missing" for check in checks):
        raise typer.Exit(ExitCode.FAILED)


def _diagnosis(checks: list[Check]) -> Group:
    marks = {"ok": ("ok", "green"), "warning": ("look", "yellow"), "missing": ("MISSING", "red")}
    rows = [
        (Text(*marks[check.state]), check.name, check.found, check.remedy if check.state != "ok" else " ")
        for check in checks
    ]
    bad = sum(check.state == "missing" for check in checks)
    last = f"[red]{bad} missing.[/]" if bad else "[green]Ready.[/] Next: turnout serve"
    return Group(table(None, ("", "WHAT", "FOUND", "REMEDY"), rows), "", Text.from_markup(last))


def status(
    context: typer.Context,
    wait: bool = typer.Option(False, "--wait", help="Until the engine takes requests, or fails for good: exit 1."),
    timeout: float | None = typer.Option(None, help=WAIT_HELP),
) -> None:
    """One screen: engines, adapters, routes, jobs. Exit 1 when requests are not served."""
    shell = session(context)
    with shell.client() as client:
        if wait:
            wait_ready(shell, client, timeout_s=timeout)
        ready, health = client.is_ready(), client.health()
        replicas, adapters, routes = client.replicas(), client.adapters(), client.routes()
        running = [job for job in client.jobs() if not job.is_final]
    data = {
        "url": client.url,
        "ready": ready,
        "controller": health.controller,
        "controller_silent_s": health.controller_silent_s,
        "replicas": replicas,
        "adapters": adapters,
        "routes": routes,
        "jobs": running,
    }
    states: dict[str, int] = {}
    for adapter in adapters:
        for version in adapter.versions:
            states[version.standing] = states.get(version.standing, 0) + 1
    head = Text.assemble((client.url, "bold"), "  ", ("serving", "green") if ready else ("not serving yet", "red"))
    engines = [(replica.id, replica.state, replica.self_test, _noise(replica), _why(replica)) for replica in replicas]
    counted = ", ".join(f"{count} {state}" for state, count in sorted(states.items())) or "none yet"
    shell.show(
        data,
        lambda: Group(
            head,
            *_silence(health),
            "",
            table(None, ("ENGINE", "STATE", "SELF-TEST", "BATCH NOISE", "REASON"), engines),
            "",
            f"Adapter versions: {counted}",
            "",
            routes_table(routes),
            "",
            jobs_table(running) if running else "No job is running.",
        ),
    )
    if not ready:
        raise typer.Exit(ExitCode.FAILED)


def _silence(health: Readiness) -> list[Text]:
    """Whether what follows can be believed."""
    if health.controller == "ok":
        return []
    since = "never told" if health.controller_silent_s is None else f"silent for {health.controller_silent_s:.0f} s"
    said = f"The controller is {since}: engines and adapters below may be long gone. Start `turnout serve` again."
    return [Text(said, "red")]


def _noise(replica: Replica) -> str | None:
    return None if replica.batch_noise is None else f"{replica.batch_noise:.3f} nats"


def _why(replica: Replica) -> str | None:
    """Why it does not serve; while it starts again, what became of the starts before."""
    if not replica.failures or replica.state == "ready":
        return replica.reason
    return f"failed {replica.failures} times in a row: {replica.reason or replica.last_failure}"


def chat(
    context: typer.Context,
    model: str = typer.Argument(help="Route (support), version (support@1) or base model."),
    text: str = typer.Argument(help="What to say."),
    system: str | None = typer.Option(None, help="System prompt."),
    user: str | None = typer.Option(None, help="Who asks: the same user gets the same arm of a route."),
    max_tokens: int = typer.Option(128, min=1, help="Longest answer."),
    temperature: float = typer.Option(0.0, min=0, max=2, help="0: always the likeliest token."),
) -> None:
    """Send one chat turn; print the answer, and which weights gave it."""
    shell = session(context)
    with shell.client() as client:
        answer = client.chat(model, text, system=system, user=user, max_tokens=max_tokens, temperature=temperature)
    shell.show(answer, lambda: _answered(answer))


def _answered(answer: Completion) -> Group:
    proof = f"route {answer.route}  variant {answer.variant}  version {answer.version}  digest {short(answer.digest)}"
    return Group(Text(answer.text), Text(f"{proof}  request {answer.request_id}", style="dim"))
