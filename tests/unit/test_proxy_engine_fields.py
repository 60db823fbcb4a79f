"""Every field that the installed engine reads from a request stands on one of our lists."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from gateway.proxy import fields
from gateway.proxy.fields import Endpoint

READ_MODELS = """
import json
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest

def names(model):
    aliases = {alias for field in model.model_fields.values() for alias in (field.alias, field.validation_alias) if isinstance(alias, str)}
    return sorted({*model.model_fields, *aliases})

print("FOUND " + json.dumps({"chat": names(ChatCompletionRequest), "completions": names(CompletionRequest)}))
"""


def unlisted(endpoint: Endpoint, names: list[str]) -> list[str]:
    """Names that stand on no list."""
    listed = {
        *fields.FORWARDED[endpoint],
        *fields.REWRITTEN,
        *fields.READ,
        *fields.SET_BY_GATEWAY,
        *fields.EVALUATORS_ONLY,
    }
    listed |= fields.REFUSED.keys()
    return [name for name in names if name not in listed and not name.startswith(tuple(fields.REFUSED_PREFIXES))]


@pytest.mark.heavy
@pytest.mark.invariant(9)
def test_every_field_of_the_engines_requests_is_on_a_list() -> None:
    done = subprocess.run([sys.executable, "-c", READ_MODELS], capture_output=True, text=True, timeout=300)

    [line] = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")] or pytest.fail(
        done.stderr[-2000:]
    )
    found: dict[Endpoint, list[str]] = json.loads(line.removeprefix("FOUND "))
    assert {endpoint: len(names) > 40 for endpoint, names in found.items()} == {"chat": True, "completions": True}
    assert {endpoint: unlisted(endpoint, names) for endpoint, names in found.items()} == {"chat": [], "completions": []}


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_a_field_that_a_newer_engine_brings_would_be_seen(endpoint: Endpoint) -> None:
    assert unlisted(endpoint, ["temperature", "brand_new"]) == ["brand_new"]


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_no_field_is_on_two_lists(endpoint: Endpoint) -> None:
    lists = [
        fields.FORWARDED[endpoint].keys(),
        fields.REWRITTEN,
        fields.READ.keys(),
        fields.SET_BY_GATEWAY,
        fields.EVALUATORS_ONLY.keys(),
        fields.REFUSED.keys(),
    ]

    assert sum(map(len, lists)) == len(set().union(*lists))
