"""The recipes: one method each. A recipe's module is heavy, so it is loaded when it is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import Protocol, cast

from ..config import SFTConfig
from ..models import OnProgress, Places, Trained

RECIPES = {"sft": "trainer.recipes.sft"}


class Recipe(Protocol):
    """Train as the config says; leave a bundle."""

    def __call__(self, config: SFTConfig, places: Places, on_progress: OnProgress) -> Trained:
        """Raises `TrainingError` with a reason code when it cannot."""
        ...


def load_recipe(name: str) -> Recipe:
    """The recipe's function."""
    return cast("Recipe", import_module(RECIPES[name]).train)
