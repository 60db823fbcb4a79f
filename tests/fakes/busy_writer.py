"""A process that writes again and again, as `Database.write` does it, with hardly a pause: `busy_writer.py URL`.

Its first line says that it writes; then one a transaction. A line on its input ends it.
"""

from __future__ import annotations

import asyncio
import sys

from sqlalchemy import text

from gateway.database import Database

HELD_S = 0.095
PAUSE_S = 0.005


async def write_on(url: str) -> None:
    """Until killed."""
    database = Database(url)
    while True:
        async with database.write() as connection:
            await connection.execute(text("UPDATE counter SET value = value + 1 WHERE name = 'b'"))
            await asyncio.sleep(HELD_S)
        sys.stdout.write("wrote\n")
        sys.stdout.flush()
        await asyncio.sleep(PAUSE_S)


if __name__ == "__main__":
    asyncio.run(write_on(sys.argv[1]))
