"""Sticky assignment: the same key gets the same arm, on every gateway, for as long as the weights stand. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from hashlib import blake2b


def assign(salt: str, unit: str, variants: Sequence[tuple[str, int]]) -> str:
    """The target that serves `unit`, a pure function of its arguments.

    Weighted rendezvous hashing (Thaler & Ravishankar 1998; weights by the logarithmic method): each target draws
    u in (0, 1) from (salt, unit, target) and the largest -weight / ln(u) wins. A target wins with probability
    weight / sum, and changing one weight moves units only to or from that target.

    `variants` are (target, weight) pairs, at least one of them with a positive weight.
    """
    best, best_score = "", -1.0
    for target, weight in variants:
        if weight <= 0:
            continue
        drawn = blake2b(f"{salt}\x00{unit}\x00{target}".encode(), digest_size=8).digest()
        u = (int.from_bytes(drawn, "big") + 0.5) / 2**64
        score = -weight / math.log(u)
        if score > best_score:
            best, best_score = target, score
    if not best:
        raise ValueError("no variant has a positive weight")
    return best
