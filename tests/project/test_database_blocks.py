"""What happens while the database is held: queries, and nothing that waits for anything else.

An open reader holds up every writer's commit on SQLite, and an open writer everybody. So a block of `Database.read` or
`Database.write`, and every function that is handed a connection, awaits only what it does with that connection; it yields
to nobody and touches no file; and a reader makes its answer of the rows after it has let go.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

GATEWAY = Path(__file__).resolve().parents[2] / "gateway"
# The one module that makes these blocks, and the one that upgrades the schema while nothing serves.
EXEMPT = ("database.py", "migrations/run.py")
# One rename that must be one with the look before it: who begins to need these files says so in a transaction.
ONE_RENAME = ("registry/retirement.py", "self._registry.set_aside")
FILE_WORK = frozenset(
    [
        "glob",
        "mkdir",
        "open",
        "read_bytes",
        "read_text",
        "rename",
        "rmtree",
        "sleep",
        "stat",
        "to_thread",
        "unlink",
        "write_bytes",
        "write_text",
    ]
)
WRONG = {
    "foreign await": """
        async def find(self):
            async with self._database.read() as connection:
                row = await connection.execute(query)
                await self._engine.load(row)
    """,
    "foreign await further in": """
        async def find(self):
            async with self._database.write() as connection:
                if row:
                    await asyncio.to_thread(work)
    """,
    "foreign await in what is handed the connection": """
        async def find(connection: AsyncConnection, clients):
            return await clients.get("http://engine")
    """,
    "yield": """
        async def stream(database):
            async with database.read() as connection:
                for row in await connection.execute(query):
                    yield row
    """,
    "file": """
        async def sweep(self):
            async with self._database.read() as connection:
                kept = (await connection.execute(query)).all()
                path.unlink()
    """,
    "async for": """
        async def pour(self):
            async with self._database.write() as connection:
                async for part in upload:
                    await connection.execute(part)
    """,
    "work on the rows": """
        async def all(self):
            async with self._database.read() as connection:
                return [model(row) for row in await connection.execute(query)]
    """,
}
RIGHT = """
    async def find(self):
        async with self._database.read() as connection:
            rows = (await connection.execute(query)).all()
            more = await get_route(connection, "support", project_id="p")
            last = await self._get_in("x", within=connection)
        await self._engine.load(rows)
        return [model(row) for row in rows]
"""


def offences(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, what) of everything that these blocks must not do."""
    for node in ast.walk(tree):
        if isinstance(node, ast.AsyncWith):
            for item in node.items:
                kind = _block(item.context_expr)
                if kind:
                    name = item.optional_vars.id if isinstance(item.optional_vars, ast.Name) else ""
                    yield from _within(node.body, name, is_read=kind == "read")
        elif isinstance(node, ast.AsyncFunctionDef):
            arguments = [*node.args.args, *node.args.kwonlyargs]
            for argument in arguments:
                if isinstance(argument.annotation, ast.Name) and argument.annotation.id == "AsyncConnection":
                    yield from _within(node.body, argument.arg, is_read=False)


def _block(expression: ast.expr) -> str | None:
    if isinstance(expression, ast.Call) and isinstance(expression.func, ast.Attribute):
        owner = ast.unparse(expression.func.value)
        if expression.func.attr in ("read", "write") and owner.endswith("database"):
            return expression.func.attr
    return None


def _within(body: list[ast.stmt], connection: str, *, is_read: bool) -> Iterator[tuple[int, str]]:
    for node in (found for statement in body for found in ast.walk(statement)):
        if isinstance(node, ast.Await) and not _uses(node.value, connection):
            yield node.lineno, f"awaits `{ast.unparse(node.value)[:60]}`"
        elif isinstance(node, ast.Yield | ast.YieldFrom | ast.AsyncFor):
            yield node.lineno, "waits for somebody else in the middle"
        elif isinstance(node, ast.Call) and _name(node.func) in FILE_WORK:
            yield node.lineno, f"works on files: `{ast.unparse(node)[:60]}`"
        elif is_read and isinstance(node, ast.ListComp | ast.DictComp | ast.GeneratorExp | ast.For):
            yield node.lineno, "works on the rows before it lets go"


def _uses(awaited: ast.expr, connection: str) -> bool:
    """A call on the connection, or one that is handed it."""
    return bool(connection) and any(isinstance(node, ast.Name) and node.id == connection for node in ast.walk(awaited))


def _name(function: ast.expr) -> str:
    return (
        function.attr if isinstance(function, ast.Attribute) else function.id if isinstance(function, ast.Name) else ""
    )


@pytest.mark.parametrize("path", sorted(GATEWAY.rglob("*.py")), ids=lambda path: str(path.relative_to(GATEWAY)))
def test_whoever_holds_the_database_only_asks_it(path: Path) -> None:
    if str(path.relative_to(GATEWAY)) in EXEMPT:
        return

    found = [
        f"{path.name}:{line} {what}"
        for line, what in offences(ast.parse(path.read_text()))
        if str(path.relative_to(GATEWAY)) != ONE_RENAME[0] or ONE_RENAME[1] not in what
    ]

    assert found == []


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_seen(name: str) -> None:
    assert list(offences(ast.parse(_unindented(WRONG[name]))))


def test_what_is_right_is_let_be() -> None:
    assert list(offences(ast.parse(_unindented(RIGHT)))) == []


def _unindented(code: str) -> str:
    lines = [line for line in code.splitlines() if line.strip()]
    margin = len(lines[0]) - len(lines[0].lstrip())
    return "\n".join(line[margin:] for line in lines)
