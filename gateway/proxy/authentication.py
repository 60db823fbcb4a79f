"""From an `Authorization` header to a principal, by one lookup in the snapshot."""

from __future__ import annotations

from ..errors import Unauthenticated
from ..keys import ANONYMOUS, MAX_KEY_BYTES, Principal, hash_key
from ..routing.table import RoutingTable, is_expired

_HINT = "send `Authorization: Bearer tn-...`; an admin makes keys with `turnout keys create`"


class Authenticator:
    """Knows who is asking. A key is only ever compared by the hash of all of it."""

    def __init__(self, table: RoutingTable, pepper: bytes, *, allow_anonymous: bool) -> None:
        self._table = table
        self._pepper = pepper
        self._allow_anonymous = allow_anonymous

    def principal(self, authorization: bytes | None) -> Principal:
        """Who `authorization` names; raises `Unauthenticated`. Without keys everyone is let in, a good key still counts."""
        raw = _bearer(authorization)
        if raw is not None and len(raw) <= MAX_KEY_BYTES:
            key = self._table.current.keys.get(hash_key(raw, self._pepper))
            if key is not None and not is_expired(key):
                return Principal(key.id, key.name, key.project_id, key.scopes)
        if self._allow_anonymous:
            return ANONYMOUS
        if raw is None:
            raise Unauthenticated(f"no API key was sent: {_HINT}", code="missing_api_key")
        raise Unauthenticated(f"the API key is unknown, expired or revoked: {_HINT}")


def _bearer(authorization: bytes | None) -> str | None:
    if not authorization:
        return None
    scheme, _, raw = authorization.partition(b" ")
    if scheme.lower() != b"bearer" or not raw.strip():
        return None
    return raw.strip().decode("latin-1")
