"""From the names a person types to a task: data sets and a reward function."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from ebpo_core.data.rows import load_rows
from ebpo_core.rewards.text import NAMED_REWARDS, RewardFunction, load_reward
from ebpo_core.tasks import arithmetic, countdown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from datasets import Dataset

BUILT_IN = {"countdown": countdown, "arithmetic": arithmetic}


class Task(NamedTuple):
    """A training set, the prompts held out from it (None where none were asked for) and the reward function."""

    train: Dataset
    test: Dataset | None
    reward: RewardFunction


def load_task(
    name: str,
    *,
    train_size: int | None = None,
    test_size: int = 0,
    seed: int = 0,
    test_seed: int = 0,
    topics: Sequence[str] | None = None,
    levels: Sequence[int] | None = None,
    reward: str | None = None,
    config: str | None = None,
    split: str = "train",
) -> Task:
    """Load a task by name.

    Args:
        name: "countdown" or "arithmetic"; or a file, folder or hub id as :func:`ebpo_core.data.load_rows` takes it.
            Data sets of one's own need a ``prompt`` column and get their other columns passed to the reward function;
            ``topic`` and ``level`` are reported on if they are there.
        train_size: Rows to generate (6,000 by default), or to keep of a data set of one's own (all by default).
        test_size: Held-out prompts: of the built-in tasks from their test split, else rows taken out by ``seed``.
        seed: Of the training problems that are generated.
        test_seed: Of the test problems that are generated, or of the choice of held-out rows.
        topics: Of a built-in task; all by default.
        levels: Of a built-in task; all by default.
        reward: ``package.module:function``, "exact" or "integer"; needed for data sets of one's own.
        config: The hub data set's configuration.
        split: The split of a hub data set, or of a saved ``DatasetDict``.

    Raises:
        ValueError: An unknown name, a missing ``prompt`` column or reward, or sizes the data cannot give.
    """
    if name in BUILT_IN:
        task = BUILT_IN[name]
        clusters: dict[str, Any] = {}
        if topics:
            clusters["topics"] = topics
        if levels:
            clusters["levels"] = levels
        return Task(
            train=task.dataset(6000 if train_size is None else train_size, seed=seed, split="train", **clusters),
            test=task.dataset(test_size, seed=test_seed, split="test", **clusters) if test_size else None,
            reward=load_reward(reward) if reward else task.reward,
        )
    if reward is None:
        raise ValueError(
            f"task={name!r}: a data set of your own needs --reward package.module:function, "
            f"or one of {sorted(NAMED_REWARDS)}"
        )
    if topics or levels:
        raise ValueError(f"task={name!r}: topics and levels choose among the clusters of {sorted(BUILT_IN)}")
    data = load_rows("task", name, split, config=config)
    if "prompt" not in data.column_names:
        raise ValueError(f"task={name!r}: no column named 'prompt' among {data.column_names}; rename one")
    if test_size + 1 > len(data):
        raise ValueError(f"task={name!r}: {len(data)} rows cannot give {test_size} held-out prompts")
    test = None
    if test_size:
        parts = data.train_test_split(test_size=test_size, seed=test_seed)
        data, test = parts["train"], parts["test"]
    if train_size is not None:
        data = data.select(range(min(train_size, len(data))))
    return Task(data, test, load_reward(reward))
