"""The whole corpus of odd requests: straight to the gateway in three cuttings, and behind the fronts that people use."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fakes.stack import Stack
from tests.framing.corpus import corpus
from tests.framing.fronts import CLIENTS_AFTER, FRONTS, Front, Seen, running, wrong_after
from tests.framing.rows import open_ended, planted
from tests.framing.wire import Split
from tests.integration.test_framing import MAX_BYTES_ONE_BY_ONE, made_keys, wrong_rows

pytestmark = pytest.mark.long


@pytest.mark.parametrize("split", ["whole", "lines", "bytes"])
async def test_each_odd_request_gets_its_answer_and_nothing_else_is_run(tmp_path: Path, split: Split) -> None:
    async with Stack(tmp_path) as stack:
        rows = corpus(stack.keys["admin"], planted(stack.keys["admin"]))
        assert len(rows) >= 600
        if split == "bytes":
            rows = [row for row in rows if len(row.sent) <= MAX_BYTES_ONE_BY_ONE]

        wrong = await wrong_rows(stack, rows, split)

        assert wrong == []
        made = await made_keys(stack)
        assert [name for name in made if not name.startswith("own-")] == []
        assert len(made) == sum(row.made for row in rows)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("head_first", [False, True], ids=["whole", "head first"])
@pytest.mark.parametrize("front", FRONTS, ids=lambda front: front.name)
async def test_behind_a_front_no_odd_request_reaches_another_client(
    tmp_path: Path, front: Front, *, head_first: bool
) -> None:
    if front.path is None:
        pytest.skip(f"{front.program} is not installed; `make fronts` installs it where that is possible")
    async with Stack(tmp_path) as stack:
        config = stack.server.config
        seen = config.loaded_app = Seen(config.loaded_app)
        key = stack.keys["admin"]
        rows = corpus(key, open_ended())

        wrong = []
        async with running(front, int(stack.url.rpartition(":")[2]), tmp_path) as port:
            for row in rows:
                wrong += await wrong_after(row, port, key, seen, head_first=head_first)

        assert wrong == []
        assert [path for path in seen.paths if "stolen" in path] == []
        assert sum("/clean-" in path for path in seen.paths) >= CLIENTS_AFTER * len(rows)
        assert [name for name in await made_keys(stack) if not name.startswith("own-")] == []
