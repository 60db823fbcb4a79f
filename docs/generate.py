"""Write docs/reference/*.md from the code.

.venv/bin/python docs/generate.py            # write
.venv/bin/python docs/generate.py --check    # exit 1 when a page is old
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import typer.main
from pydantic import BaseModel
from pydantic.fields import FieldInfo

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
REFERENCE = ROOT / "docs" / "reference"
NOTE = "<!-- Made by docs/generate.py: change the code, then run it. -->\n"


def configuration() -> str:
    """Every setting, from `Settings`."""
    from gateway.settings import Settings

    rows = [
        (f"`{name}`", f"`{variable}`", _kind(field), _default(field), field.description or "")
        for name, variable, field in settings(Settings)
    ]
    return (
        "# Settings\n\n"
        "Set by a flag of `turnout serve` where it has one, else by an environment variable, else in `turnout.yaml` in the home directory; "
        "the first that sets a value wins. In YAML, groups are nested:\n\n"
        "```yaml\nengine:\n  max_lora_rank: 32\n```\n\n"
        + table(("Setting", "Variable", "Values", "Default", "What it is"), rows)
    )


def settings(model: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[tuple[str, str, FieldInfo]]:
    """(dotted name, environment variable, field) of every setting."""
    for name, field in model.model_fields.items():
        here = (*path, name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from settings(field.annotation, here)
        else:
            yield ".".join(here), "TURNOUT_" + "__".join(part.upper() for part in here), field


def _kind(field: FieldInfo) -> str:
    kind = field.annotation
    words = kind.__name__ if isinstance(kind, type) and not getattr(kind, "__args__", None) else str(kind)
    words = words.replace("typing.", "").replace("pathlib.", "").replace("NoneType", "None")
    if words.startswith("Literal["):
        words = ", ".join(f"`{value}`" for value in kind.__args__)  # type: ignore[union-attr]
    limits = [f"{sign} {value}" for meta in field.metadata for sign, value in _limits(meta)]
    return " ".join([words, ", ".join(limits)]).strip()


def _limits(meta: object) -> Iterator[tuple[str, object]]:
    for attribute, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<")):
        if (value := getattr(meta, attribute, None)) is not None:
            yield sign, value


def _default(field: FieldInfo) -> str:
    return "" if field.default is None else f"`{field.default}`"


def command_line() -> str:
    """Every command with its arguments and options."""
    from gateway.cli import app

    root: Any = typer.main.get_command(app)
    parts = [
        "# Command line\n",
        "Every command also takes `--json` (one JSON document), `--url` (`TURNOUT_URL`) and `--api-key` (`TURNOUT_API_KEY`), before or after its own "
        "options.\n",
        table(
            ("Exit code", "Means"),
            [
                ("0", "done"),
                ("1", "it failed, or a check says no"),
                ("2", "wrong usage, or a gate that cannot tell"),
                ("130", "interrupted"),
            ],
        ),
    ]
    for path, command in commands(root, ("turnout",)):
        parts.append(f"\n## {' '.join(path)}\n\n{_flat(command.help)}\n")
        rows = [_parameter(parameter) for parameter in command.params if parameter.name != "help"]
        if rows:
            parts.append(table(("", "Default", "What it is"), rows))
    return "\n".join(parts)


def commands(group: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command that does something, in the order of the help."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


def _parameter(parameter: Any) -> tuple[str, str, str]:
    is_argument = parameter.param_type_name == "argument"
    shown = parameter.name.upper() if is_argument else ", ".join([*parameter.opts, *parameter.secondary_opts])
    default = (
        "required"
        if parameter.required
        else ""
        if parameter.default in (None, False, [], ())
        else f"`{parameter.default}`"
    )
    return f"`{shown}`", default, _flat(parameter.help)


def _flat(text: str | None) -> str:
    return " ".join((text or "").split())


def api() -> str:
    """Every path of the HTTP API, from its OpenAPI document."""
    from gateway.app import build_api
    from gateway.metrics import Metrics

    # No handler runs: of the services only the collectors are touched while the application is put together.
    document = build_api(SimpleNamespace(metrics=Metrics())).openapi()  # type: ignore[arg-type]
    rows = [
        (
            f"`{method.upper()} {path}`",
            operation.get("summary", ""),
            _flat(operation.get("description")),
            _fields(operation, document),
        )
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    ]
    return (
        "# HTTP API\n\n"
        "`/v1` is OpenAI's API and nothing else: use the `openai` SDK. `/api` is Turnout's own; the server describes it at `/openapi.json`. "
        "Every path but `/healthz` and `/readyz` wants `Authorization: Bearer tn-...` where the server has keys. Errors have OpenAI's form, "
        '`{"error": {"message", "type", "param", "code"}}`, with a [reason code](reason-codes.md).\n\n'
        "`POST /v1/chat/completions` and `POST /v1/completions` are answered before FastAPI sees them. Their answers carry `x-turnout-route`, "
        "`x-turnout-variant`, `x-turnout-version`, `x-turnout-digest` and `x-request-id`; `x-turnout-key` of a request is its sticky key. "
        "What a request may hold:\n\n" + completion_fields() + "\n" + table(("Call", "", "What it does", "Body"), rows)
    )


def completion_fields() -> str:
    """What happens to each field of a completion request."""
    from gateway.proxy import fields

    chat, text = set(fields.FORWARDED["chat"]), set(fields.FORWARDED["completions"])
    rows = [
        ("passed on, checked", _codes(chat & text | set(fields.REWRITTEN))),
        ("passed on for chat", _codes(chat - text)),
        ("passed on for completions", _codes(text - chat)),
        ("read, not passed on", _codes(fields.READ)),
        ("only with an evaluation's key", _codes(fields.EVALUATORS_ONLY)),
        ("refused: set by the gateway", _codes(fields.SET_BY_GATEWAY)),
    ]
    why: dict[str, list[str]] = {}
    for name, reason in {
        **fields.REFUSED,
        **{f"{prefix}*": reason for prefix, reason in fields.REFUSED_PREFIXES.items()},
    }.items():
        why.setdefault(reason, []).append(name)
    rows += [(f"refused: {reason}", _codes(names)) for reason, names in why.items()]
    return table(("What happens", "Fields"), [*rows, ("refused by name", "every other")])


def _codes(names: Any) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))


def _fields(operation: dict[str, Any], document: dict[str, Any]) -> str:
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        schema = content.get("schema", {})
        if "$ref" in schema:
            schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
        required = set(schema.get("required", ()))
        names = [f"`{name}`" if name in required else f"`{name}`?" for name in schema.get("properties", {})]
        return ", ".join(names) + (" (multipart)" if kind.startswith("multipart") else "")
    return ""


def metrics() -> str:
    """Every collector."""
    from gateway.metrics import Metrics

    rows = [
        (f"`{name}`", kind, ", ".join(f"`{label}`" for label in labels), text)
        for name, kind, labels, text in collectors(Metrics())
    ]
    return (
        "# Metrics\n\nOn `/metrics`, in Prometheus' text format. Labels are bounded: what comes after the first few hundred "
        "series of a kind is counted under `other`.\n\n" + table(("Metric", "Kind", "Labels", "What it counts"), rows)
    )


def collectors(found: Any) -> Iterator[tuple[str, str, Sequence[str], str]]:
    """(name, kind, labels, help) of every collector of an object."""
    from prometheus_client.metrics import MetricWrapperBase

    for collector in vars(found).values():
        if isinstance(collector, MetricWrapperBase):
            name = collector._name + ("_total" if collector._type == "counter" else "")
            yield name, str(collector._type), collector._labelnames, collector._documentation


def reason_codes() -> str:
    """Pre-flight's codes with their remedies, then every other code by who raises it."""
    from gateway.registry.reasons import REASONS

    known = [(f"`{code}`", text) for code, text in sorted(REASONS.items())]
    others = [
        (f"`{code}`", ", ".join(f"`{place}`" for place in sorted(places)))
        for code, places in sorted(raised_codes().items())
        if code not in REASONS
    ]
    return (
        "# Reason codes\n\nStable strings: in error bodies (`error.code`), job events, `turnout adapters show`, and in brackets after every error of the "
        "command line. The message beside a code names the thing, the value and what to do.\n\n"
        "## An adapter that is turned away\n\nBefore it runs, with status 422.\n\n"
        + table(("Code", "Why, and what to do"), known)
        + "\n"
        "## Everything else\n\nThe message has the particulars.\n\n" + table(("Code", "Raised in"), others)
    )


