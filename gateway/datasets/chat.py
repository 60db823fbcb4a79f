"""The check of chat rows, a line at a time: each fault by line and code. Holds no row, only hashes of rows."""

from __future__ import annotations

import hashlib
import re
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, BinaryIO

import orjson

from .models import DataReport, Finding, Lengths, Statistics

ROLES = ("system", "user", "assistant")
MAX_LINE_BYTES = 8 * 2**20
MAX_SHOWN = 100  # findings of a kind (errors, warnings) that a report spells out
MAX_SHOWN_PER_CODE = 20  # so that one frequent fault does not hide the others
MAX_REMEMBERED_ROWS = 2_000_000  # rows among which repeats are looked for: about 300 MB of hashes
LONG_ROW_CHARACTERS = 16_000
FEW_ROWS = 10

_SPECIAL_TOKEN = re.compile(r"<\|[A-Za-z0-9_]{1,40}\|>")
_OTHER_FORMATS = {
    "prompt": "prompt/completion rows",
    "completion": "prompt/completion rows",
    "text": "plain text rows",
    "conversations": "ShareGPT rows",
    "instruction": "Alpaca rows",
    "chosen": "preference rows",
}
_TOOL_KEYS = frozenset({"tools", "functions", "parallel_tool_calls", "tool_calls", "tool_call_id", "function_call"})

CountTokens = Callable[[Sequence[Mapping[str, str]]], int]


