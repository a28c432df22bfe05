"""A curriculum for TRL's GRPO-like trainers: put :class:`CurriculumMixin` in front of ``EBPOTrainer`` or another.

::

    class Trainer(CurriculumMixin, EBPOTrainer): ...

    Trainer(..., train_dataset=data, curriculum=Curriculum("topic"))

Each generation batch then holds prompts in the curriculum's order, repeated as TRL needs it. TRL's own
``shuffle_dataset`` has no effect beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ebpo_core.curriculum.samplers import CurriculumSampler, Order

# The mixin's base is whatever trainer it is put in front of; type checkers see one with every attribute.
_Base: Any = object


@dataclass(frozen=True)
class Curriculum:
    """An order by columns of the data set.

    Attributes:
        order: See :class:`~ebpo_core.curriculum.samplers.CurriculumSampler`.
        topics: The column of the topic orders.
        pass_rates: The column of "easy_to_hard".
        seed: None takes the trainer's.
    """

    order: Order
    topics: str = "topic"
    pass_rates: str = "pass_rate"  # noqa: S105 -- a rate, no password
    seed: int | None = None

    def sampler(self, dataset: Any, batch_size: int, seed: int) -> CurriculumSampler:
        """The sampler over ``dataset``, in whole batches of ``batch_size`` prompts.

        Raises:
            TypeError: The data set has no length.
            ValueError: It lacks the column, or has fewer rows than a batch.
        """
        if not hasattr(dataset, "__len__"):
            raise TypeError(f"train_dataset is a {type(dataset).__name__} without a length: a curriculum needs one")
        size = len(dataset)
        if size < batch_size:
            raise ValueError(f"train_dataset has {size} rows, fewer than the {batch_size} prompts of one batch")
        columns: dict[str, Any] = {}
        wanted = {"topics": self.order.startswith("topic"), "pass_rates": self.order == "easy_to_hard"}
        for name in [name for name, needed in wanted.items() if needed]:
            column = getattr(self, name)
            if column not in dataset.column_names:
                raise ValueError(
                    f"order={self.order!r} needs the column {column!r}, the data set has {dataset.column_names}: "
                    f"name another with Curriculum({name}=...), or make one with `ebpo curriculum`"
                )
            columns[name] = list(dataset[column])
        return CurriculumSampler(
            size,
            self.order,
            **columns,
            batch_size=batch_size,
            seed=seed if self.seed is None else self.seed,
            drop_last=True,
        )


class RepeatedCurriculum:
    """The indices of TRL's ``RepeatSampler``, over the order of a curriculum.

    Every batch of ``batch_size`` prompts comes ``repeats`` times in a row, in it each prompt ``group_size`` times; a
    smaller last batch is left out. It is the same on every rank: accelerate splits it.

    Args:
        sampler: With the same ``batch_size``, ``drop_last`` and one rank.
        group_size: Completions a prompt (TRL's ``num_generations``).
        repeats: Micro-batches that use one generation batch (``steps_per_generation * num_iterations``).
    """

    def __init__(self, sampler: CurriculumSampler, group_size: int, repeats: int) -> None:
        self.sampler, self.group_size, self.repeats = sampler, group_size, repeats

    def __iter__(self) -> Iterator[int]:
        size = self.sampler.batch_size
        plan = self.sampler.plan().tolist()
        for start in range(0, len(plan), size):
            for _ in range(self.repeats):
                for index in plan[start : start + size]:
                    for _ in range(self.group_size):
                        yield index

    def __len__(self) -> int:
        return len(self.sampler) * self.group_size * self.repeats

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's loaders at the start of each epoch."""
        self.sampler.set_epoch(epoch)


class CurriculumMixin(_Base):  # type: ignore[misc]
    """Put in front of a GRPO-like trainer of TRL, its prompts come in the order of ``curriculum``.

    A run resumed from a checkpoint, in any epoch, goes on in the order of the unbroken one.

    Args:
        curriculum: The order; None leaves TRL's.
    """

    def __init__(self, *args: Any, curriculum: Curriculum | None = None, **kwargs: Any) -> None:
        self.curriculum = curriculum
        self._curriculum_sampler: RepeatedCurriculum | None = None
        super().__init__(*args, **kwargs)
        if curriculum is not None:
            self._get_train_sampler()  # a column that is missing is an error now, not after the model was moved

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        if self.curriculum is None:
            return super()._get_train_sampler(dataset)
        # TRL may have dropped columns it does not need from what it passes here; the rows are the same.
        batch_size = self.args.generation_batch_size // self.num_generations
        sampler = self.curriculum.sampler(self.train_dataset, batch_size, self.args.seed)
        repeats = self.num_iterations * self.args.steps_per_generation
        self._curriculum_sampler = RepeatedCurriculum(sampler, self.num_generations, repeats)
        return self._curriculum_sampler

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        # The loader that skips what was trained on does not hand the epoch on to the sampler on every number of ranks.
        if checkpoint is not None and self._curriculum_sampler is not None:
            self._curriculum_sampler.set_epoch(int(self.state.epoch or 0))
