"""The command line `turnout`. One module per noun (`cli_*.py`); this one puts them together and owns every last word.

Exit codes: 0 done; 1 it failed, or a check says no; 2 wrong usage, or a gate cannot tell; 130 interrupted.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from types import FrameType

import typer
from rich.markup import escape

from . import (
    cli_adapters,
    cli_data,
    cli_evaluations,
    cli_gc,
    cli_jobs,
    cli_keys,
    cli_moves,
    cli_routes,
    cli_server,
    cli_train,
)
from .cli_console import ExitCode, Session
from .errors import GatewayError

EPILOG = (
    "Every command takes --json, --url and --api-key, before or after its own options. "
    "Exit codes: 0 done, 1 failed, 2 wrong usage or a gate that cannot tell. Start with: turnout doctor"
)
_GLOBAL_FLAGS = frozenset({"--json"})
_GLOBAL_OPTIONS = frozenset({"--url", "--api-key"})

app = typer.Typer(
    name="turnout",
    help="Train, gate, serve, A/B-test, promote and roll back LoRA adapters on vLLM.",
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"turnout {_version()}\n")
        raise typer.Exit


def _version() -> str:
    try:
        return version("turnout")
    except PackageNotFoundError:
        return "(not installed)"


@app.callback()
def root(
    context: typer.Context,
    url: str | None = typer.Option(None, envvar="TURNOUT_URL", help="The server."),
    api_key: str | None = typer.Option(None, envvar="TURNOUT_API_KEY", show_envvar=True, help="API key."),
    as_json: bool = typer.Option(False, "--json", help="One JSON document instead of text."),
    show_version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version."
    ),
) -> None:
    """Remember the options that every command shares."""
    context.obj = Session(url=url, api_key=api_key, as_json=as_json)


def _register() -> None:
    server, move, learn = "Server", "Traffic", "Training and evaluation"
    app.command(rich_help_panel=server)(cli_server.serve)
    app.command(rich_help_panel=server)(cli_server.doctor)
    app.command(rich_help_panel=server)(cli_server.status)
    app.command(rich_help_panel=server)(cli_server.chat)
    app.add_typer(cli_data.app, name="data", rich_help_panel=learn)
    app.command(rich_help_panel=learn)(cli_train.train)
    app.add_typer(cli_evaluations.suite_app, name="suite", rich_help_panel=learn)
    app.add_typer(cli_evaluations.eval_app, name="eval", rich_help_panel=learn)
    app.add_typer(cli_jobs.app, name="jobs", rich_help_panel=learn)
    app.command(rich_help_panel=move)(cli_adapters.publish)
    app.add_typer(cli_adapters.app, name="adapters", rich_help_panel=move)
    app.add_typer(cli_routes.app, name="routes", rich_help_panel=move)
    app.command(rich_help_panel=move)(cli_moves.promote)
    app.command(rich_help_panel=move)(cli_moves.rollback)
    app.add_typer(cli_keys.app, name="keys", rich_help_panel=server)
    app.command(rich_help_panel=server)(cli_keys.audit)
    app.command(rich_help_panel=server)(cli_gc.gc)


_register()


def hoist(arguments: Sequence[str]) -> list[str]:
    """Global options to the front, wherever they stand before a `--`; so `turnout routes list --json` works too."""
    end = list(arguments).index("--") if "--" in arguments else len(arguments)
    front: list[str] = []
    rest: list[str] = []
    words = iter(arguments[:end])
    for word in words:
        if word in _GLOBAL_FLAGS or (word.split("=", 1)[0] in _GLOBAL_OPTIONS and "=" in word):
            front.append(word)
        elif word in _GLOBAL_OPTIONS:
            front += [word, *([value] if (value := next(words, None)) is not None else [])]
        else:
            rest.append(word)
    return [*front, *rest, *arguments[end:]]


def _terminated(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def main() -> None:
    """Run a command; whatever goes wrong, the user reads a sentence and the shell gets a code."""
    arguments = hoist(sys.argv[1:])
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, _terminated)
    try:
        app(args=arguments, prog_name="turnout")
    except GatewayError as error:
        sys.exit(_complain(error.message, code=error.code, as_json="--json" in arguments))
    except KeyboardInterrupt:
        sys.exit(ExitCode.INTERRUPTED)
    except Exception as error:
        if os.environ.get("TURNOUT_DEBUG"):
            raise
        message = f"{type(error).__name__}: {error}\nThis is a fault in Turnout. Set TURNOUT_DEBUG=1 to see where it happened."
        sys.exit(_complain(message, code="internal_error", as_json="--json" in arguments))


def _complain(message: str, *, code: str, as_json: bool) -> ExitCode:
    """Say what went wrong, and choose the exit code."""
    if as_json:
        sys.stdout.write(json.dumps({"error": {"code": code, "message": message}}, indent=2) + "\n")
    else:
        Session().notes.print(f"[red]Error[/] {escape(message)}  [dim]({escape(code)})[/]")
    return ExitCode.UNDECIDED if code == "gate_inconclusive" else ExitCode.FAILED


if __name__ == "__main__":
    main()
