"""`turnout publish`, `turnout adapters`."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.console import Group

from .cli_console import (
    WAIT_HELP,
    ExitCode,
    Patience,
    Session,
    clip,
    moment,
    poll,
    session,
    short,
    size,
    table,
    verdict_text,
)
from .cli_ready import EngineWatch
from .client import Client
from .client_models import Adapter, Version
from .errors import GatewayError, Refused

app = typer.Typer(no_args_is_help=True, help="Adapters and their immutable versions.")
# Longer than the attempts of a verification that says nothing: that each of them ends is the server's to see to.
STALLED_AFTER_S = 3600.0
MAX_REASON = 90


def publish(
    context: typer.Context,
    directory: Path = typer.Argument(help="Bundle that `turnout train` wrote, or a plain PEFT folder."),
    adapter: str = typer.Option(..., "--adapter", "-a", help="Name it is published under, such as support."),
    wait: bool = typer.Option(False, "--wait", help="Until it is verified, loaded and probed, or refused."),
    timeout: float | None = typer.Option(None, help=WAIT_HELP),
) -> None:
    """Publish a bundle as the next version of an adapter. The same bytes give the same version again."""
    shell = session(context)
    if not directory.is_dir():
        raise typer.BadParameter(f"{directory} is not a folder", param_hint="DIRECTORY")
    with shell.client() as client:
        with shell.waiting(f"Uploading {directory}"):
            version = client.publish(adapter, directory)
        if wait:
            version = wait_until_served(shell, client, version.full_name, timeout_s=timeout)
    shell.show(version, lambda: _published(version))


def _published(version: Version) -> str:
    done = f"Published [bold]{version.full_name}[/]  digest {short(version.digest)}  state {version.state}"
    if version.is_resident:
        return f"{done}, loaded and probed.\nNext: turnout eval run {version.full_name} --suite NAME --wait"
    return f"{done}\nNext: turnout adapters show {version.full_name}"


def wait_until_served(shell: Session, client: Client, target: str, *, timeout_s: float | None) -> Version:
    """Until an engine answers with the version. Raises `Refused` with the reason when none ever will."""

    patience, engines = Patience(timeout_s, STALLED_AFTER_S), EngineWatch(shell)

    def look() -> Version | None:
        version = client.version(target)
        tell(_progress(version))
        patience.saw(_progress(version))
        refused = _refusal(version)
        if refused:
            raise refused
        if version.state == "verified" and version.is_resident:
            return version
        engines.check(client.replicas())
        return None

    with shell.waiting(f"{target}: waiting for verification") as tell:
        found = poll(look, patience=patience)
    if found is None:
        raise GatewayError(
            f"{target} is not served: {patience.why}; `turnout adapters show {target}`, `turnout jobs list` and "
            "`turnout doctor` say what it waits for",
            code="timeout",
        )
    return found


def _progress(version: Version) -> str:
    if version.state == "received":
        return f"{version.full_name}: running on its base model (verify)"
    loading = ", ".join(f"{place.replica_id} {place.state}" for place in version.residency)
    return f"{version.full_name}: verified; engine: {loading or 'waiting for its turn'}"


def _refusal(version: Version) -> Refused | None:
    if version.retired_at is not None:
        text = f"{version.full_name} is retired; turnout adapters restore {version.full_name} brings it back"
        return Refused(text, code="version_retired")
    if version.state in ("rejected", "quarantined"):
        return Refused(f"{version.full_name} was {version.state}: {version.state_reason}", code=version.state_code)
    bad = next((place for place in version.residency if place.state in ("quarantined", "refused")), None)
    return (
        Refused(f"{version.full_name} was {bad.state} by {bad.replica_id}: {bad.reason}", code=bad.code)
        if bad
        else None
    )


@app.command("list")
def list_adapters(context: typer.Context) -> None:
    """List adapters and their versions."""
    shell = session(context)
    with shell.client() as client:
        found = client.adapters()
    shell.show(found, lambda: _listed(found))


def _listed(adapters: list[Adapter]) -> object:
    if not adapters:
        return "No adapter is published yet. Next: turnout publish DIR --adapter NAME"
    rows = [
        (
            version.full_name,
            version.standing,
            short(version.digest),
            version.rank,
            size(version.size_bytes),
            version.parent,
            moment(version.promoted_at),
            moment(version.rolled_back_at),
        )
        for adapter in adapters
        for version in adapter.versions
    ]
    return table(None, ("VERSION", "STATE", "DIGEST", "RANK", "SIZE", "PARENT", "PROMOTED", "ROLLED BACK"), rows)


_REASON = typer.Option(..., "--reason", "-m", help="Why; kept in the audit log.")
_TARGET = typer.Argument(help="A version, such as support@1.")


@app.command("release")
def release(context: typer.Context, target: str = _TARGET, reason: str = _REASON) -> None:
    """Let a version out of quarantine: it is verified once more, then loaded and probed like a new one."""
    shell = session(context)
    with shell.client() as client:
        version = client.release(target, reason=reason)
    shell.show(version, lambda: f"Released [bold]{version.full_name}[/]; it is {version.state} and is verified next.")


@app.command("retire")
def retire(context: typer.Context, target: str = _TARGET, reason: str = _REASON) -> None:
    """Take a version that no route names out of what engines load. Its row stays; its bytes go when none can need them."""
    shell = session(context)
    with shell.client() as client:
        version = client.retire(target, reason=reason)
    back = f"turnout adapters restore {version.full_name}"
    shell.show(version, lambda: f"Retired [bold]{version.full_name}[/]. While its bytes are there, {back} undoes it.")


@app.command("restore")
def restore(context: typer.Context, target: str = _TARGET, reason: str = _REASON) -> None:
    """Bring a retired version back. When its bytes are gone, publish the same bundle again instead."""
    shell = session(context)
    with shell.client() as client:
        version = client.restore(target, reason=reason)
    shell.show(version, lambda: f"Restored [bold]{version.full_name}[/]; it is {version.state}.")


@app.command("show")
def show_adapter(
    context: typer.Context, target: str = typer.Argument(help="A version (support@1) or an adapter (support).")
) -> None:
    """Show where a version comes from, where it stands, what its gates said and which engines hold it."""
    shell = session(context)
    with shell.client() as client:
        if "@" not in target:
            adapter = client.adapter(target)
            shell.show(adapter, lambda: _listed([adapter]))
            return
        version = client.version(target)
    shell.show(version, lambda: _shown(version))
    if _refusal(version):
        raise typer.Exit(ExitCode.FAILED)


def _shown(version: Version) -> Group:
    about = version.manifest or {}
    facts = [
        (
            "state",
            version.standing + (f" ({version.state_code}: {version.state_reason})" if version.state_code else ""),
        ),
        ("digest", version.digest),
        ("base model", version.base_model),
        ("rank", f"{version.rank}, {size(version.size_bytes)}"),
        ("parent", version.parent),
        ("job", version.job_id),
        ("published", f"{moment(version.created_at)} by {version.created_by}"),
        ("promoted", moment(version.promoted_at)),
        ("rolled back", moment(version.rolled_back_at)),
        ("retired", moment(version.retired_at)),
        ("last answered", moment(version.used_at)),
        ("recipe", _recipe(about.get("recipe"))),
        ("datasets", _datasets(about.get("datasets"))),
    ]
    parts: list[object] = [f"[bold]{version.full_name}[/]", table(None, ("", ""), facts)]
    if version.verdicts:
        rows = [
            (v.suite, verdict_text(v.verdict), short(v.baseline or ""), clip(v.reason, MAX_REASON))
            for v in version.verdicts
        ]
        parts += ["", table("Gates", ("SUITE", "VERDICT", "AGAINST", "REASON"), rows)]
    if version.residency:
        held = [(place.replica_id, place.state, place.reason) for place in version.residency]
        parts += ["", table("Engines", ("REPLICA", "STATE", "REASON"), held)]
    return Group(*parts)  # type: ignore[arg-type]


def _recipe(recipe: object) -> str | None:
    if not isinstance(recipe, dict):
        return str(recipe) if recipe else None
    return ", ".join(f"{key}={value}" for key, value in recipe.items() if isinstance(value, str | int | float))


def _datasets(datasets: object) -> str | None:
    if not isinstance(datasets, list):
        return None
    return ", ".join(
        f"{row.get('name', 'file')} {short(str(row.get('digest', '')))} ({row.get('rows', row.get('count', '?'))} rows)"
        for row in datasets
        if isinstance(row, dict)
    )
