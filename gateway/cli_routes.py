"""`turnout routes`: which version answers a name, and in what share."""

from __future__ import annotations

import typer
from rich.console import Group, RenderableType

from .cli_console import moment, session, table
from .client import Client
from .client_models import Route, RouteMoved
from .errors import Invalid, Refused
from .routing.models import shares_text

app = typer.Typer(no_args_is_help=True, help="Routes: which version answers a name, and in what share.")

REASON = typer.Option(None, "--reason", "-m", help="Why; kept in the audit log.")
EXPECTED_REVISION = typer.Option(None, help="Refuse when somebody moved the route since this revision.")
IDEMPOTENCY_KEY = typer.Option(
    None, help="Text that names this move: repeated with it, the command answers as the first time and moves nothing."
)
DRY_RUN = typer.Option(False, "--dry-run", help="Show what would move, and move nothing.")


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
            shares_text(route.variants),
            route.stable,
            route.previous,
            route.candidate,
            ", ".join(route.gates),
            route.revision,
        )
        for route in routes
    ]
    return table(None, ("ROUTE", "TRAFFIC", "STABLE", "PREVIOUS", "CANDIDATE", "GATES", "REVISION"), rows)


def standing(route: Route) -> str:
    """Where the traffic goes, what is tried and where a rollback would go, on one line."""
    tried = f", tries {', '.join(route.trial.arms)}" if route.trial else ""
    return f"traffic {shares_text(route.variants)}{tried}; stable {route.stable}, previous {route.previous}"


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
        ("tries", _trial(route)),
        ("previous", f"{route.previous}{'' if route.trial else '  (where a rollback goes)'}"),
        ("candidate", route.candidate),
        ("gates", ", ".join(route.gates) or "none: a promotion needs --force and a reason"),
        ("last move", _last_move(route)),
        ("revision", f"{route.revision}, {moment(route.updated_at)} by {route.updated_by}"),
    ]
    arms = table(None, ("TARGET", "WEIGHT"), [(variant.target, variant.weight) for variant in route.variants])
    return Group(f"[bold]{route.name}[/]", table(None, ("", ""), facts), "", arms)


def _trial(route: Route) -> str:
    if route.trial is None:
        return "nothing: a rollback moves stable"
    return (
        f"{', '.join(route.trial.arms)} against {route.trial.against}, since revision {route.trial.since_revision}  "
        "(a rollback ends it)"
    )


def _last_move(route: Route) -> str | None:
    last = route.last_move
    if last is None:
        return None
    return f"{last.action}: {last.moved_from} → {last.moved_to}  (revision {last.revision}, {moment(last.at)} by {last.by})"


@app.command("set")
def set_variants(
    context: typer.Context,
    name: str = typer.Argument(help="Route, such as support."),
    variant: list[str] = typer.Option(..., "--variant", "-v", help="TARGET=WEIGHT; repeat it for each arm."),
    tries: list[str] = typer.Option(
        [], "--try", help="Arm that is tried and that a rollback takes back; repeat it. Left out: every arm but stable."
    ),
    no_trial: bool = typer.Option(False, "--no-trial", help="Nothing is tried: a rollback moves stable."),
    force: bool = typer.Option(
        False, "--force", help="Although an arm's gates did not pass or it was rolled back. Needs --reason; audited."
    ),
    reason: str | None = REASON,
    expected_revision: int | None = EXPECTED_REVISION,
    idempotency_key: str | None = IDEMPOTENCY_KEY,
    dry_run: bool = DRY_RUN,
) -> None:
    """Split a route's traffic. Each user keeps an arm as long as the weights stand.

    A version gets a larger share only when the route's gates passed it, now or when it became stable; --force overrides.
    `turnout rollback` takes back what is tried: every arm but stable, or those that --try names.

    Example: turnout routes set support --variant base=50 --variant support@1=50 --reason "A/B against base"
    """
    shell = session(context)
    if tries and no_trial:
        raise typer.BadParameter("say what is tried, or that nothing is", param_hint="--no-trial")
    weights = dict(parse_variant(text) for text in variant)
    if len(weights) != len(variant):
        raise typer.BadParameter("a target stands twice; give each one weight", param_hint="--variant")
    with shell.client() as client:
        named = {_named(client, target): weight for target, weight in weights.items()}
        try:
            route = client.set_variants(
                name,
                named,
                tries=[_named(client, target) for target in tries] if tries or no_trial else None,
                force=force,
                reason=reason,
                expected_revision=expected_revision,
                idempotency_key=idempotency_key,
                dry_run=dry_run,
            )
        except Refused as refused:
            if not (refused.code or "").startswith(("gate_", "no_gate")):
                raise
            override = f"turnout routes set {name} {' '.join(f'-v {text}' for text in variant)} --force --reason ..."
            raise Refused(
                f"{refused.message}\nOverride: {override}", code=refused.code, param=refused.param
            ) from refused
    shell.show(route, lambda: _split(route))


def _split(route: RouteMoved) -> str:
    now = "would be" if route.dry_run else "was already, nothing moved" if route.repeated else "now"
    before = f"\n  before  {standing(route.before)}" if route.before else ""
    return f"[bold]{route.name}[/] {now}: {shares_text(route.variants)}  (revision {route.revision}){before}\n  after   {standing(route)}"


def _named(client: Client, target: str) -> str:
    return _base_name(client) if target == "base" else target


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
