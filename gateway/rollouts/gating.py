"""Whether a version passed the gates of a route, as the suites are now and against the stable that stands now."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from sqlalchemy.ext.asyncio import AsyncConnection

from ..errors import Conflict, Refused
from ..jobs.suites import Suites
from ..jobs.verdicts import Verdict
from ..routing.models import Route
from .conditions import RouteVersion, newest_verdict


async def suite_digests(suites: Suites | None, names: Sequence[str]) -> dict[str, str | None]:
    """Present digest of each suite. To be read before a transaction: hashing a suite may take a while."""
    if suites is None:
        return dict.fromkeys(names)
    return {name: (await asyncio.to_thread(suites.find, name)).digest for name in names}


async def check_gates(
    connection: AsyncConnection,
    route: Route,
    version: RouteVersion,
    digests: Mapping[str, str | None],
    *,
    baseline: str,
) -> None:
    """Raise unless every gate passed. A verdict against an older stable proves nothing about this one."""
    if not route.gates:
        raise Refused(
            f"route {route.name!r} has no gates: name suites with `turnout routes gates`, or use force and a reason",
            code="no_gate",
        )
    if not digests.keys() >= set(route.gates):
        raise Conflict(f"route {route.name!r} was changed meanwhile; try again", code="route_moved")
    for suite in route.gates:
        found = await newest_verdict(
            connection, version, suite, digests[suite], baseline=baseline, project_id=route.project_id
        )
        if found is None:
            raise Refused(
                f"{version.name} was not evaluated on {suite!r} as it is now, against {route.stable}, the present stable: "
                f"run `turnout eval run {version.name} --suite {suite}`",
                code="gate_missing",
            )
        if found != Verdict.PASSED:
            raise Refused(f"{version.name} did not pass {suite!r}: the verdict is {found}", code=f"gate_{found}")
