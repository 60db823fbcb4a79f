"""`turnout routes`, `turnout promote`, `turnout rollback`: everything that moves traffic."""

from __future__ import annotations

import time

import typer
from rich.console import Group, RenderableType

from .cli_console import ExitCode, Patience, Session, moment, poll, session, table
from .client import Client
from .client_models import Moved, Route
from .errors import Invalid, Refused, Unavailable

app = typer.Typer(no_args_is_help=True, help="Routes: which version answers a name, and in what share.")
CONFIRM_TIMEOUT_S = 120.0  # against hanging; the answer comes within the time of one short completion
CONFIRM_EVERY_S = 0.01

REASON = typer.Option(None, "--reason", "-m", help="Why; kept in the audit log.")


@app.command("list")
def list_routes(context: typer.Context) -> None:
    """List routes with their shares and pointers."""
    shell = session(context)
    with shell.client() as client:
        found = client.routes()
    shell.show(found, lambda: routes_table(found))


def routes_table(routes: list[Route]) -> RenderableType:
    """All routes, one a line."""
    if not routes:
        return "No route yet: publishing the first version of an adapter makes one."
    rows = [
        (
            route.name,
            shares(route),
            route.stable,
            route.previous,
            route.candidate,
            ", ".join(route.gates),
            route.revision,
        )
        for route in routes
    ]
    return table(None, ("ROUTE", "TRAFFIC", "STABLE", "PREVIOUS", "CANDIDATE", "GATES", "REVISION"), rows)


def shares(route: Route) -> str:
    """`support@1 50 %, smollm2-135m 50 %`."""
    total = sum(variant.weight for variant in route.variants) or 1
    return ", ".join(
        f"{variant.target} {100 * variant.weight / total:.0f} %" for variant in route.variants if variant.weight
    )


@app.command("show")
def show_route(context: typer.Context, name: str = typer.Argument(help="Route, such as support.")) -> None:
    """Show one route: its variants, pointers and gates."""
    shell = session(context)
    with shell.client() as client:
        route = client.route(name)
    shell.show(route, lambda: _route(route))


def _route(route: Route) -> Group:
    facts = [
        ("stable", route.stable),
        ("previous", f"{route.previous}  (where a rollback goes)"),
        ("candidate", route.candidate),
        ("gates", ", ".join(route.gates) or "none: a promotion needs --force and a reason"),
        ("revision", f"{route.revision}, {moment(route.updated_at)} by {route.updated_by}"),
    ]
    arms = table(None, ("TARGET", "WEIGHT"), [(variant.target, variant.weight) for variant in route.variants])
    return Group(f"[bold]{route.name}[/]", table(None, ("", ""), facts), "", arms)


@app.command("set")
def set_variants(
    context: typer.Context,
    name: str = typer.Argument(help="Route, such as support."),
    variant: list[str] = typer.Option(..., "--variant", "-v", help="TARGET=WEIGHT; repeat it for each arm."),
    force: bool = typer.Option(False, "--force", help="Although an arm's gates did not pass. Needs --reason; audited."),
    reason: str | None = REASON,
    expected_revision: int | None = typer.Option(
        None, help="Refuse when somebody moved the route since this revision."
    ),
) -> None:
    """Split a route's traffic. Each user keeps an arm as long as the weights stand.

    A version gets a larger share only when the route's gates passed it, or when it was stable before; --force overrides.
    `turnout rollback` withdraws what is being tried.

    Example: turnout routes set support --variant base=50 --variant support@1=50 --reason "A/B against base"
    """
    shell = session(context)
    weights = dict(parse_variant(text) for text in variant)
    if len(weights) != len(variant):
        raise typer.BadParameter("a target stands twice; give each one weight", param_hint="--variant")
    with shell.client() as client:
        named = {_base_name(client) if target == "base" else target: weight for target, weight in weights.items()}
        try:
            route = client.set_variants(name, named, force=force, reason=reason, expected_revision=expected_revision)
        except Refused as refused:
            if not (refused.code or "").startswith(("gate_", "no_gate")):
                raise
            override = f"turnout routes set {name} {' '.join(f'-v {text}' for text in variant)} --force --reason ..."
            raise Refused(
                f"{refused.message}\nOverride: {override}", code=refused.code, param=refused.param
            ) from refused
    shell.show(route, lambda: f"[bold]{route.name}[/] now: {shares(route)}  (revision {route.revision})")


def parse_variant(text: str) -> tuple[str, int]:
    """`support@1=50` as ("support@1", 50)."""
    target, separator, weight = text.rpartition("=")
    if not separator or not target or not weight.isdigit():
        raise typer.BadParameter(f"{text!r} is not TARGET=WEIGHT, such as support@1=50", param_hint="--variant")
    return target, int(weight)


def _base_name(client: Client) -> str:
    """The base model, which `base` stands for on the command line."""
    names = {version.base_model for adapter in client.adapters() for version in adapter.versions}
    if len(names) != 1:
        raise Invalid(
            f"`base` is not clear here ({', '.join(sorted(names)) or 'no adapter yet'}); name the base model",
            param="variant",
        )
    return names.pop()


