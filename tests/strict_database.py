"""SQLite made as strict as other databases are: a text longer than its column, or one with a NUL in it, is refused."""

from __future__ import annotations

from sqlalchemy import String, Text, text

from gateway.database import Database
from gateway.tables import metadata


async def enforce_columns(database: Database) -> None:
    """Refuse from now on what PostgreSQL would refuse; a trigger for each text column of `tables.py`."""
    async with database.write() as connection:
        for table in metadata.tables.values():
            for column in table.columns:
                if not isinstance(column.type, String):
                    continue
                new = f'NEW."{column.name}"'
                wrong = [f"instr(CAST({new} AS BLOB), x'00') > 0"]
                if not isinstance(column.type, Text) and column.type.length:
                    wrong.append(f"length({new}) > {column.type.length}")
                for verb in ("INSERT", "UPDATE"):
                    await connection.execute(
                        text(
                            f"CREATE TRIGGER strict_{table.name}_{column.name}_{verb.lower()} BEFORE {verb} ON {table.name} "
                            f"WHEN {' OR '.join(wrong)} BEGIN "
                            f"SELECT RAISE(ABORT, 'value refused for {table.name}.{column.name}'); END"
                        )
                    )
