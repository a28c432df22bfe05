"""From the names a person types to a task: data sets and a reward function."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ebpo_core.rewards.text import NAMED_REWARDS, RewardFunction, load_reward
from ebpo_core.tasks import arithmetic, countdown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from datasets import Dataset

BUILT_IN = {"countdown": countdown, "arithmetic": arithmetic}
_FILES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


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
        name: "countdown" or "arithmetic"; a JSON Lines, Parquet or CSV file; a directory written by
            ``Dataset.save_to_disk``; or a hub id. Data sets of one's own need a ``prompt`` column and get their other
            columns passed to the reward function; ``topic`` and ``level`` are reported on if they are there.
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
    builtin = f"a built-in task ({', '.join(BUILT_IN)}), nor "
    data = load_rows("task", name, split, config=config, builtin=builtin)
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


def load_rows(
    argument: str, name: str, split: str, size: int | None = None, *, config: str | None = None, builtin: str = ""
) -> Dataset:
    """Rows from a JSON Lines, JSON, Parquet or CSV file, from what ``Dataset.save_to_disk`` wrote, or from the hub.

    Args:
        argument: What the user calls ``name``, for the errors.
        name: The file, folder or hub id.
        split: Of a hub data set, or of a saved ``DatasetDict``.
        size: How many of the first rows; all by default.
        config: The hub data set's configuration.
        builtin: What else ``name`` could have been, for the errors.

    Raises:
        ValueError: Nothing of that name, or a file of another kind.
    """
    from datasets import DatasetDict, load_dataset, load_from_disk

    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix not in _FILES:
            raise ValueError(f"{argument}={name!r}: a data file must end in one of {sorted(_FILES)}")
        data = load_dataset(_FILES[path.suffix], data_files=str(path), split="train")
    elif (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        data = load_from_disk(str(path))
        data = data[split] if isinstance(data, DatasetDict) else data
    elif not path.exists() and (path.suffix in _FILES or path.is_absolute()):
        raise ValueError(f"{argument}={name!r}: no such file")
    else:
        try:
            data = load_dataset(name, config, split=split)
        except (FileNotFoundError, ConnectionError) as error:
            raise ValueError(
                f"{argument}={name!r}: neither {builtin}a file, nor a data set that the hub gave us ({error})"
            ) from error
    return data if size is None else data.select(range(min(size, len(data))))
