"""`turnout promote`, `turnout rollback`: all of a route's traffic to one version."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import typer

from .cli_console import ExitCode, Patience, Session, poll, session
from .cli_routes import DRY_RUN, EXPECTED_REVISION, IDEMPOTENCY_KEY, REASON, standing
from .client import Client
from .client_models import Moved
from .errors import Conflict, GatewayError, Refused, Unavailable

CONFIRM_TIMEOUT_S = 120.0  # against hanging; the answer comes within the time of one short completion
CONFIRM_EVERY_S = 0.01
LOAD_UNCHANGED_S = 120.0  # a load of which nothing is heard for so long will not come
WAIT_FOR_LOAD = typer.Option(
    False, "--wait-for-load", help="When no engine has the version loaded: have it loaded first, then move."
)


def promote(
    context: typer.Context,
    name: str = typer.Argument(help="Route, such as support."),
    target: str | None = typer.Argument(None, help="Version, such as support@2; left out: the route's candidate."),
    force: bool = typer.Option(False, "--force", help="Although its gates did not pass. Needs --reason; audited."),
    reason: str | None = REASON,
    wait_for_load: bool = WAIT_FOR_LOAD,
    expected_revision: int | None = EXPECTED_REVISION,
    idempotency_key: str | None = IDEMPOTENCY_KEY,
    dry_run: bool = DRY_RUN,
) -> None:
    """Send all of a route's traffic to a version whose gates passed. Exit 2 when a gate could not tell."""
    shell = session(context)
    with shell.client() as client:

        def move(*, revision: int | None = expected_revision, only_try: bool = dry_run) -> Moved:
            return client.promote(
                name,
                target,
                force=force,
                reason=reason,
                expected_revision=revision,
                idempotency_key=None if only_try else idempotency_key,
                dry_run=only_try,
            )

        try:
            moved = _loaded_first(shell, client, name, target, move) if wait_for_load else move()
        except Refused as refused:
            raise _with_remedy(refused, name, target) from refused
    shell.show(moved, lambda: _told("promoted", moved))


def _with_remedy(refused: Refused, route: str, target: str | None) -> Refused:
    version = target or "VERSION"
    message = f"{refused.message}\nSee why: turnout eval show --target {version}   Override: turnout promote {route} {version} --force --reason ..."
    return Refused(message, code=refused.code, param=refused.param)


def rollback(
    context: typer.Context,
    name: str = typer.Argument(help="Route, such as support."),
    to: str | None = typer.Option(
        None, "--to", help="Version to go to; left out: the trial ends, and without one the previous version returns."
    ),
    force: bool = typer.Option(False, "--force", help="Also to a version that was itself rolled back."),
    further: bool = typer.Option(False, "--further", help="Although the last move was a rollback already."),
    reason: str | None = REASON,
    confirm: bool = typer.Option(False, "--confirm", help="Send requests until the new version answers, and time it."),
    wait_for_load: bool = WAIT_FOR_LOAD,
    accept_load: bool = typer.Option(
        False, "--accept-load", help="Also onto a version that is not loaded: its requests fail until it is."
    ),
    break_glass: bool = typer.Option(
        False,
        "--break-glass",
        help="Also when the database is locked or gone. Needs --reason; journalled, audited later.",
    ),
    cut: bool = typer.Option(
        False, "--cut", help="End the answers of what is left that still run; their clients get an error."
    ),
    expected_revision: int | None = EXPECTED_REVISION,
    idempotency_key: str | None = IDEMPOTENCY_KEY,
    dry_run: bool = DRY_RUN,
) -> None:
    """End the route's trial if there is one, else return stable to previous.

    A pointer moves; nothing is loaded, nothing restarts. What was left returns by --force only. Pressed twice it moves
    once: a second step back needs --further, or --to.
    """
    shell = session(context)
    with shell.client() as client:
        # What was seen is what is acted on: if it has moved meanwhile, nothing moves.
        revision_seen = expected_revision or _revision_now(client, name, break_glass=break_glass)

        def move(*, revision: int | None = revision_seen, only_try: bool = dry_run) -> Moved:
            return client.rollback(
                name,
                to=to,
                force=force,
                further=further,
                accept_load=accept_load,
                cut=cut,
                break_glass=break_glass,
                reason=reason,
                expected_revision=revision,
                idempotency_key=None if only_try else idempotency_key,
                dry_run=only_try,
            )

        started_at, started = time.time(), time.monotonic()
        try:
            moved = _move_back(shell, client, name, to, move, wait_for_load=wait_for_load)
        except Unavailable as unavailable:
            raise _with_break_glass(unavailable, name) from unavailable
        call_ms = (time.monotonic() - started) * 1000
        answered_ms = _first_answer_ms(client, moved, started) if confirm and not dry_run else None
    measured = {
        "started_at": started_at,
        "completed_at": started_at + call_ms / 1000,
        "call_ms": round(call_ms, 1),
        "first_answer_ms": answered_ms,
    }
    shell.show(moved.model_dump(mode="json") | measured, lambda: _rolled_back(moved, call_ms, answered_ms))
    if confirm and not dry_run and answered_ms is None:
        _warn(shell, moved)
        raise typer.Exit(ExitCode.FAILED)


def _revision_now(client: Client, route: str, *, break_glass: bool) -> int | None:
    """The route's revision; None when the database cannot tell and the rollback is to be made without it."""
    try:
        return client.route(route).revision
    except Unavailable as unavailable:
        if break_glass:
            return None
        raise _with_break_glass(unavailable, route) from unavailable