def raised_codes() -> dict[str, set[str]]:
    """Codes that the sources raise by name, and in which module."""
    found: dict[str, set[str]] = {}
    for package in ("gateway", "trainer", "evals"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for code in _codes_in(ast.parse(path.read_text())):
                found.setdefault(code, set()).add(path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."))
    return found


def _codes_in(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg in ("code", "error_code"):
            yield from _text(node.value)
        if isinstance(node, ast.ClassDef):
            for statement in node.body:
                yield from _code_of(statement)


def _code_of(statement: ast.stmt) -> Iterator[str]:
    """The value of a class's `code = "..."`, with or without a type."""
    match statement:
        case (
            ast.Assign(targets=[ast.Name(id="code")], value=value)
            | ast.AnnAssign(target=ast.Name(id="code"), value=ast.expr() as value)
        ):
            yield from _text(value)


def _text(value: ast.expr) -> Iterator[str]:
    if isinstance(value, ast.Constant) and isinstance(value.value, str):
        yield value.value


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


PAGES: dict[str, Callable[[], str]] = {
    "configuration.md": configuration,
    "cli.md": command_line,
    "api.md": api,
    "metrics.md": metrics,
    "reason-codes.md": reason_codes,
}


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a page is old")
    options = parser.parse_args()
    old = []
    for name, make in PAGES.items():
        path, text = REFERENCE / name, NOTE + "\n" + make()
        if path.is_file() and path.read_text() == text:
            continue
        old.append(name)
        if not options.check:
            path.write_text(text)
    if options.check and old:
        sys.stdout.write(f"old: {', '.join(old)}; run .venv/bin/python docs/generate.py\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
