"""What counts as work of an engine's processes."""

from __future__ import annotations

import pytest

from gateway.engine.models import ReplicaUsage
from gateway.engine.pulse import is_working


def a_usage(
    at_s: float = 0.0, *, cpu_s: float = 0.0, waited_s: float | None = 0.0, read_bytes: int = 0
) -> ReplicaUsage:
    return ReplicaUsage(at_s=at_s, cpu_s=cpu_s, waited_s=waited_s, read_bytes=read_bytes)


@pytest.mark.parametrize(
    ("used", "is_work"),
    [
        ({"cpu_s": 0.9}, True),  # it has a core
        ({"cpu_s": 0.04, "waited_s": 0.9}, True),  # it wants one that 20 others want too
        ({"cpu_s": 0.02, "waited_s": 0.01}, False),  # a server that answers our questions
        ({"cpu_s": 0.06, "waited_s": None}, True),  # where nobody tells who waits
        ({"cpu_s": 0.02, "waited_s": None}, False),
        ({"read_bytes": 5_000_000}, True),  # weights from a slow disk
        ({"read_bytes": 5_000}, False),
        ({}, False),
        ({"cpu_s": -5.0}, False),  # a thread with much of it has ended
    ],
)
def test_work_is_wanting_a_core_or_reading_files(used: dict[str, float], is_work: bool) -> None:
    before = a_usage(waited_s=None if used.get("waited_s", 0.0) is None else 0.0)

    assert is_working(before, a_usage(1.0, **used)) is is_work  # type: ignore[arg-type]


def test_nothing_is_said_of_one_look_or_of_the_same_look_twice() -> None:
    busy = a_usage(5.0, cpu_s=9.0)

    assert not is_working(None, busy)
    assert not is_working(busy, busy)
    assert not is_working(busy, None)
