"""``Experts``: the frozen models that a router chooses from, in the order of the route head's rows."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import torch

from .expert import Expert
from .export import copy_experts
from .loading import is_where_it_came_from, load_experts
from .offload import exact_device
from .references import ExpertReference


class Experts(Sequence[Expert]):
    """The experts of a model, in the order of the route head's rows; also found by name.

    They are frozen and shared: a deep copy of a model that holds them holds the same ones.
    """

    def __init__(self, experts: Iterable[Expert] = ()) -> None:
        self._experts = tuple(experts)

    @classmethod
    def load(
        cls,
        experts: Iterable[Any] | Mapping[str, Any],
        *,
        base_dir: str | os.PathLike[str] | None = None,
        revision: str | None = None,
        default_dtype: torch.dtype | str | None = None,
        device: str | torch.device | None = None,
        verify: bool = True,
        trust_remote_code: bool = False,
    ) -> Experts:
        """Load experts.

        Args:
            experts: folders, hub ids, dicts, references or live models, in order; or a mapping from names to these.
                A live model is frozen and used where it is.
            base_dir: the checkpoint the references come from: relative paths are looked up there. A hub id: experts
                that the checkpoint brings along are fetched from it.
            revision: of that hub id.
            default_dtype: of experts whose reference has none; None: as they were saved.
            device: of experts whose reference has none; None: the CPU.
            verify: compare the weights with the hash in the reference, and take their hash where there is none. False
                reads no hash: the reference's is dropped, and taken anew when it is asked for.
            trust_remote_code: run the code that experts' folders bring along, see :mod:`~.remote_code`. Without it an
                expert that needs its own is refused, before any is loaded.

        Raises:
            FileNotFoundError, ImportError, OSError, TypeError, ValueError: with the expert's name and the remedy.
        """
        return cls(
            load_experts(
                experts,
                base_dir=base_dir,
                revision=revision,
                default_dtype=default_dtype,
                device=device,
                verify=verify,
                trust_remote_code=trust_remote_code,
            )
        )

    @property
    def names(self) -> list[str]:
        return [expert.name for expert in self]

    def check_readable(self, ids: torch.Tensor, width: int) -> None:
        """Raise a ValueError for token ids that an expert has neither itself nor by a substitute.

        Args:
            ids: int64, of any shape.
            width: of the router: where no expert has fewer tokens nothing is looked at.
        """
        narrow = [expert for expert in self if any(map(expert.lacks_token, range(expert.width, width)))]
        if not narrow:
            return
        for token in set(ids.flatten().tolist()):
            for expert in narrow:
                if expert.lacks_token(token):
                    raise ValueError(
                        f"input_ids has {token}, which expert {expert.name!r} lacks: pass substitutes={{{token}: an id "
                        "that it has} to from_experts"
                    )

    @property
    def references(self) -> list[ExpertReference]:
        return [expert.reference for expert in self]

    def to(self, device: str | int | torch.device) -> Experts:
        """Move the experts that have no device of their own (offloaded ones will run there). Returns itself."""
        where = exact_device(device)
        for expert in self:
            expert.to(where)
        return self

    def stored(self, checkpoint_dir: str | os.PathLike[str]) -> list[ExpertReference]:
        """References for a checkpoint's config: hashes taken, paths as :meth:`ExpertReference.stored` writes them."""
        for expert in self:
            _ = expert.hash
        return [expert.reference.stored(checkpoint_dir) for expert in self]

    def changed(self) -> list[str]:
        """Names of the experts whose weights in memory are not those that their references lead to."""
        return [each.name for each in self if each.reference.path is not None and not is_where_it_came_from(each)]

    def save_into(self, checkpoint_dir: str | os.PathLike[str]) -> list[ExpertReference]:
        """Copy every expert into ``checkpoint_dir/experts/<name>``; returns references to the copies.

        Files are copied verbatim: weights, configs, tokenizers, licences. A live model is saved with
        ``save_pretrained``. A base model that experts share is copied once.
        """
        return copy_experts(self, Path(checkpoint_dir))

    @overload
    def __getitem__(self, index: int | str) -> Expert: ...
    @overload
    def __getitem__(self, index: slice) -> Experts: ...
    def __getitem__(self, index: int | str | slice) -> Expert | Experts:
        if isinstance(index, slice):
            return Experts(self._experts[index])
        if isinstance(index, str):
            if index not in self.names:
                raise KeyError(f"there is no expert {index!r}: the experts are {self.names}")
            return self._experts[self.names.index(index)]
        return self._experts[index]

    def __len__(self) -> int:
        return len(self._experts)

    def __deepcopy__(self, memo: dict[int, Any]) -> Experts:
        return self

    def __repr__(self) -> str:
        return f"Experts({list(self._experts)})"
