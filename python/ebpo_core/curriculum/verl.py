"""A curriculum for verl (0.8 and later), which has no sampler option any more: a data set class that sorts itself.

::

    data.custom_cls.path=pkg://ebpo_core.curriculum.verl data.custom_cls.name=CurriculumDataset
    data.shuffle=False
    +data.curriculum.order=topic +data.curriculum.topics=extra_info.topic

verl reads it in sequence (``data.shuffle=False``) and resumes inside it as in any data set. The order is that of the
first epoch in every epoch. A file that ``ebpo curriculum`` wrote in order needs no class at all, only
``data.shuffle=False``.
"""

from __future__ import annotations

from typing import Any

from verl.utils.dataset.rl_dataset import RLHFDataset  # type: ignore[import-not-found, unused-ignore]

from ebpo_core.curriculum.samplers import CurriculumSampler

OPTIONS = {"order": "shuffled", "topics": "topic", "pass_rates": "pass_rate", "seed": 0}


class CurriculumDataset(RLHFDataset):  # type: ignore[misc, unused-ignore]
    """verl's ``RLHFDataset``, its training rows in the order of ``data.curriculum``.

    Options under ``data.curriculum``: ``order`` (see :class:`~ebpo_core.curriculum.samplers.CurriculumSampler`),
    ``topics`` and ``pass_rates`` (names of columns, ``extra_info.topic`` for a field inside one), and ``seed``. The
    topic orders make batches of ``data.train_batch_size`` prompts coherent. Rows that verl filters out are left out
    before the order is made. Validation files stay as they are.

    Raises:
        ValueError: ``data.shuffle`` is on, an unknown option, or a missing column.
    """

    def _read_files_and_tokenize(self) -> None:
        super()._read_files_and_tokenize()
        files = self.config.get("train_files") or []
        training = [files] if isinstance(files, str) else list(files)
        if [str(file) for file in self.original_data_files] == [str(file) for file in training]:
            self.dataframe: Any = self.dataframe.select(self._order())

    def _order(self) -> list[int]:
        given = dict(self.config.get("curriculum") or {})
        unknown = sorted(set(given) - set(OPTIONS))
        if unknown:
            raise ValueError(f"data.curriculum.{unknown[0]}: no such option; there are {', '.join(OPTIONS)}")
        if self.config.get("shuffle", False):
            raise ValueError("data.shuffle=True would undo data.curriculum: set data.shuffle=False")
        options: dict[str, Any] = {**OPTIONS, **given}
        order = options["order"]
        sampler = CurriculumSampler(
            len(self.dataframe),
            order,
            topics=self._column(options["topics"]) if str(order).startswith("topic") else None,
            pass_rates=self._column(options["pass_rates"]) if order == "easy_to_hard" else None,
            batch_size=int(self.config.get("train_batch_size") or 1),
            seed=int(options["seed"]),
        )
        return [int(index) for index in sampler.plan()]

    def _column(self, name: str) -> list[Any]:
        column, *fields = str(name).split(".")
        if column not in self.dataframe.column_names:
            raise ValueError(f"data.curriculum: no column {column!r} among {self.dataframe.column_names}")
        values = list(self.dataframe[column])
        for field in fields:
            if not all(isinstance(value, dict) and field in value for value in values):
                raise ValueError(f"data.curriculum: {name!r}: not every row has the field {field!r}")
            values = [value[field] for value in values]
        return values
