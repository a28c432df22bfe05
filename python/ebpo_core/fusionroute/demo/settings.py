"""Sizes and steps of the demo, what was chosen, and why.

Each expert is trained until it knows its domain, alone and in pairs (sums take longer), and forgets the others
meanwhile. None sees a mixed problem, so mixed problems are a domain that no expert covers well: there an expert's
answer to its own question is often right but not always, and no single expert can answer both. The router starts from
the base model, which has learned to shift letters, hardly to reverse them and not to add, and takes less than half of
the experts' steps for everything: enough for the form of answers, reversal and shifting, not enough for addition. So
routing alone should answer what one expert knows, the router's own logits should matter in mixed problems, and a
fine-tuned model without experts should lack addition.

Sizes, steps and rates were set on the seeds 100 to 102, not on the default one, for a run of some minutes, experts
that do learn to add, and mixed accuracies that are neither 0 nor 1. Preference pairs are answers sampled from the
model that is about to be trained: what it got wrong is rejected, and where it was right, a corrupted answer is. "SFT,
as many steps" goes on with SFT for the steps of mix training, so that steps alone can be told from what preferences
add. Sequence selection takes the answer that the fine-tuned model finds most likely; "by an oracle" is told which
answer is right, and is the most that any judge of whole answers could reach.
"""

from __future__ import annotations

from dataclasses import dataclass

from .domains import DOMAINS
from .experts import Course


@dataclass(frozen=True)
class Settings:
    """Sizes of the models, and how long each is trained. Mix training takes as many pairs as SFT samples a step."""

    hidden_size: int
    base: Course
    experts: dict[str, Course]
    sft: Course
    mix: Course
    test_problems: int
    """Held-out problems of each kind."""
    tuning_problems: int
    """Training problems of each kind on which merging chooses its setting."""
    cpu_threads: int


FULL_SIZE = Settings(
    hidden_size=96,
    base=Course(steps=120, batch_size=64, learning_rate=3e-3),
    experts={
        "add": Course(steps=600, batch_size=64, learning_rate=4e-3),
        "reverse": Course(steps=200, batch_size=64, learning_rate=4e-3),
        "caesar": Course(steps=200, batch_size=64, learning_rate=4e-3),
    },
    sft=Course(steps=300, batch_size=64, learning_rate=1e-3),
    mix=Course(steps=150, batch_size=64, learning_rate=5e-4),
    test_problems=400,
    tuning_problems=100,
    cpu_threads=2,
)
QUICK = Settings(
    hidden_size=48,
    base=Course(steps=30, batch_size=32, learning_rate=3e-3),
    experts=dict.fromkeys(DOMAINS, Course(steps=150, batch_size=32, learning_rate=4e-3)),
    sft=Course(steps=40, batch_size=32, learning_rate=2e-3),
    mix=Course(steps=10, batch_size=32, learning_rate=5e-4),
    test_problems=25,
    tuning_problems=10,
    cpu_threads=1,
)
"""A run that goes through everything in less than a minute and learns to reverse and to shift, not more."""
