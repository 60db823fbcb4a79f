"""What a key's scopes allow."""

from __future__ import annotations

import pytest

from gateway.errors import Forbidden
from gateway.keys import SCOPES, Principal


def a_principal(*scopes: str) -> Principal:
    return Principal("key-1", "tester", "proj_default", frozenset(scopes))


@pytest.mark.parametrize("scope", sorted(SCOPES - {"evaluate"}))
def test_an_admin_may_do_everything_that_is_counted(scope: str) -> None:
    a_principal("admin").require(scope)


def test_an_admin_is_no_evaluator() -> None:
    """What an evaluator asks is neither assigned nor counted, so nobody becomes one by being something else."""
    with pytest.raises(Forbidden, match="evaluate"):
        a_principal("admin").require("evaluate")

    a_principal("evaluate").require("evaluate")


@pytest.mark.parametrize("scope", sorted(SCOPES - {"preview"}))
def test_no_other_scope_implies_another(scope: str) -> None:
    assert a_principal("preview").allows(scope) is False
