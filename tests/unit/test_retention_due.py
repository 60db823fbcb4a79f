"""What is due is decided from what was seen, and nothing goes twice."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from gateway.retention.due import FIRST_ROWS, LEAST_ROWS, MOST_ROWS, STEP_S, Seen, next_rows, overdue
from gateway.retention.kinds import KINDS
from gateway.settings import RetentionSettings

NOW = datetime(2026, 5, 1, tzinfo=UTC)
DAY = timedelta(days=1)


def test_every_kind_goes_by_its_own_days() -> None:
    settings = RetentionSettings(exposures_days=2, job_events_days=3)

    found = {due.kind.name: NOW - due.before for due in overdue(settings, Seen(now=NOW))}

    assert set(found) == {kind.name for kind in KINDS}
    assert found["exposures"] == 2 * DAY
    assert found["job_events"] == 3 * DAY


def test_what_is_more_than_the_rows_goes_but_not_a_running_splits() -> None:
    seen = Seen(
        now=NOW, exposures_beyond=NOW - DAY, exposed_routes=("quiet", "split"), split_routes=frozenset({"split"})
    )

    by_count = [due for due in overdue(RetentionSettings(), seen) if due.after is not None]

    assert [(due.before, due.after, due.only) for due in by_count] == [
        (NOW - DAY, NOW - 7 * DAY, (("route", "quiet"),))
    ]


def test_a_running_splits_exposures_have_a_bound_too_and_nothing_is_counted_twice() -> None:
    seen = Seen(
        now=NOW, exposures_beyond=NOW - DAY, exposures_beyond_split=NOW - 2 * DAY, exposed_routes=("quiet", "split"),
        split_routes=frozenset({"split"}),
    )  # fmt: skip

    by_count = [due for due in overdue(RetentionSettings(), seen) if due.after is not None]

    assert [(due.after, due.before, due.only) for due in by_count] == [
        (NOW - 7 * DAY, NOW - 2 * DAY, ()),
        (NOW - 2 * DAY, NOW - DAY, (("route", "quiet"),)),
    ]


def test_a_job_that_said_too_much_keeps_its_newest_events() -> None:
    seen = Seen(now=NOW, crowded_jobs=(("ftjob-1", NOW - DAY),))

    due = overdue(RetentionSettings(), seen)[-1]

    assert (due.kind.name, due.only, due.before) == ("job_events", (("job_id", "ftjob-1"),), NOW - DAY)


def test_steps_shrink_while_the_lock_is_held_too_long_and_grow_while_it_is_not() -> None:
    rows = FIRST_ROWS
    for _ in range(20):
        rows = next_rows(rows, 2 * STEP_S)
    assert rows == LEAST_ROWS

    for _ in range(20):
        rows = next_rows(rows, STEP_S / 4)
    assert rows == MOST_ROWS
    assert next_rows(rows, STEP_S * 0.75) == rows
