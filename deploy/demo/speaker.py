"""Who said it? Told by log-probabilities, which noise moves by tenths of a nat and another adapter by nats.

Texts alone do not tell: on some processors a batch of another size turns a close choice of words, and from there on the
same weights say something else. So answers are compared token by token for as long as they agree, and at the token where
they part: up to there both were computed after the very same words.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import median

# What an answer must differ from its own version's by, in nats, and how much nearer another's must be, to be laid to that.
CLEARLY_NATS = 1.0
_NEARER = 0.5
_LIKELIEST = 3

Position = tuple[
    str, Mapping[str, float]
]  # the token that was said, and the likeliest ones with their log-probabilities
Spoken = Sequence[Position]


def distance(one: Spoken, other: Spoken) -> float:
    """Nats between two answers to the same prompt: the most of any position whose words before are the same."""
    most = 0.0
    for (said, here), (also_said, there) in zip(one, other, strict=False):
        most = max(most, _gap(here, there))
        if said != also_said:
            break
    return most


def _gap(here: Mapping[str, float], there: Mapping[str, float]) -> float:
    """Median difference of the likeliest tokens; one that is not listed is at most as likely as the last that is."""
    tokens = {token for known in (here, there) for token in sorted(known, key=lambda t: -known[t])[:_LIKELIEST]}
    least_here, least_there = min(here.values()), min(there.values())
    return median(abs(here.get(token, least_here) - there.get(token, least_there)) for token in tokens)


class KnownAnswers:
    """What each version says to each prompt, learned while it was the only one that could answer."""

    def __init__(self) -> None:
        self._said: dict[str, dict[int, list[Spoken]]] = defaultdict(lambda: defaultdict(list))

    def learn(self, version: str, prompt: int, spoken: Spoken) -> None:
        """Remember an answer that `version` alone can have given."""
        if spoken:
            self._said[version][prompt].append(spoken)

    def contradicts(self, version: str, prompt: int, spoken: Spoken) -> bool:
        """Whether an answer is far from what this version says to the prompt, and near to what another one does."""
        if not spoken or prompt not in self._said[version]:
            return False
        own = self._nearest(version, prompt, spoken)
        others = (self._nearest(other, prompt, spoken) for other in self._said if other != version)
        return own > CLEARLY_NATS and any(theirs < _NEARER * own for theirs in others)

    def tells_apart(self, prompts: Iterable[int]) -> list[int]:
        """The prompts that all versions answer, each clearly in another way than the others."""
        return [prompt for prompt in prompts if self._separates(prompt)]

    def _separates(self, prompt: int) -> bool:
        said = [known[prompt] for known in self._said.values() if prompt in known]
        pairs = [(one, other) for place, one in enumerate(said) for other in said[place + 1 :]]
        return len(said) == len(self._said) > 1 and all(
            distance(mine, theirs) > CLEARLY_NATS for one, other in pairs for mine in one for theirs in other
        )

    def _nearest(self, version: str, prompt: int, spoken: Spoken) -> float:
        known = self._said[version].get(prompt, ())
        return min((distance(spoken, one) for one in known), default=float("inf"))
