"""``Expert``: one frozen model that a router chooses from, run without gradients, from any thread."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from ebpo_core.fusionroute.families import check_config

from .adapters import AdapterSwitch
from .errors import explained
from .hashes import sources_hash, tensors_hash
from .offload import OffloadPool
from .references import ExpertReference
from .substitutes import Substitutes


class Expert:
    """One frozen causal LM. Calling it runs the model without gradients, in its own dtype, from any thread.

    Attributes:
        reference: how it was loaded; paths in it do not depend on a checkpoint's folder.
        model: the model, in eval mode. Experts that differ in their adapter alone have the same one.
        adapter: the name of its adapter within ``model``, or None.
        live: whether it was given as a model, not loaded from a reference.
        vocab_size: the width of its logits, with those of substitutes.
        width: the number of ids that it has itself.
    """

    def __init__(
        self,
        reference: ExpertReference,
        model: Any,
        *,
        adapter: str | None = None,
        switch: AdapterSwitch | None = None,
        pool: OffloadPool | None = None,
        live: bool = False,
    ) -> None:
        check_config(model.config, f"expert {reference.name!r}")
        model.eval()
        model.requires_grad_(False)
        self.model: Any = model
        self.live = live
        self.adapter = adapter
        self.vocab_size = self.width = _logit_width(model)
        self._substitutes: Substitutes | None = None
        self.reference = replace(reference, vocab_size=self.vocab_size)
        self._versions = versions(model)
        if reference.substitutes:
            self.substitute({int(lacking): own for lacking, own in reference.substitutes.items()})
        self._switch, self._pool = switch, pool
        holder = pool or switch
        self._lock: AbstractContextManager[Any] = holder.lock if holder else nullcontext()

    @property
    def name(self) -> str:
        return self.reference.name

    @property
    def config(self) -> Any:
        """The text config of the model."""
        return self.model.config.get_text_config()

    @property
    def device(self) -> torch.device:
        """The device of its inputs; of an offloaded expert the one it runs on, wherever it is now."""
        device: torch.device = self._pool.device(self.model) if self._pool else self.model.device
        return device

    @property
    def hash(self) -> str:
        """The hash of its weights (see :mod:`~.hashes`); read once, but for a live model's, which may have changed."""
        if self.live:
            self.reference = replace(self.reference, hash=tensors_hash(self.model.state_dict()))
        elif self.reference.hash is None:
            with explained(self.name):
                found = sources_hash(self.reference.source(), self.reference.adapter_source())
            self.reference = replace(self.reference, hash=found)
        return str(self.reference.hash)

    @property
    def num_parameters(self) -> int:
        """Of its model, adapter included."""
        return sum(int(parameter.numel()) for parameter in self.model.parameters())

    @property
    def touched(self) -> bool:
        """True if an optimizer, or anything else that torch counts, has written to its weights since it was made."""
        now = versions(self.model)
        return any(now.get(name, version) > version for name, version in self._versions.items())

    def __call__(self, **kwargs: Any) -> Any:
        """The model's forward. Inputs are on :attr:`device`; the output is the model's, without gradients.

        Tokens that it lacks are read as their substitutes, and have their logits.
        """
        if self._substitutes:
            kwargs["input_ids"] = self._substitutes.read(kwargs["input_ids"])
        # An expert computes in the dtype of its reference, also inside a trainer's autocast.
        with self._lock, torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            if self._pool:
                self._pool.bring(self.model)
            if self._switch:
                self._switch.select(self.adapter)
            if self.model.training:
                self.model.eval()  # whoever holds the model may have called train()
            out = self.model(**kwargs)
            if self._substitutes:
                out.logits = self._substitutes.lent(out.logits)
            return out

    def substitute(self, ids: Mapping[int, int]) -> None:
        """Read and score, from now on, tokens that it lacks as others that it has; see :mod:`~.substitutes`.

        Raises:
            ValueError: a substitute that it lacks, too.
        """
        with explained(self.name):
            self._substitutes = Substitutes(ids, self._rows, self.width)
        self.vocab_size = self._substitutes.vocab_size
        named = {str(lacking): own for lacking, own in ids.items()}
        self.reference = replace(self.reference, substitutes=named, vocab_size=self.vocab_size)

    def lacks_token(self, token: int) -> bool:
        """True for an id that it has neither itself nor by a substitute."""
        return token >= self._rows and str(token) not in (self.reference.substitutes or {})

    @property
    def _rows(self) -> int:
        """The number of tokens that its embedding has."""
        return int(getattr(self.model.get_input_embeddings(), "num_embeddings", self.width))

    def to(self, device: torch.device) -> None:
        """Move it, unless its reference has a device of its own."""
        if self.reference.device is not None:
            return
        if self._pool:
            self._pool.move(self.model, device)
        elif self.model.device != device:
            with self._lock, explained(self.name):
                self.model.to(device)

    def __deepcopy__(self, memo: dict[int, Any]) -> Expert:
        return self  # a deep copy of a cache must not copy the models that filled it

    def __repr__(self) -> str:
        return f"Expert({self.name!r}, {type(self.model).__name__}, {self.model.dtype}, {self.device})"


def versions(model: Any) -> dict[str, int]:
    """How often each parameter was written to in place; those of inference mode are not counted."""
    named = model.named_parameters()
    return {name: value._version for name, value in named if not value.is_inference()}


def _logit_width(model: Any) -> int:
    """The number of logits a position gets."""
    head = model.get_output_embeddings()
    width = getattr(head, "out_features", None)
    return int(model.config.get_text_config().vocab_size if width is None else width)
