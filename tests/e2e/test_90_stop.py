"""The end of the shared stack: the last test to use it."""

from __future__ import annotations

import signal
import time

import pytest

from deploy.demo.stopping import command_line

from .stack import LONG_STREAM, Stack

pytestmark = pytest.mark.engine


@pytest.mark.invariant(10)
def test_sigterm_drains_and_leaves_no_process(stack: Stack, alpha: str) -> None:
    """The last test of the stack: it ends it."""
    body = LONG_STREAM | {"max_tokens": 150}
    lines: list[str] = []
    assert stack.process is not None
    with stack.http() as client, client.stream("POST", "/v1/chat/completions", json=body) as answer:
        for number, line in enumerate(answer.iter_lines()):
            lines.append(line)
            if number == 2:
                stack.process.send_signal(signal.SIGTERM)

    assert any("[DONE]" in line for line in lines), "the open stream was finished"
    assert stack.process.wait(90) == 0
    deadline = time.monotonic() + 20
    while stack.tree() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [command_line(p) for p in stack.tree()] == []