@app.command("gates")
def set_gates(
    context: typer.Context,
    name: str = typer.Argument(help="Route, such as support."),
    suite: list[str] = typer.Option(
        ..., "--suite", "-s", help="Suite that must pass before a promotion; repeat for several."
    ),
) -> None:
    """Name the suites that a version must pass before it is promoted."""
    shell = session(context)
    with shell.client() as client:
        route = client.set_gates(name, suite)
    shell.show(route, lambda: f"[bold]{route.name}[/] promotes only what passed: {', '.join(route.gates)}")


def promote(
    context: typer.Context,
    name: str = typer.Argument(help="Route, such as support."),
    target: str | None = typer.Argument(None, help="Version, such as support@2; left out: the route's candidate."),
    force: bool = typer.Option(False, "--force", help="Although its gates did not pass. Needs --reason; audited."),
    reason: str | None = REASON,
) -> None:
    """Send all of a route's traffic to a version whose gates passed. Exit 2 when a gate could not tell."""
    shell = session(context)
    with shell.client() as client:
        try:
            moved = client.promote(name, target, force=force, reason=reason)
        except Refused as refused:
            raise _with_remedy(refused, name, target) from refused
    shell.show(moved, lambda: f"Promoted: {_sentence(moved)}")


def _with_remedy(refused: Refused, route: str, target: str | None) -> Refused:
    version = target or "VERSION"
    message = f"{refused.message}\nSee why: turnout eval show --target {version}   Override: turnout promote {route} {version} --force --reason ..."
    return Refused(message, code=refused.code, param=refused.param)


def _sentence(moved: Moved) -> str:
    load = "needs a load: its requests fail until then" if moved.needs_load else "already loaded"
    return f"[bold]{moved.route.name}[/]  {moved.moved_from} → {moved.moved_to}  ({load}; {moved.took_ms:.0f} ms)"


def rollback(
    context: typer.Context,
    name: str = typer.Argument(help="Route, such as support."),
    to: str | None = typer.Option(
        None, "--to", help="Version to go to; left out: stable while a split tries something, else previous."
    ),
    force: bool = typer.Option(False, "--force", help="Also to a version that was itself rolled back."),
    reason: str | None = REASON,
    break_glass: bool = typer.Option(
        False,
        "--break-glass",
        help="Also when the database is locked or gone. Needs --reason; journalled, audited later.",
    ),
    confirm: bool = typer.Option(False, "--confirm", help="Send requests until the new version answers, and time it."),
) -> None:
    """Take back the last move: what is being tried in a split loses its share; without a split, the previous version returns.

    A pointer moves; nothing is loaded, nothing restarts. What was left returns by --force only.
    """
    shell = session(context)
    with shell.client() as client:
        started_at, started = time.time(), time.monotonic()
        try:
            moved = client.rollback(name, to=to, force=force, reason=reason, break_glass=break_glass)
        except Unavailable as unavailable:
            raise _with_break_glass(unavailable, name) from unavailable
        call_ms = (time.monotonic() - started) * 1000
        answered_ms = _first_answer_ms(client, moved, started) if confirm else None
    measured = {
        "started_at": started_at,
        "completed_at": started_at + call_ms / 1000,
        "call_ms": round(call_ms, 1),
        "first_answer_ms": answered_ms,
    }
    shell.show(moved.model_dump(mode="json") | measured, lambda: _rolled_back(moved, call_ms, answered_ms))
    if confirm and answered_ms is None:
        _warn(shell, moved)
        raise typer.Exit(ExitCode.FAILED)


def _with_break_glass(unavailable: Unavailable, route: str) -> Unavailable:
    if unavailable.code not in ("database_busy", "database_lost"):
        return unavailable
    message = f"{unavailable.message}\nWithout the database: turnout rollback {route} --break-glass --reason ..."
    return Unavailable(message, code=unavailable.code, param=unavailable.param)


def _first_answer_ms(client: Client, moved: Moved, started: float) -> float | None:
    """Milliseconds from the call until an answer's headers named the new version; None: not in time."""

    def look() -> float | None:
        answer = client.chat(moved.route.name, "ok", max_tokens=1, temperature=0)
        return (time.monotonic() - started) * 1000 if answer.version == moved.moved_to else None

    found = poll(look, every_s=CONFIRM_EVERY_S, patience=Patience(CONFIRM_TIMEOUT_S, CONFIRM_TIMEOUT_S))
    return None if found is None else round(found, 1)


def _rolled_back(moved: Moved, call_ms: float, answered_ms: float | None) -> str:
    seen = f"; its first answer was seen after {answered_ms:.0f} ms" if answered_ms is not None else ""
    told = (
        "\nThe database does not know it yet: it is journalled, and told as soon as it can be."
        if moved.journalled
        else ""
    )
    return f"Rolled back: {_sentence(moved)}\nThe call took {call_ms:.0f} ms{seen}.{told}"


def _warn(shell: Session, moved: Moved) -> None:
    shell.say(f"[red]{moved.moved_to} gave no answer within {CONFIRM_TIMEOUT_S:.0f} s: see `turnout status`.[/]")
