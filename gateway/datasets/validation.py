"""Is a file fit for supervised fine-tuning? Streams chat JSONL once; holds no row, only hashes of rows.

The one accepted format is OpenAI's chat format, an object a line: {"messages": [{"role": ..., "content": ...}, ...]}.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

from .chat import MAX_SHOWN, ChatCheck, CountTokens, numbered_lines
from .models import DataCheck, DataReport, Finding

MAX_LEAKED_SHARE = 0.05


def validate_file(
    path: Path,
    *,
    count_tokens: CountTokens | None = None,
    max_tokens: int | None = None,
    special_tokens: Collection[str] = (),
) -> DataReport:
    """Check one file. With `count_tokens` rows longer than `max_tokens` are warned of too."""
    return _check(path, count_tokens=count_tokens, max_tokens=max_tokens, special_tokens=special_tokens).report()


def check_files(
    training: Path,
    validation: Path | None = None,
    *,
    count_tokens: CountTokens | None = None,
    max_tokens: int | None = None,
    special_tokens: Collection[str] = (),
) -> DataCheck:
    """Check a training file and its validation file, alone and against each other."""
    trained = _check(training, count_tokens=count_tokens, max_tokens=max_tokens, special_tokens=special_tokens)
    if validation is None:
        return DataCheck(training=trained.report())
    held_out = _check(validation, count_tokens=count_tokens, max_tokens=max_tokens, special_tokens=special_tokens)
    leaks = sorted((line, trained.seen[row]) for row, line in held_out.seen.items() if row in trained.seen)
    warnings = tuple(
        Finding(line=line, code="leak", message=f"this validation row is also line {other} of the training file")
        for line, other in leaks[:MAX_SHOWN]
    )
    return DataCheck(
        training=trained.report(),
        validation=held_out.report(),
        leak_errors=_too_many_leaks(len(leaks), len(held_out.seen)),
        leak_warnings=warnings,
        leaked_rows=len(leaks),
    )


def read_rows(path: Path) -> Iterator[tuple[int, list[dict[str, str]]]]:
    """The messages of each row that has no error, with its line number: what a trainer may learn from."""
    check = ChatCheck()
    with path.open("rb") as file:
        for line, raw in numbered_lines(file):
            messages = check.add(line, raw)
            if messages is not None:
                yield line, messages


def _check(
    path: Path, *, count_tokens: CountTokens | None, max_tokens: int | None, special_tokens: Collection[str]
) -> ChatCheck:
    check = ChatCheck(count_tokens=count_tokens, max_tokens=max_tokens, special_tokens=special_tokens)
    with path.open("rb") as file:
        for line, raw in numbered_lines(file, on_bytes=check.count_bytes):
            check.add(line, raw)
    return check


def _too_many_leaks(leaked: int, rows: int) -> tuple[Finding, ...]:
    if rows == 0 or leaked / rows <= MAX_LEAKED_SHARE:
        return ()
    text = (
        f"{leaked} of {rows} validation rows are also training rows, more than {MAX_LEAKED_SHARE:.0%}: "
        "validation would measure memory; remove them from one of the files"
    )
    return (Finding(line=None, code="leak", message=text),)