def _with_break_glass(unavailable: Unavailable, route: str) -> Unavailable:
    if unavailable.code not in ("database_busy", "database_lost"):
        return unavailable
    message = f"{unavailable.message}\nWithout the database: turnout rollback {route} --break-glass --reason ..."
    return Unavailable(message, code=unavailable.code, param=unavailable.param)


Move = Callable[..., Moved]


def _move_back(shell: Session, client: Client, route: str, to: str | None, move: Move, *, wait_for_load: bool) -> Moved:
    """Roll back; onto a version that is not loaded only after it was loaded, or after somebody said yes."""
    if wait_for_load:
        return _loaded_first(shell, client, route, to, move)
    try:
        return move()
    except Conflict as conflict:
        if conflict.code != "needs_load" or shell.as_json or not sys.stdin.isatty():
            raise
        shell.say(conflict.message)
        if not typer.confirm("Have it loaded first, and move then?", default=True):
            raise typer.Exit(ExitCode.FAILED) from conflict
    return _loaded_first(shell, client, route, to, move)


def _loaded_first(shell: Session, client: Client, route: str, target: str | None, move: Move) -> Moved:
    """Have the engines load what the move leads to, then move."""
    try:
        move(only_try=True)
    except Conflict as conflict:
        if conflict.code not in ("needs_load", "not_resident"):
            raise
    else:
        return move()
    held = client.route(route)
    wanted = target or held.candidate or held.previous
    if (
        "@" in wanted
        and not wanted.endswith(("@previous", "@stable"))
        and wanted not in (held.candidate, held.previous)
    ):
        held = client.set_candidate(route, wanted, reason="its load is waited for, to move traffic to it")
    patience = Patience(None, LOAD_UNCHANGED_S)
    with shell.waiting(f"Waiting until {wanted} is loaded ...") as tell:

        def look() -> bool | None:
            try:
                move(revision=held.revision, only_try=True)
            except Conflict as conflict:
                if conflict.code not in ("needs_load", "not_resident"):
                    raise
                news = _loading(client, wanted)
                patience.saw(news)
                tell(f"Waiting until {wanted} is loaded: {news}")
                return None
            return True

        if poll(look, patience=patience) is None:
            raise Conflict(
                f"{wanted} was not loaded ({patience.why}), and nothing moved; see `turnout adapters show {wanted}`",
                code="needs_load",
            )
    return move(revision=held.revision)


def _loading(client: Client, version: str) -> str:
    """How far its load is, in a few words. A cause that waiting does not mend is an error."""
    if "@" not in version or not version.rpartition("@")[2].isdigit():
        return "waiting"
    places = client.version(version).residency
    for place in places:
        if place.state == "quarantined":
            raise Conflict(
                f"{version} cannot be loaded on {place.replica_id}: {place.reason or place.code}", code=place.code
            )
    return ", ".join(f"{place.state} on {place.replica_id}" for place in places) or "not begun"


def _first_answer_ms(client: Client, moved: Moved, started: float) -> float | None:
    """Milliseconds from the call until an answer's headers named the new version; None: not in time."""

    def look() -> float | None:
        try:
            answer = client.chat(moved.route.name, "ok", max_tokens=1, temperature=0)
        except GatewayError as error:
            if error.code != "variant_not_ready":
                raise
            return None
        return (time.monotonic() - started) * 1000 if answer.version == moved.moved_to else None

    found = poll(look, every_s=CONFIRM_EVERY_S, patience=Patience(CONFIRM_TIMEOUT_S, CONFIRM_TIMEOUT_S))
    return None if found is None else round(found, 1)


def _told(done: str, moved: Moved) -> str:
    """What moved, and the route before and after."""
    load = "needs a load: its requests fail until then" if moved.needs_load else "loaded"
    head = f"{done.capitalize()}"
    if moved.dry_run:
        head = f"Nothing moved. Would be {done}"
    elif moved.repeated:
        head = f"Was {done} already, by an earlier call; nothing moved now"
    took = "" if moved.dry_run or moved.repeated else f"; {moved.took_ms:.0f} ms"
    lines = [f"{head}: [bold]{moved.route.name}[/]  {moved.moved_from} → {moved.moved_to}  ({load}{took})"]
    if moved.before is not None:
        lines.append(f"  before  {standing(moved.before)}")
    lines.append(f"  after   {standing(moved.route)}")
    if moved.marked:
        lines.append(f"  marked  {', '.join(moved.marked)}: traffic returns to it by --force only")
    if moved.answers_cut:
        lines.append(f"  cut     {moved.answers_cut} answers that were still running")
    if moved.journalled and not moved.dry_run:
        lines.append("  The database does not know it yet: it is journalled, and told as soon as it can be.")
    return "\n".join(lines)


def _rolled_back(moved: Moved, call_ms: float, answered_ms: float | None) -> str:
    if moved.dry_run:
        return _told("rolled back", moved)
    seen = f"; its first answer was seen after {answered_ms:.0f} ms" if answered_ms is not None else ""
    return f"{_told('rolled back', moved)}\nThe call took {call_ms:.0f} ms{seen}."


def _warn(shell: Session, moved: Moved) -> None:
    shell.say(f"[red]{moved.moved_to} gave no answer within {CONFIRM_TIMEOUT_S:.0f} s: see `turnout status`.[/]")
