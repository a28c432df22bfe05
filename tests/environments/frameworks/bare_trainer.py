"""The trainer under test without models, in a module that a process started by Ray can import by itself."""

# ruff: noqa: E402 - what is imported last needs what comes before it
from __future__ import annotations

from typing import Any

import bare_openrlhf

bare_openrlhf.stand_ins()

from openrlhf.trainer import ppo_trainer

from ebpo_core.integrations.contrib import openrlhf


class BareTrainer(openrlhf.EBPOTrainer):
    """As its base, but makes its parts without models."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        bare_openrlhf.without_models(ppo_trainer)
        super().__init__(*args, **kwargs)

    def maker(self) -> str:
        """The class of the experience maker."""
        return type(self.experience_maker).__name__
