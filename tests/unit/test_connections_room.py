"""Who stays connected and who goes."""

from __future__ import annotations

import random

import pytest

from gateway.connections.files import RESERVED_FILES, allowed_connections, connections_for
from gateway.connections.room import Cut, Room, neighbourhood, size_of
from gateway.errors import Invalid

SIZE = size_of(16, 100)  # 8 strangers, 14 known


def filled(room: Room[str], count: int, address: str = "a") -> Room[str]:
    for number in range(count):
        room.enter(f"{address}{number}", address)
    return room


def known(room: Room[str], name: str, *, is_idle: bool = True) -> Cut[str] | None:
    room.enter(name, "customers")
    cut = room.show_key(name)
    if is_idle:
        room.rest(name)
    return cut


# ---- Strangers


def test_half_is_for_strangers_and_known_ones_leave_them_an_eighth() -> None:
    assert (SIZE.total, SIZE.strangers, SIZE.known) == (16, 8, 14)


def test_a_newcomer_is_let_in_and_the_stranger_that_came_first_goes() -> None:
    room = filled(Room[str](SIZE), 8)

    assert room.enter("new", "a") == Cut("a0", "strangers")
    assert room.enter("newer", "a") == Cut("a1", "strangers")
    assert room.strangers == 8


def test_the_address_with_the_most_strangers_loses_first() -> None:
    room = Room[str](SIZE)
    room.enter("customer", "b")
    filled(room, 7, "a")

    cuts = [room.enter(f"more{number}", "a") for number in range(50)]

    assert "customer" not in [cut and cut.guest for cut in cuts]


def test_where_no_address_has_many_the_stranger_goes_that_came_first() -> None:
    room = Room[str](size_of(64, 100))  # 32 strangers, of which 4 are a fair share
    for number in range(32):
        room.enter(f"g{number}", "proxy" if number in (3, 9, 20) else f"address{number}")

    cuts = [room.enter(f"n{number}", f"new{number}") for number in range(6)]

    assert cuts == [Cut(f"g{number}", "strangers") for number in range(6)]


def test_an_address_with_its_share_makes_room_for_itself() -> None:
    room = filled(Room[str](size_of(16, 3)), 3)
    room.enter("other", "b")

    assert room.enter("new", "a") == Cut("a0", "address")
    assert room.strangers == 4


def test_known_ones_count_against_no_address() -> None:
    room = Room[str](size_of(16, 3))
    for number in range(10):
        assert known(room, f"k{number}") is None
        assert room.enter(f"x{number}", "customers") is None
        room.leave(f"x{number}")

    assert (room.known, room.strangers) == (10, 0)


def test_strangers_cannot_displace_known_ones() -> None:
    room = Room[str](SIZE)
    for number in range(14):
        known(room, f"k{number}")

    cuts = [room.enter(f"s{number}", f"address{number % 3}") for number in range(100)]

    assert room.known == 14
    assert {cut.reason for cut in cuts if cut} == {"strangers"}
    assert room.strangers == 2


# ---- Known ones


def test_when_known_ones_fill_their_room_the_one_goes_that_has_been_idle_for_longest() -> None:
    room = Room[str](SIZE)
    for number in range(14):
        known(room, f"k{number}")
    room.begin("k0")
    room.rest("k0")
    room.begin("k1")

    assert known(room, "new") == Cut("k2", "idle")
    assert room.known == 14


def test_one_that_is_being_answered_never_goes_and_the_next_key_is_turned_away() -> None:
    room = Room[str](SIZE)
    for number in range(14):
        known(room, f"k{number}", is_idle=False)
    room.enter("late", "customers")

    assert room.show_key("late") == Cut("late", "full")
    assert (room.known, room.strangers) == (14, 1)

    room.rest("k5")
    assert room.show_key("late") == Cut("k5", "idle")


def test_who_is_gone_or_cut_is_known_no_more() -> None:
    room = filled(Room[str](SIZE), 8)
    cut = room.enter("new", "a")
    assert cut is not None

    room.leave(cut.guest)
    assert room.show_key(cut.guest) is None
    room.begin(cut.guest)
    room.rest(cut.guest)
    room.leave("new")
    room.leave("new")

    assert (room.strangers, room.known) == (7, 0)


