"""``Expert``: one frozen model that a router chooses from, run without gradients, from any thread."""

from __future__ import annotations

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


class Expert:
    """One frozen causal LM. Calling it runs the model without gradients, in its own dtype, from any thread.

    Attributes:
        reference: how it was loaded; paths in it do not depend on a checkpoint's folder.
        model: the model, in eval mode. Experts that differ in their adapter alone have the same one.
        adapter: the name of its adapter within ``model``, or None.
        live: whether it was given as a model, not loaded from a reference.
        vocab_size: the width of its logits.
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
        self.vocab_size = _logit_width(model)
        self.reference = replace(reference, vocab_size=self.vocab_size)
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
        """The hash of its weights (see :mod:`~.hashes`); read once."""
        if self.reference.hash is None:
            with explained(self.name):
                found = (
                    tensors_hash(self.model.state_dict())
                    if self.live
                    else sources_hash(self.reference.source(), self.reference.adapter_source())
                )
            self.reference = replace(self.reference, hash=found)
        return str(self.reference.hash)

    def __call__(self, **kwargs: Any) -> Any:
        """The model's forward. Inputs are on :attr:`device`; the output is the model's, without gradients."""
        # An expert computes in the dtype of its reference, also inside a trainer's autocast.
        with self._lock, torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            if self._pool:
                self._pool.bring(self.model)
            if self._switch:
                self._switch.select(self.adapter)
            if self.model.training:
                self.model.eval()  # whoever holds the model may have called train()
            return self.model(**kwargs)

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


def _logit_width(model: Any) -> int:
    """The number of logits a position gets."""
    head = model.get_output_embeddings()
    width = getattr(head, "out_features", None)
    return int(model.config.get_text_config().vocab_size if width is None else width)