class ChatCheck:
    """What is known of a file after the lines that were added so far."""

    def __init__(
        self,
        *,
        count_tokens: CountTokens | None = None,
        max_tokens: int | None = None,
        special_tokens: Collection[str] = (),
    ) -> None:
        self.seen: dict[bytes, int] = {}  # hash of a row -> its first line
        self._prompts: dict[bytes, int] = {}  # hash of a prompt -> its first line
        self._systems: set[bytes] = set()
        self._count_tokens = count_tokens
        self._max_tokens = max_tokens
        self._special_tokens = tuple(special_tokens)
        self._digest = hashlib.sha256()
        self._size = self._rows = self._valid = 0
        self._errors: list[Finding] = []
        self._warnings: list[Finding] = []
        self._counts: Counter[str] = Counter()
        self._error_count = self._warning_count = 0
        self._roles: Counter[str] = Counter()
        self._row_characters = array("Q")
        self._answer_characters = array("Q")
        self._row_tokens = array("Q")

    def add(self, line: int, raw: bytes | None) -> list[dict[str, str]] | None:
        """Check one line (None: longer than the cap); its messages when it may be trained on."""
        before = self._error_count
        if raw is None:
            self._rows += 1
            self._error(
                line, "line_too_long", f"the line is longer than {MAX_LINE_BYTES:,} bytes; split the conversation"
            )
            return None
        if not raw.strip():
            self._warning(line, "blank_line", "the line is blank; it is skipped")
            return None
        self._rows += 1
        messages = self._messages(line, raw)
        if messages is None or self._error_count > before:
            return None
        self._valid += 1
        self._measure(line, messages)
        self._remember(line, messages)
        return messages

    def count_bytes(self, chunk: bytes) -> None:
        """Take bytes of the file into its digest."""
        self._digest.update(chunk)
        self._size += len(chunk)

    def report(self) -> DataReport:
        """What was found so far, with what only shows at the end of the file."""
        errors, warnings, counts = list(self._errors), list(self._warnings), Counter(self._counts)
        if self._rows == 0:
            counts["no_rows"] += 1
            errors.insert(0, Finding(line=None, code="no_rows", message="the file holds no row"))
        elif self._rows < FEW_ROWS:
            counts["few_rows"] += 1
            text = f"only {self._rows} rows; a fine-tune wants at least {FEW_ROWS}, and hundreds to be any good"
            warnings.insert(0, Finding(line=None, code="few_rows", message=text))
        return DataReport(
            digest=self._digest.hexdigest(),
            size_bytes=self._size,
            rows=self._rows,
            valid_rows=self._valid,
            error_count=self._error_count + counts["no_rows"],
            warning_count=self._warning_count + counts["few_rows"],
            counts={code: count for code, count in sorted(counts.items()) if count},
            errors=tuple(errors),
            warnings=tuple(warnings),
            statistics=Statistics(
                messages=sum(self._roles.values()),
                roles=dict(sorted(self._roles.items())),
                system_prompts=len(self._systems),
                row_characters=_lengths(self._row_characters),
                answer_characters=_lengths(self._answer_characters),
                row_tokens=_lengths(self._row_tokens),
            ),
        )

    # ---- findings ----

    def _error(self, line: int | None, code: str, message: str) -> None:
        self._error_count += 1
        self._counts[code] += 1
        if len(self._errors) < MAX_SHOWN and self._counts[code] <= MAX_SHOWN_PER_CODE:
            self._errors.append(Finding(line=line, code=code, message=message))

    def _warning(self, line: int | None, code: str, message: str) -> None:
        self._warning_count += 1
        self._counts[code] += 1
        if len(self._warnings) < MAX_SHOWN and self._counts[code] <= MAX_SHOWN_PER_CODE:
            self._warnings.append(Finding(line=line, code=code, message=message))

    # ---- one row ----

    def _messages(self, line: int, raw: bytes) -> list[dict[str, str]] | None:
        row = self._object(line, raw)
        if row is None:
            return None
        if "messages" not in row:
            self._error(line, "no_messages", _no_messages(row))
            return None
        for key in sorted(row.keys() - {"messages"}):
            self._unknown_key(line, key, "the row")
        messages = row["messages"]
        if not isinstance(messages, list):
            self._error(line, "messages_not_list", f"`messages` is {_kind(messages)}; it must be a list of messages")
            return None
        if not messages:
            self._error(line, "empty_messages", "`messages` is empty")
            return None
        before = self._error_count
        checked = [self._message(line, index, message) for index, message in enumerate(messages)]
        if self._error_count == before:
            self._order(line, [message["role"] for message in checked])
        return checked if self._error_count == before else None

    def _object(self, line: int, raw: bytes) -> dict[str, Any] | None:
        if raw.startswith(b"\xef\xbb\xbf"):
            self._error(
                line, "byte_order_mark", "the line starts with a byte order mark; save the file as UTF-8 without BOM"
            )
            return None
        try:
            raw.decode("utf-8")
        except UnicodeDecodeError as error:
            self._error(line, "not_utf8", f"byte {error.start + 1} is not UTF-8; save the file as UTF-8")
            return None
        try:
            row = orjson.loads(raw)
        except orjson.JSONDecodeError as error:
            self._error(
                line, "not_json", f"not JSON: {error.msg} at column {error.colno}; each line must be one JSON object"
            )
            return None
        if not isinstance(row, dict):
            self._error(line, "not_object", f'the line is {_kind(row)}; it must be an object {{"messages": [...]}}')
            return None
        return row

    def _message(self, line: int, index: int, message: object) -> dict[str, str]:
        where = f"messages[{index}]"
        if not isinstance(message, dict):
            self._error(
                line, "message_not_object", f"{where} is {_kind(message)}; it must be an object with role and content"
            )
            return {"role": "", "content": ""}
        for key in sorted(message.keys() - {"role", "content"}):
            self._message_key(line, where, key, message[key])
        role = message.get("role")
        if role not in ROLES:
            said = "is missing" if role is None else f"{str(role)[:40]!r} is unknown"
            self._error(line, "unknown_role", f"{where}: role {said}; use one of {', '.join(ROLES)}")
            role = ""
        return {"role": str(role), "content": self._content(line, where, message.get("content"))}

    def _content(self, line: int, where: str, content: object) -> str:
        if content is None:
            self._error(line, "null_content", f"{where}: content is null or missing; give it text")
        elif not isinstance(content, str):
            self._error(
                line, "content_not_text", f"{where}: content is {_kind(content)}; only plain text can be trained on"
            )
        elif not content.strip():
            self._error(line, "empty_content", f"{where}: content is empty; give it text or drop the message")
        else:
            token = self._special_token(content)
            if token:
                self._error(
                    line,
                    "special_token",
                    f"{where}: content holds the special token {token!r}, which would end or forge a turn",
                )
            return content
        return ""

    def _special_token(self, content: str) -> str | None:
        found = _SPECIAL_TOKEN.search(content)
        if found:
            return found[0]
        return next((token for token in self._special_tokens if token in content), None)

    def _message_key(self, line: int, where: str, key: str, value: object) -> None:
        if key == "weight":
            if value != 1:
                text = f"{where}: `weight` {value!r} cannot be honoured: every assistant message is trained on; drop the message"
                self._error(line, "weight_unsupported", text)
            return
        self._unknown_key(line, key, where)

    def _unknown_key(self, line: int, key: str, where: str) -> None:
        if key in _TOOL_KEYS:
            self._error(
                line, "tools_unsupported", f"{where} has `{key}`: tool calls cannot be trained on; drop the row"
            )
        else:
            self._warning(line, "unknown_key", f"{where} has the unknown key {key[:40]!r}; it is ignored")

    def _order(self, line: int, roles: list[str]) -> None:
        if "system" in roles[1:]:
            self._error(
                line, "system_not_first", "a system message stands after the first place; it may only open the row"
            )
        if "assistant" not in roles:
            self._error(line, "no_assistant", "no assistant message: there is nothing to learn")
        elif roles[-1] != "assistant":
            self._error(
                line, "last_not_assistant", f"the last message is from {roles[-1]!r}; the row must end with the answer"
            )
        elif "user" not in roles:
            self._warning(line, "no_user", "no user message: the answer follows from nothing")
        spoken = [role for role in roles if role != "system"]
        if any(first == second for first, second in pairwise(spoken)):
            self._warning(
                line,
                "roles_repeat",
                "two messages in a row are from the same role; users and assistant should take turns",
            )

    # ---- statistics and repeats ----

    def _measure(self, line: int, messages: list[dict[str, str]]) -> None:
        self._roles.update(message["role"] for message in messages)
        if messages[0]["role"] == "system":
            self._systems.add(_hash(messages[:1]))
        characters = sum(len(message["content"]) for message in messages)
        self._row_characters.append(characters)
        self._answer_characters.append(len(messages[-1]["content"]))
        if characters > LONG_ROW_CHARACTERS:
            self._warning(
                line, "long_row", f"{characters:,} characters; a row this long is likely to be cut in training"
            )
        if self._count_tokens is None:
            return
        tokens = self._count_tokens(messages)
        self._row_tokens.append(tokens)
        if self._max_tokens is not None and tokens > self._max_tokens:
            self._warning(
                line, "too_many_tokens", f"{tokens:,} tokens, more than the {self._max_tokens:,} that training keeps"
            )

    def _remember(self, line: int, messages: list[dict[str, str]]) -> None:
        row = _hash(messages)
        first = self.seen.get(row)
        if first is not None:
            self._warning(line, "duplicate_row", f"the row repeats line {first}")
            return
        prompt = _hash(messages[:-1])
        other = self._prompts.get(prompt)
        if other is not None:
            self._warning(line, "conflicting_answer", f"the same prompt has another answer on line {other}")
        if len(self.seen) < MAX_REMEMBERED_ROWS:
            self.seen[row] = line
            self._prompts.setdefault(prompt, line)