# ---- Fewer files than there should be


def test_without_files_strangers_go_for_newcomers_and_known_ones_stay() -> None:
    room = filled(Room[str](size_of(100, 100)), 2)
    known(room, "customer")

    assert [room.do_without() for _ in range(3)] == [Cut("a0", "files"), Cut("a1", "files"), None]
    assert room.known == 1


def test_who_goes_next_is_known_before_it_goes() -> None:
    room = filled(Room[str](SIZE), 8)

    assert (room.is_full, room.first_to_go()) == (True, "a0")
    assert room.enter("new", "a") == Cut("a0", "strangers")
    room.leave("a1")
    assert (room.is_full, room.first_to_go()) == (False, "a2")
    assert Room[str](SIZE).first_to_go() is None


# ---- How many at a turn


@pytest.mark.parametrize(("total", "known_ones", "at_a_turn"), [(4096, 0, 16), (80, 0, 5), (80, 70, 1), (16, 14, 1)])
def test_no_more_are_let_in_at_a_turn_than_leave_each_some_turns_to_show_its_key(
    total: int, known_ones: int, at_a_turn: int
) -> None:
    room = Room[str](size_of(total, 10_000))
    for number in range(known_ones):
        known(room, f"k{number}")

    assert room.newcomers_at_a_turn == at_a_turn


# ---- Whatever happens


@pytest.mark.parametrize("seed", range(20))
def test_whatever_comes_and_goes_the_parts_are_kept(seed: int) -> None:
    chance = random.Random(seed)
    size = size_of(chance.choice([16, 17, 40]), chance.choice([1, 3, 100]))
    room = Room[int](size)
    strangers: dict[int, str] = {}
    busy: dict[int, bool] = {}
    for number in range(3_000):
        match chance.randrange(6):
            case 0 | 1:
                address = f"a{int(chance.expovariate(0.3))}"
                cut = room.enter(number, address)
                if cut:
                    most = max(list(strangers.values()).count(found) for found in strangers.values())
                    theirs = list(strangers.values()).count(strangers[cut.guest])
                    own = min(who for who in strangers if strangers[who] == strangers[cut.guest])
                    assert cut.guest == own
                    if cut.reason == "address":
                        assert (strangers[own], theirs) == (address, size.per_address)
                    else:
                        assert theirs == most if most > size.fair_share else own == min(strangers)
                    del strangers[cut.guest]
                strangers[number] = address
            case 2 if strangers:
                guest = chance.choice(list(strangers))
                cut = room.show_key(guest)
                if cut and cut.guest == guest:
                    assert all(busy.values())
                    continue
                if cut:
                    assert not busy.pop(cut.guest)
                del strangers[guest]
                busy[guest] = True
            case 3 if busy:
                guest = chance.choice(list(busy))
                busy[guest] = not busy[guest]
                (room.begin if busy[guest] else room.rest)(guest)
            case 4 if strangers or busy:
                guest = chance.choice([*strangers, *busy])
                room.leave(guest)
                strangers.pop(guest, None)
                busy.pop(guest, None)
        assert (room.strangers, room.known) == (len(strangers), len(busy))
        assert room.strangers <= size.strangers
        assert room.known <= size.known
        assert room.strangers + room.known <= size.total


# ---- Addresses


@pytest.mark.parametrize(
    ("host", "counts_as"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::1", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::1", "::/64"),
    ],
)
def test_what_counts_as_one_address(host: str, counts_as: str) -> None:
    assert neighbourhood(host) == counts_as


# ---- Files


def test_each_connection_has_a_file_for_its_way_to_the_engine() -> None:
    assert connections_for(RESERVED_FILES + 2 * 100) == 100
    assert allowed_connections(4096, 256) == 80
    assert allowed_connections(50, 10**6) == 50


@pytest.mark.parametrize("files", [0, 64, RESERVED_FILES + 31])
def test_too_few_files_to_serve_at_all_are_told_with_the_remedy(files: int) -> None:
    with pytest.raises(Invalid, match="ulimit -n") as caught:
        allowed_connections(4096, files)

    assert caught.value.code == "too_few_files"
    assert str(files) in caught.value.message
