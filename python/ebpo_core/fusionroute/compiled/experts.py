"""``CompiledExperts``: experts that are adapters of the router, in the place of models of their own."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ebpo_core.fusionroute.compat import CACHE
from ebpo_core.fusionroute.decoding.fusing import ExpertLogits, Part
from ebpo_core.fusionroute.decoding.history import NewTokens, new_tokens
from ebpo_core.fusionroute.decoding.routing import RoutingOptions
from ebpo_core.fusionroute.experts.expert import Expert
from ebpo_core.fusionroute.experts.experts import Experts
from ebpo_core.fusionroute.experts.offload import exact_device
from ebpo_core.fusionroute.experts.references import ExpertReference

from .files import changed_weights
from .lending import LendingCache
from .lowrank import LowRank
from .stream import adapted_logits, lending
from .targets import target_modules


class CompiledExpert(Expert):
    """One of :class:`CompiledExperts`. Calling it gives the logits that it has alone, over the whole text.

    Attributes:
        model: the router, which it shares with the others.
        reference: of the expert that it was compiled from.
    """

    def __init__(self, group: CompiledExperts, index: int, reference: ExpertReference) -> None:
        # Not Expert's own: the router is no frozen model of this expert.
        self._group, self._index = group, index
        self.reference = reference
        self.model = group.router
        self.live, self.adapter = False, None
        self._pool = self._switch = self._substitutes = None
        self._lock = nullcontext()
        self.vocab_size = self.width = int(group.router.get_output_embeddings().out_features)

    def __call__(self, **kwargs: Any) -> Any:
        """Its logits, ``[B, K, V]``; takes input_ids, attention_mask, position_ids and logits_to_keep alone.

        The router reads the text first.
        """
        ids: Tensor = kwargs.pop("input_ids")
        mask, positions = kwargs.pop("attention_mask", None), kwargs.pop("position_ids", None)
        keep = kwargs.pop("logits_to_keep", 0)
        if not kwargs.get("use_cache"):
            kwargs.pop("use_cache", None)
        if kwargs:
            raise TypeError(f"a compiled expert alone takes no {', '.join(sorted(kwargs))}: use the whole model")
        new = new_tokens(ids, mask, positions, None)
        cache = self._group.lend(None)
        with torch.no_grad():
            self.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=new.positions,
                use_cache=True,
                logits_to_keep=1,
                **{CACHE: cache},
            )
        wanted = torch.full_like(ids, self._index)
        wanted = wanted[:, -keep:] if isinstance(keep, int) else wanted[:, keep]
        return SimpleNamespace(logits=self._group.logits(cache, new, wanted, keep))

    @property
    def hash(self) -> str:
        """The hash of the weights that it was compiled from."""
        return str(self.reference.hash)

    @property
    def num_parameters(self) -> int:
        """Of its adapter: the router's own are counted as the router's."""
        down, up = self._group.adapters.down, self._group.adapters.up
        return sum(value[0].numel() for tensors in (down, up) for value in tensors.values())

    @property
    def touched(self) -> bool:
        return False

    def lacks_token(self, token: int) -> bool:  # noqa: ARG002
        """False: it reads what the router reads."""
        return False

    def to(self, device: torch.device) -> None:
        """Nothing: it is where the router is."""


class CompiledExperts(Experts):
    """The adapters of all experts of a compiled checkpoint. They are no parameters, and in no state dict.

    Args:
        router: the model that they adapt, unchanged since they were trained.
        adapters: stacked in the order of the references.
        references: of the experts that they were compiled from.
        folder: where their files are, to be copied when the model is saved.
    """

    def __init__(
        self,
        router: Any,
        adapters: LowRank,
        references: Iterable[ExpertReference],
        folder: str | os.PathLike[str],
    ) -> None:
        self.router, self.adapters, self.folder = router, adapters, folder
        self.modules = target_modules(router)
        super().__init__(CompiledExpert(self, i, reference) for i, reference in enumerate(references))

    def lend(self, cache: Cache | None) -> LendingCache:
        """What the router's forward gets in place of ``cache``."""
        return lending(self.router, cache)

    def logits(self, cache: LendingCache, new: NewTokens, ids: Tensor, keep: int | Tensor) -> Tensor:
        """Logits of the adapted stream at the K positions ``keep``, ``[B, K, V_router]``, without gradients.

        Args:
            cache: of :meth:`lend`, which the router's forward of ``new`` went through.
            new: the tokens, S columns, the last of those held.
            ids: the expert of each of the K positions, ``[B, K]``; -1, for none, gives logits that nobody needs.
            keep: as ``logits_to_keep`` of the model's forward.
        """
        self.adapters.to(self.router.device, self.router.dtype)
        S = new.ids.shape[1]
        # As columns: negative ones and a mask, too, are positions of a stock model.
        places = torch.arange(S, device=ids.device)[keep.to(ids.device)] if isinstance(keep, Tensor) else None
        K = ids.shape[1] if places is None else S
        wanted = ids.clamp(min=0)
        if places is not None:
            # Any positions: the stream runs on all, and those that nobody asked for take the first expert.
            wanted = torch.zeros_like(new.ids).index_copy_(1, places, wanted)
        # Not as whole experts, out of a caller's autocast: queries must have the dtype of the router's keys.
        with torch.no_grad():
            logits = adapted_logits(
                self.router,
                self.adapters,
                self.modules,
                cache,
                wanted,
                input_ids=new.ids[:, S - K :],
                attention_mask=new.mask,
                position_ids=new.positions[:, S - K :],
            )
        return logits if places is None else logits[:, places]

    def selected_logits(self, cache: LendingCache, new: NewTokens, ids: Tensor, keep: int | Tensor) -> ExpertLogits:
        """:meth:`logits` where an expert was selected, as one part for all experts."""
        rows, positions = (ids >= 0).nonzero(as_tuple=True)
        if len(rows):
            logits = self.logits(cache, new, ids, keep)[rows, positions]
        else:
            logits = torch.empty(0, self[0].vocab_size, dtype=self.router.dtype, device=ids.device)
        return ExpertLogits((Part(rows, positions, logits),), ids.shape[1])

    def check_unchanged(self, state: Mapping[str, Any]) -> None:
        """Raise a ValueError if a state dict of the model is not that of the files it was loaded from.

        Raises:
            FileNotFoundError: these files are gone.
        """
        changed = changed_weights(self.folder, state)
        if changed:
            raise ValueError(
                f"{changed[0]!r} was changed in memory since it was loaded from {os.fspath(self.folder)!r}, and the "
                "compiled experts are of the router as it was there: load the checkpoint with compiled=False to change "
                "it, and compile again afterwards"
            )

    def to(self, device: str | int | torch.device) -> Experts:
        self.adapters.to(exact_device(device), self.router.dtype)
        return self

    def stored(self, checkpoint_dir: str | os.PathLike[str]) -> list[ExpertReference]:
        return [expert.reference.stored(checkpoint_dir) for expert in self]

    def changed(self) -> list[str]:
        return []

    def save_into(self, checkpoint_dir: str | os.PathLike[str]) -> list[ExpertReference]:  # noqa: ARG002
        raise ValueError(
            "save_experts=True, and the experts are compiled, so none is loaded: load the checkpoint with "
            "compiled=False, or save without save_experts, which keeps the compiled ones"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Experts:
        """The same adapters, of the copied router, whose device and dtype they will follow."""
        return CompiledExperts(copy.deepcopy(self.router, memo), self.adapters.copy(), self.references, self.folder)


def check_options(options: RoutingOptions) -> None:
    """Raise a ValueError for options of caches, which compiled experts do not have."""
    for name, default in (("expert_prefill", "lazy"), ("expert_cache_budget", None)):
        value = getattr(options, name)
        if value != default:
            raise ValueError(
                f"{name}={value!r}, and the experts are compiled: they have no caches of their own; leave it out, or "
                "load the checkpoint with compiled=False"
            )
