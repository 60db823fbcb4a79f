"""Who may stay connected, and who goes when there is no room. Pure: no socket, no clock; guests come and go in order.

    enters ──▶ stranger ──shows a key that counts──▶ known, being answered ◀──▶ known, idle
                  │                     └─ the room of known ones is full, none is idle: turned away (503)
                  └─ cut when strangers fill their room, or one address its share of it

    of all connections:  | strangers: at least 1/8, at most 1/2 ┆ known: at most 7/8 |

What may go wrong, and who loses:

- Strangers hold connections and say nothing, or little, or what needs no key: they fill half of the room at most. A
  newcomer is never refused: it may be a customer. The stranger goes that came first, since it had the longest time to
  show a key; of the address that has the most, where one has many. What it does meanwhile does not count: a byte now
  and then would buy time.
- They come faster than a customer can send a head: from few addresses, they only cut their own. From many, or from the
  customer's own, newcomers wait in the kernel's queue until who would go for them has had its time (door.py).
- Customers share an address, of a proxy or an office: known connections count against none, so only those that wait for
  their first key do, and a few such are no reason to lose before others.
- An address of IPv6 is nothing: a household has 2^64 of them. The /64 counts.
- Known connections fill their room: the one goes that has been idle for longest. One that is being answered never goes;
  where all are, the next key is told to come back. So strangers always keep some room to show a key in.
- Someone has a key and fills the room with answers: that is a customer; who may ask how much is not decided here.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv6Address
from typing import Generic, Literal, TypeVar

Guest = TypeVar("Guest", bound=Hashable)
Reason = Literal["address", "strangers", "idle", "full", "files"]

# What becomes of a newcomer takes some turns of the loop: made, read, asked for its key. So few newcomers are let in at
# a turn that nobody is cut before, however long a turn takes.
_TURNS_TO_SHOW_A_KEY = 8
_MOST_AT_A_TURN = 16


@dataclass(frozen=True)
class Size:
    """How many connections there may be."""

    total: int
    strangers: int
    known: int
    per_address: int

    @property
    def fair_share(self) -> int:
        """Up to so many strangers one address is no worse than another that has fewer."""
        return max(1, self.strangers // 8)


def size_of(total: int, per_address: int) -> Size:
    """The parts of the room."""
    return Size(total, total // 2, total - max(1, total // 8), per_address)


@dataclass(frozen=True)
class Cut(Generic[Guest]):
    """Who has to go, and why. It is not in the room any more."""

    guest: Guest
    reason: Reason


class Room(Generic[Guest]):
    """Who is connected. Every step costs the same, however many there are."""

    def __init__(self, size: Size) -> None:
        self.size = size
        self.strangers = 0
        self._address: dict[Guest, str] = {}
        # Those who came first stand first.
        self._by_address: dict[str, dict[Guest, None]] = {}
        self._addresses_with: dict[int, dict[str, None]] = {}
        self._most = 0
        self._known: set[Guest] = set()
        # Those who have been idle for longest stand first.
        self._idle: dict[Guest, None] = {}

    @property
    def known(self) -> int:
        """How many have shown a key that counts."""
        return len(self._known)

    @property
    def newcomers_at_a_turn(self) -> int:
        """How many may be let in before the loop has its next turn."""
        places = min(self.size.strangers, self.size.total - self.known)
        return max(1, min(_MOST_AT_A_TURN, places // _TURNS_TO_SHOW_A_KEY))

    def enter(self, guest: Guest, address: str) -> Cut[Guest] | None:
        """A newcomer, who always finds room; who has to go for it."""
        cut = self._make_room(address)
        self._address[guest] = address
        self._by_address.setdefault(address, {})[guest] = None
        self.strangers += 1
        self._count(address, len(self._by_address[address]), was=len(self._by_address[address]) - 1)
        return cut

    def _make_room(self, address: str) -> Cut[Guest] | None:
        own = self._by_address.get(address)
        if own is not None and len(own) >= self.size.per_address:
            return self._cut(next(iter(own)), "address")
        return self._cut_first("strangers") if self.is_full else None

    @property
    def is_full(self) -> bool:
        """Whether somebody has to go for the next newcomer."""
        return self.strangers >= self.size.strangers or self.strangers + self.known >= self.size.total

    def first_to_go(self) -> Guest | None:
        """The stranger who goes before all others: of the address that has the most, where that is many."""
        if not self.strangers:
            return None
        if self._most > self.size.fair_share:
            return next(iter(self._by_address[next(iter(self._addresses_with[self._most]))]))
        return next(iter(self._address))

    def do_without(self) -> Cut[Guest] | None:
        """There are fewer files than there should be: who goes for the next newcomer."""
        return self._cut_first("files")

    def show_key(self, guest: Guest) -> Cut[Guest] | None:
        """A stranger shows a key that counts while it is answered: who has to go for it. That may be itself."""
        if guest not in self._address:
            return None
        cut: Cut[Guest] | None = None
        if len(self._known) >= self.size.known:
            if not self._idle:
                return Cut(guest, "full")
            cut = Cut(next(iter(self._idle)), "idle")
            self.leave(cut.guest)
        self._forget_stranger(guest)
        self._known.add(guest)
        return cut

    def begin(self, guest: Guest) -> None:
        """It is being answered."""
        self._idle.pop(guest, None)

    def rest(self, guest: Guest) -> None:
        """It has its answer."""
        if guest in self._known:
            self._idle[guest] = None

    def leave(self, guest: Guest) -> None:
        """It is gone. Safe to repeat."""
        if guest in self._address:
            self._forget_stranger(guest)
        self._known.discard(guest)
        self._idle.pop(guest, None)

    # ---- Strangers by address

    def _cut_first(self, reason: Reason) -> Cut[Guest] | None:
        guest = self.first_to_go()
        return None if guest is None else self._cut(guest, reason)

    def _cut(self, guest: Guest, reason: Reason) -> Cut[Guest]:
        self._forget_stranger(guest)
        return Cut(guest, reason)

    def _forget_stranger(self, guest: Guest) -> None:
        address = self._address.pop(guest)
        own = self._by_address[address]
        del own[guest]
        self.strangers -= 1
        self._count(address, len(own), was=len(own) + 1)
        if not own:
            del self._by_address[address]

    def _count(self, address: str, count: int, *, was: int) -> None:
        if was:
            with_as_many = self._addresses_with[was]
            del with_as_many[address]
            if not with_as_many:
                del self._addresses_with[was]
        if count:
            self._addresses_with.setdefault(count, {})[address] = None
        # It changes by one at a time.
        if count > self._most:
            self._most = count
        elif self._most and self._most not in self._addresses_with:
            self._most -= 1


@lru_cache(maxsize=4096)
def neighbourhood(host: str) -> str:
    """What counts as one address: of IPv6 the /64, and IPv4 in IPv6's clothes is IPv4."""
    if ":" not in host:
        return host
    address = IPv6Address(host.partition("%")[0])
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return f"{IPv6Address(int(address) >> 64 << 64)}/64"
