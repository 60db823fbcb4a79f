"""From a name to what answers: never base by accident, never another arm in place of one that is not ready."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import Conflict, Forbidden, GatewayError, NotFound, Unavailable
from gateway.keys import Principal
from gateway.proxy.resolution import Answering, resolve
from gateway.routing.snapshot import Snapshot, SnapshotBase, SnapshotReplica, SnapshotRoute, SnapshotVersion

MOMENT = datetime(2026, 1, 2, tzinfo=UTC)
PROJECT = "proj_default"


def a_version(
    number: int, *, state: str = "verified", is_promoted: bool = False, owners: tuple[str, ...] = ("key:trainer",)
) -> SnapshotVersion:
    return SnapshotVersion(
        name=f"support@{number}", adapter="support", version=number, digest=f"{number:064x}",
        engine_name=f"support.v{number}.{number:012x}", state=state, project_id=PROJECT, owners=frozenset(owners),
        is_promoted=is_promoted, is_rolled_back=False, created_at=MOMENT,
    )  # fmt: skip


def a_principal(*scopes: str, name: str = "someone", project_id: str = PROJECT) -> Principal:
    return Principal("key-1", name, project_id, frozenset(scopes or ("inference",)))


def a_snapshot(*versions: SnapshotVersion, ready: tuple[int, ...] = (1, 2, 3), **route: object) -> Snapshot:
    defaults: dict[str, object] = {
        "name": "support", "revision": 1, "salt": "salt", "stable": "support@1", "previous": "tiny", "candidate": None,
        "variants": (("support@1", 100),), "project_id": PROJECT, "updated_at": MOMENT,
    }  # fmt: skip
    resident = frozenset(f"support.v{number}.{number:012x}" for number in ready)
    return Snapshot(
        revision=1,
        bases={"tiny": SnapshotBase("tiny", "b" * 64, 64, 128)},
        routes={"support": SnapshotRoute(**{**defaults, **route})},  # type: ignore[arg-type]
        versions={version.name: version for version in versions or (a_version(1, is_promoted=True),)},
        replicas=(SnapshotReplica("r", "/s", "1", "ready", resident),),
    )


def answer(snapshot: Snapshot, model: str, principal: Principal | None = None, unit: str = "u") -> Answering:
    return resolve(snapshot, model, principal or a_principal(), unit)


def test_base_is_reached_by_its_name() -> None:
    found = answer(a_snapshot(), "tiny")

    assert (found.variant, found.engine_name, found.digest, found.is_assigned) == ("tiny", "tiny", "b" * 64, False)


def test_a_route_assigns() -> None:
    found = answer(a_snapshot(), "support")

    assert (found.route, found.variant, found.engine_name) == ("support", "support@1", "support.v1.000000000001")
    assert found.is_assigned


def test_a_route_on_base_answers_with_base() -> None:
    found = answer(a_snapshot(stable="tiny", variants=(("tiny", 100),)), "support")

    assert (found.route, found.variant, found.engine_name, found.digest) == ("support", "tiny", "tiny", "b" * 64)


@pytest.mark.parametrize(
    "model",
    [
        "nope", "support@9", "support@0", "support@01", "support@latest", "support@", "@1", "Support", "support@1 ", "tiny@1",
        "support.v1.000000000001", "../support", "support/../tiny", "support\x00", "support@-1", "support@1@1", "x" * 100_000,
    ],
)  # fmt: skip
def test_an_unknown_name_is_refused_and_never_base(model: str) -> None:
    with pytest.raises(NotFound) as caught:
        answer(a_snapshot(), model, a_principal("admin"))

    assert caught.value.code == "model_not_found"
    assert len(caught.value.message) < 300


def test_what_is_another_projects_looks_unknown() -> None:
    stranger = a_principal("admin", project_id="proj_other")

    for model in ("support", "support@1", "support@stable"):
        with pytest.raises(NotFound):
            answer(a_snapshot(), model, stranger)


# ---- Pins


def test_a_promoted_version_may_be_pinned_by_anyone() -> None:
    found = answer(a_snapshot(), "support@1")

    assert (found.variant, found.is_assigned) == ("support@1", False)


@pytest.mark.parametrize(
    ("principal", "is_allowed"),
    [
        (a_principal("inference"), False),
        (a_principal("inference", "train"), False),
        (a_principal("inference", "preview"), True),
        (a_principal("admin"), True),
        (a_principal("inference", name="trainer"), True),
        (a_principal("inference", name="job-maker"), True),
    ],
)
def test_a_version_that_was_never_promoted_is_for_preview_or_its_owner(
    principal: Principal, *, is_allowed: bool
) -> None:
    snapshot = a_snapshot(a_version(2, owners=("key:trainer", "key:job-maker")))

    if is_allowed:
        assert answer(snapshot, "support@2", principal).variant == "support@2"
    else:
        with pytest.raises(Forbidden):
            answer(snapshot, "support@2", principal)


@pytest.mark.parametrize("state", ["rejected", "quarantined"])
def test_a_version_that_is_out_says_so(state: str) -> None:
    with pytest.raises(Conflict) as caught:
        answer(a_snapshot(a_version(2, state=state)), "support@2", a_principal("admin"))

    assert caught.value.code == f"version_{state}"


def test_a_pin_that_is_loaded_nowhere_waits() -> None:
    with pytest.raises(Unavailable) as caught:
        answer(a_snapshot(ready=()), "support@1")

    assert caught.value.code == "version_not_loaded"


def test_a_version_that_was_not_verified_is_not_served_even_if_an_engine_has_it() -> None:
    with pytest.raises(Unavailable):
        answer(a_snapshot(a_version(2, state="received")), "support@2", a_principal("admin"))


@pytest.mark.parametrize("model", ["support", "support@stable", "support@1"])
def test_a_retired_version_answers_by_no_name_even_if_an_engine_has_it(model: str) -> None:
    retired = replace(a_version(1, is_promoted=True), is_retired=True)

    with pytest.raises((Unavailable, Conflict)):
        answer(a_snapshot(retired), model)


# ---- Aliases


def test_aliases_read_the_routes_pointers() -> None:
    snapshot = a_snapshot(
        a_version(1, is_promoted=True), a_version(2), stable="support@1", previous="tiny", candidate="support@2"
    )
    admin = a_principal("admin")

    assert [answer(snapshot, f"support@{alias}", admin).variant for alias in ("stable", "previous", "candidate")] == [
        "support@1", "tiny", "support@2",
    ]  # fmt: skip
    assert not answer(snapshot, "support@stable").is_assigned


def test_a_candidate_needs_preview_as_any_pin_does() -> None:
    snapshot = a_snapshot(a_version(1, is_promoted=True), a_version(2), candidate="support@2")

    with pytest.raises(Forbidden):
        answer(snapshot, "support@candidate")


def test_an_alias_of_nothing_is_unknown() -> None:
    with pytest.raises(NotFound):
        answer(a_snapshot(), "support@candidate")


# ---- Nothing takes another's place


SPLIT = (("support@1", 50), ("tiny", 50))


@pytest.mark.invariant(2)
@given(unit=st.text(max_size=20))
def test_an_arm_that_is_not_ready_is_replaced_by_no_other(unit: str) -> None:
    ready = answer(a_snapshot(variants=SPLIT), "support", unit=unit)
    snapshot = a_snapshot(variants=SPLIT, ready=())

    if ready.variant == "tiny":
        assert answer(snapshot, "support", unit=unit).variant == "tiny"
    else:
        with pytest.raises(Unavailable) as caught:
            answer(snapshot, "support", unit=unit)
        assert caught.value.code == "variant_not_ready"


def test_without_an_engine_base_waits_too() -> None:
    snapshot = replace(a_snapshot(), replicas=())

    with pytest.raises(Unavailable) as caught:
        answer(snapshot, "tiny")

    assert caught.value.code == "engine_unavailable"


def test_only_replicas_that_have_the_version_are_chosen_from() -> None:
    two = (
        SnapshotReplica("has", "/a", "1", "ready", frozenset({"support.v1.000000000001"})),
        SnapshotReplica("has-not", "/b", "1", "ready", frozenset()),
        SnapshotReplica("down", "/c", "1", "failed", frozenset({"support.v1.000000000001"})),
    )
    snapshot = replace(a_snapshot(), replicas=two)

    assert [replica.id for replica in answer(snapshot, "support").replicas] == ["has"]
    assert [replica.id for replica in answer(snapshot, "tiny").replicas] == ["has", "has-not"]


# ---- Evaluations


@given(unit=st.text(max_size=20))
def test_an_evaluation_is_not_assigned(unit: str) -> None:
    evaluator = a_principal("evaluate", "inference", "preview")

    found = answer(a_snapshot(variants=SPLIT), "support", evaluator, unit)

    assert (found.variant, found.is_assigned) == ("support@1", False)


@given(model=st.text(max_size=30))
def test_any_text_is_answered_or_refused_on_purpose(model: str) -> None:
    try:
        found = answer(a_snapshot(), model, a_principal("admin"))
    except GatewayError:
        return
    assert found.variant in {"support@1", "tiny"}
