"""What the demo's customers write: phrasings of each intent (`phrasings.yaml`), cues of each urgency, and the products."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

Intent = Literal["track", "cancel", "return", "defect", "address", "invoice"]
Urgency = Literal["low", "normal", "high"]


@dataclass(frozen=True)
class Phrasings:
    """How one intent is put into words."""

    known: tuple[str, ...]
    unseen: tuple[str, ...]


PHRASINGS: dict[Intent, Phrasings] = {
    intent: Phrasings(tuple(found["known"]), tuple(found["unseen"]))
    for intent, found in yaml.safe_load(Path(__file__).with_name("phrasings.yaml").read_text()).items()
}

CUES: dict[Urgency, tuple[str, ...]] = {
    "low": (
        "There is no rush.",
        "Take your time.",
        "No hurry at all.",
        "Whenever you find the time is fine.",
        "It can wait until next month.",
        "This is not urgent.",
    ),
    "normal": (
        "Please let me know this week.",
        "I look forward to your reply.",
        "An answer in the next few days would be good.",
        "Please get back to me.",
        "Thank you for looking into it.",
        "I hope to hear from you soon.",
    ),
    "high": (
        "This is urgent.",
        "I need an answer today.",
        "Please act immediately.",
        "It cannot wait any longer.",
        "Reply within the hour, please.",
        "This is an emergency for us.",
    ),
}

MATERIALS = (
    "oak", "walnut", "bamboo", "steel", "copper", "brass", "glass", "ceramic", "marble", "leather",
    "linen", "cotton", "wool", "velvet", "rattan", "cork", "silver", "black", "white", "green",
)  # fmt: skip

ITEMS = (
    "desk lamp", "bookshelf", "coffee table", "armchair", "mirror", "tea kettle", "wall clock", "bar stool",
    "picture frame", "laundry basket", "fruit bowl", "bedside table", "curtain rod", "cutting board", "flower vase",
    "shoe rack", "door mat", "plant stand", "serving tray", "floor cushion", "candle holder", "storage box",
    "coat stand", "writing desk",
)  # fmt: skip

GREETINGS = ("Hello,", "Hi,", "Good morning,", "Dear team,", "Hi there,", "To whom it may concern,")