def numbered_lines(
    file: BinaryIO, *, on_bytes: Callable[[bytes], None] | None = None
) -> Iterator[tuple[int, bytes | None]]:
    """Lines without their end; None for one over the cap, which is read past in pieces."""
    number = 0
    while raw := file.readline(MAX_LINE_BYTES + 2):
        number += 1
        if on_bytes is not None:
            on_bytes(raw)
        whole = raw.endswith(b"\n") or len(raw) < MAX_LINE_BYTES + 2
        yield number, raw.rstrip(b"\r\n") if whole else None
        while not whole and (raw := file.readline(2**20)):
            if on_bytes is not None:
                on_bytes(raw)
            whole = raw.endswith(b"\n")


def _no_messages(row: Mapping[str, Any]) -> str:
    for key, name in _OTHER_FORMATS.items():
        if key in row:
            return (
                f'no `messages`: these look like {name}; rewrite each as {{"messages": [{{"role": "user", ...}}, ...]}}'
            )
    return 'no `messages`; each row must be {"messages": [{"role": ..., "content": ...}, ...]}'


def _hash(messages: Sequence[Mapping[str, str]]) -> bytes:
    return hashlib.blake2b(orjson.dumps([(m["role"], m["content"]) for m in messages]), digest_size=16).digest()


def _kind(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "a string"
        case list():
            return "a list"
        case _:
            return "an object"


def _lengths(values: array[int]) -> Lengths | None:
    if not values:
        return None
    ordered = sorted(values)
    last = len(ordered) - 1
    return Lengths(
        minimum=ordered[0],
        median=ordered[last // 2],
        p95=ordered[(last * 95 + 99) // 100],
        maximum=ordered[-1],
        total=sum(ordered),
    )
