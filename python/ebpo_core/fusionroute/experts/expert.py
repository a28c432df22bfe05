"""``Expert`` and ``Experts``: the frozen models a router chooses from, loaded, placed, shared and locked."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import torch
from transformers import PreTrainedModel

from .copies import COMPANIONS, WEIGHT_PATTERNS, copy_experts
from .loading import explained, freeze, load_adapter, load_base, logit_width
from .references import EXPERTS_FOLDER, ExpertReference
from .residency import AdapterSwitch, OffloadPool, exact_device
from .roster import parse_experts
from .weights import COMMIT, FILES, TENSORS, check_hash, commit_hash, kind, sources_hash, tensors_hash


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
        self.model: Any = model
        self.live = live
        self.adapter = adapter
        self.vocab_size = logit_width(model)
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
        """Where its inputs go; of an offloaded expert the device it runs on, wherever it is now."""
        device: torch.device = self._pool.device(self.model) if self._pool else self.model.device
        return device

    @property
    def hash(self) -> str:
        """Of the weights (see :mod:`~.weights`); read once."""
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

        Raises:
            FileNotFoundError, ImportError, OSError, TypeError, ValueError: with the expert's name and the remedy.
        """
        parsed = parse_experts(experts)
        base_dir = base_folder([reference for reference, _ in parsed], base_dir, revision)
        pool, default_device = OffloadPool(), exact_device(device)
        bases: dict[str, _Base] = {}
        plans: list[tuple[ExpertReference, _Base]] = []
        for number, (reference, model) in enumerate(parsed):
            if model is not None:
                bases[f"live {number}"] = base = _Base(reference, model.device, _live(reference.name, model))
            else:
                reference = reference.anchored(base_dir)
                where = default_device if reference.device is None else exact_device(reference.device)
                base = bases.setdefault(_base_key(reference), _Base(reference, where))
                base.has_adapters |= reference.adapter is not None
                base.by_tensors |= verify and (reference.hash or "").startswith(TENSORS)
            plans.append((reference, base))
        return cls(_build(number, *plan, pool, default_dtype, verify) for number, plan in enumerate(plans))

    @classmethod
    def of(cls, models: Sequence[PreTrainedModel], names: Sequence[str] | None = None) -> Experts:
        """Experts from live models; they are frozen, and stay where they are."""
        if names is None:
            return cls.load(models)
        if len(names) != len(models) or len(set(names)) != len(names):
            raise ValueError(f"names are {list(names)} for {len(models)} models: pass one name of its own for each")
        return cls.load(dict(zip(names, models, strict=True)))

    @property
    def names(self) -> list[str]:
        return [expert.name for expert in self]

    @property
    def references(self) -> list[ExpertReference]:
        return [expert.reference for expert in self]

    @property
    def vocab_sizes(self) -> list[int]:
        """Widths of the experts' logits."""
        return [expert.vocab_size for expert in self]

    def num_parameters(self) -> int:
        """Parameters of all experts, those of a shared base model once."""
        models = {id(expert.model): expert.model for expert in self}
        return sum(model.num_parameters() for model in models.values())

    def index_of(self, expert: str | int) -> int:
        """An expert's position, from its name or position (negative ones count from the end).

        Raises:
            ValueError: no such expert.
        """
        if isinstance(expert, str):
            if expert in self.names:
                return self.names.index(expert)
        elif -len(self) <= expert < len(self):
            return expert % len(self)
        raise ValueError(f"there is no expert {expert!r}: the experts are {self.names}")

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


class _Base:
    """A model that one or several references share, and what is made of it once."""

    def __init__(self, reference: ExpertReference, device: torch.device, live: PreTrainedModel | None = None) -> None:
        self.reference = reference
        self.device = device
        self.model = live
        self.live = live is not None
        self.has_adapters = False
        self.by_tensors = False
        self.tensors = ""
        self.switch: AdapterSwitch | None = None

    def loaded(self, pool: OffloadPool, default_dtype: torch.dtype | str | None) -> PreTrainedModel:
        if self.model is None:
            source = self.reference.source()
            self.model = load_base(self.reference, source, default_dtype=default_dtype, device=self.device)
            if self.by_tensors:  # before adapters change the names
                self.tensors = tensors_hash(self.model.state_dict())
            if self.has_adapters:
                self.switch = AdapterSwitch(self.model)
            if self.reference.offload:
                pool.add(self.model, self.device)
        return self.model


def _base_key(reference: ExpertReference) -> str:
    return repr(replace(reference, name="", adapter=None, adapter_revision=None, hash=None, vocab_size=None))


def _build(
    number: int,
    reference: ExpertReference,
    base: _Base,
    pool: OffloadPool,
    default_dtype: torch.dtype | str | None,
    verify: bool,
) -> Expert:
    recorded = reference.hash if verify else None
    reference = replace(reference, hash=recorded)
    if base.live:
        return Expert(reference, base.loaded(pool, default_dtype), live=True)
    source, adapter_source = reference.source(), reference.adapter_source()
    with explained(reference.name):
        recorded_kind = None if recorded is None else kind(recorded)
        if recorded is not None and recorded_kind == FILES and source.folder is not None:
            check_hash(reference.name, recorded, sources_hash(source, adapter_source))
    model = base.loaded(pool, default_dtype)
    adapter = None
    if adapter_source is not None:
        adapter = f"expert_{number}"  # a name of torch's modules, which an expert's need not be
        load_adapter(model, reference.name, adapter, adapter_source)
    with explained(reference.name):
        if recorded_kind == TENSORS:
            check_hash(reference.name, str(recorded), base.tensors)
        elif recorded_kind == COMMIT:
            check_hash(reference.name, str(recorded), commit_hash(source, adapter_source))
        elif verify:
            found = sources_hash(source, adapter_source)
            check_hash(reference.name, recorded or found, found)
            reference = replace(reference, hash=found)
    return Expert(reference, model, adapter=adapter, switch=base.switch, pool=pool if reference.offload else None)


def _live(name: str, model: PreTrainedModel) -> PreTrainedModel:
    if hasattr(model, "peft_config"):
        raise ValueError(
            f"expert {name!r} is a live model with adapters: pass a dict with path and adapter, or merge the adapter"
        )
    freeze(model)
    return model


def base_folder(
    references: Sequence[ExpertReference], base_dir: str | os.PathLike[str] | None, revision: str | None
) -> Path | None:
    """The local folder that relative paths are looked up in; of a checkpoint on the hub, with its own experts in it."""
    if base_dir is None or Path(base_dir).is_dir():
        return None if base_dir is None else Path(base_dir)
    prefix = f"{EXPERTS_FOLDER}/"
    if not any((path or "").startswith(prefix) for each in references for path in (each.path, each.adapter)):
        return None
    from huggingface_hub import snapshot_download

    # Only what is loaded: no pickles.
    wanted = [f"{prefix}*/{pattern}" for pattern in (*COMPANIONS, *WEIGHT_PATTERNS)]
    return Path(snapshot_download(os.fspath(base_dir), revision=revision, allow_patterns=wanted))
