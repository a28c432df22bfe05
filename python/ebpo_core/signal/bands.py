"""Bands of prompts by how hard they were, and what rollouts spent on each would buy."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ebpo_core.signal.expectation import SIZES, Expectation, dead_chance
from ebpo_core.signal.groups import Groups


class Band(NamedTuple):
    """Prompts whose mean reward, on a scale from the file's lowest to its highest, lies in one range.

    Attributes:
        name: What the band is.
        prompts: Number of prompts.
        share: Share of all prompts.
        informative: Expected share of informative groups at the file's best group size, for these prompts, by the
            fitted distribution and what each of them has shown.
        signal: Their signal per rollout at that size.
        relative: That divided by the mean over all prompts.
        best_size: The group size that buys most signal per rollout for these prompts alone.
    """

    name: str
    prompts: int
    share: float
    informative: float
    signal: float
    relative: float
    best_size: int


NAMES = ("always lowest", "below 1/4", "1/4 to 3/4", "above 3/4", "always highest")


def find_bands(groups: Groups, expectation: Expectation) -> tuple[Band, ...]:
    """The bands that hold prompts, hardest first; nothing where all rewards are equal."""
    if groups.highest == groups.lowest:
        return ()
    prompt_of = np.unique(groups.prompts, return_inverse=True)[1].reshape(-1)
    visits = np.bincount(prompt_of)
    rewards = np.bincount(prompt_of, groups.sizes)
    # A prompt's mean over all its completions, from 0 to 1
    scaled = (groups.means - groups.lowest) / (groups.highest - groups.lowest)
    rate = np.bincount(prompt_of, scaled * groups.sizes) / rewards
    # The mean of many equal rewards may miss them by a rounding error.
    rate = np.where(rate < 1e-12, 0.0, np.where(rate > 1 - 1e-12, 1.0, rate))
    place = np.select([rate == 0, rate < 0.25, rate < 0.75, rate < 1], [0, 1, 2, 3], 4)

    # (sizes, prompts)
    dead = np.stack([np.bincount(prompt_of, dead_chance(groups, expectation.rates, size)) / visits for size in SIZES])
    size = np.array(SIZES)[:, None]
    signal = (1 - 1 / size) * (1 - dead) / size
    at_best = SIZES.index(expectation.best_size)
    everywhere = float(signal[at_best].mean())
    bands = []
    for number, name in enumerate(NAMES):
        mine = place == number
        if not mine.any():
            continue
        own = float(signal[at_best, mine].mean())
        bands.append(
            Band(
                name=name,
                prompts=int(mine.sum()),
                share=float(mine.mean()),
                informative=float(1 - dead[at_best, mine].mean()),
                signal=own,
                relative=own / everywhere if everywhere > 0 else 0.0,
                best_size=SIZES[int(signal[:, mine].mean(axis=1).argmax())],
            )
        )
    return tuple(bands)
