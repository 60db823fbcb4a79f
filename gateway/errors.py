"""Everything this package raises on purpose. Nothing here knows of HTTP: `api/errors.py` maps classes to statuses."""

import re
from collections.abc import Iterable, Iterator

_INTERNALS = re.compile(r"0x[0-9a-fA-F]{2,}|[/\\]|Traceback|File \"|\n")
_MAX_QUOTED = 400
MAX_VALUE_CHARS = 200
_MAX_INTEGER_BITS = 256


class GatewayError(Exception):
    """Base of every error this package raises on purpose.

    `code` is a stable reason code; the message names the thing, the value and what to do.
    """

    code: str = "internal_error"

    def __init__(self, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code


class NotFound(GatewayError):
    """The named thing does not exist (or belongs to another project, which looks the same)."""

    code = "not_found"


class Invalid(GatewayError):
    """The input is malformed or asks for something that is never allowed."""

    code = "invalid_request"


class Refused(GatewayError):
    """Well-formed, but it fails a check: pre-flight, verify, a gate."""

    code = "refused"


class Conflict(GatewayError):
    """The state moved, or forbids the change now."""

    code = "conflict"


class Unauthenticated(GatewayError):
    """No key, or a key that is unknown, expired or revoked."""

    code = "invalid_api_key"


class Forbidden(GatewayError):
    """The key is good, its scope does not reach this far."""

    code = "insufficient_scope"


class TooLarge(GatewayError):
    """An upload or a body is over its cap."""

    code = "too_large"


class Unavailable(GatewayError):
    """It cannot be done at present; trying again later is right."""

    code = "unavailable"


class StorageFull(GatewayError):
    """The disk takes no more."""

    code = "storage_full"


class UpstreamFailed(GatewayError):
    """The engine answered wrongly, or not at all."""

    code = "engine_error"


def without_internals(message: str, otherwise: str) -> str:
    """Another program's sentence as clients may read it; `otherwise` when it may hold an address, a path or a trace."""
    if not message or len(message) > _MAX_QUOTED or _INTERNALS.search(message):
        return otherwise
    return message


def quoted(value: object, *, limit: int = MAX_VALUE_CHARS) -> str:
    """A client's value as an error shows it, cut at `limit` characters.

    What is not shown is not rendered either: `repr` of a body's worth of values would hold up everybody for seconds.
    """
    text = _rendered(value, limit)
    return text if len(text) <= limit else text[: max(0, limit - 3)] + "..."


def _rendered(value: object, room: int) -> str:
    """The beginning of `repr(value)`: about `room` characters, and half of that for what is inside of it."""
    if isinstance(value, str | bytes):
        return repr(value) if len(value) <= room else repr(value[:room])[:-1] + "..."
    if isinstance(value, bool | float) or value is None:
        return repr(value)
    if isinstance(value, int):  # the time that its digits take grows with their square
        bits = value.bit_length()
        return repr(value) if bits <= _MAX_INTEGER_BITS else f"an integer of {bits} bits"
    if isinstance(value, list | tuple):
        return _joined("[", (_rendered(item, room // 2) for item in value), "]", room)
    if isinstance(value, dict):
        return _joined("{", _entries(value, room // 2), "}", room)
    return f"a {type(value).__name__}"


def _entries(value: dict[object, object], room: int) -> Iterator[str]:
    return (f"{_rendered(key, room)}: {_rendered(item, room)}" for key, item in value.items())


def _joined(opening: str, items: Iterable[str], closing: str, room: int) -> str:
    if room == 0:
        return f"{opening}...{closing}"
    text = opening
    for place, item in enumerate(items):
        text += f", {item}" if place else item
        if len(text) > room:
            return text + "..."
    return text + closing
