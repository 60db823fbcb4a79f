"""All rows, and some of every family."""

from __future__ import annotations

from collections import defaultdict

from . import bodies, heads
from .rows import Family, Row, Words

FAMILIES: tuple[Family, ...] = (
    heads.request_lines,
    heads.header_lines,
    heads.hosts,
    heads.singletons,
    heads.connections,
    heads.expectations,
    heads.upgrades,
    heads.connects,
    heads.paths,
    bodies.lengths,
    bodies.codings,
    bodies.chunks,
    bodies.trailers,
    bodies.refused,
    bodies.pipelines,
    bodies.unfinished,
)


def corpus(key: str, plant: bytes) -> list[Row]:
    """Every row, each with names of its own."""
    words = Words(key, plant)
    rows = [row for family in FAMILIES for row in family(words)]
    return [row.numbered(number) for number, row in enumerate(rows)]


def core(rows: list[Row], *, every: int) -> list[Row]:
    """Every n-th of each family, and the first and last of each."""
    by_family: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_family[row.family].append(row)
    return [
        row
        for members in by_family.values()
        for at, row in enumerate(members)
        if at % every == 0 or at == len(members) - 1
    ]
