"""Ids, and the time that records carry."""

from __future__ import annotations

import secrets
import time
from datetime import UTC, datetime

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"


def now() -> datetime:
    """Wall time in UTC, for records; never for durations."""
    return datetime.now(UTC)


def new_id(prefix: str) -> str:
    """A time-ordered id such as `ftjob-06ahq5...`: 48 bits of milliseconds, then 60 random bits, in base 32."""
    value = (int(time.time() * 1000) << 60) | secrets.randbits(60)
    digits = []
    for _ in range(22):
        value, digit = divmod(value, 32)
        digits.append(_ALPHABET[digit])
    return f"{prefix}{''.join(reversed(digits))}"
