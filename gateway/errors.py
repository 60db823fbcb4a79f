"""Everything this package raises on purpose. Nothing here knows of HTTP: `api/errors.py` maps classes to statuses."""

import re

_INTERNALS = re.compile(r"0x[0-9a-fA-F]{2,}|[/\\]|Traceback|File \"|\n")
_MAX_QUOTED = 400


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
