"""One expert distilled into an adapter of the router: KL(expert || adapted stream) at positions with labels."""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ebpo_core.files import write_bytes
from ebpo_core.fusionroute.compat import CACHE
from ebpo_core.fusionroute.decoding.routing import select
from ebpo_core.fusionroute.experts.expert import Expert
from ebpo_core.fusionroute.router import run_router
from ebpo_core.fusionroute.training.losses import IGNORE
from ebpo_core.fusionroute.training.sequences import TokenSequences

from .beginning import initial_adapter
from .lending import LendingCache
from .lowrank import LowRank
from .stream import adapted_logits, lending
from .targets import target_modules

_BETAS = (0.9, 0.98)
_WARMUP, _LAST = 0.03, 0.02  # of the steps that the learning rate rises; what is left of it at the end
_SHOWN = 0.98  # decay, per step, of the numbers that are shown


@dataclass(frozen=True)
class Distillation:
    """Settings of a compilation.

    Attributes:
        rank: r of every adapter.
        alpha: PEFT's ``lora_alpha``; None: twice the rank.
        steps: optimizer steps of each expert.
        batch_size: sequences of a step.
        learning_rate: of AdamW, at its highest.
        other_weight: weight of positions at which the router selects another expert; 1 where it selects this one.
            Sequences that select it nowhere are read so much less often instead, at full weight: the same objective,
            for less time.
        seed: of the adapters' beginning and of the data's order.
    """

    rank: int = 16
    alpha: float | None = None
    steps: int = 1000
    batch_size: int = 32
    learning_rate: float = 3e-3
    other_weight: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rank", "steps", "batch_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: expected a whole number of at least 1")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed!r}: expected a whole number of at least 0, below 2**32")
        for name in ("alpha", "learning_rate", "other_weight"):
            value = getattr(self, name)
            unset = name == "alpha" and value is None
            if not unset and (isinstance(value, bool) or not isinstance(value, (int, float))):
                raise ValueError(f"{name}={value!r}: expected a number")
        positive = {"learning_rate": self.learning_rate, "alpha": self.lora_alpha}
        for name, number in positive.items():
            if not (math.isfinite(number) and number > 0):
                raise ValueError(f"{name}={number!r}: expected a positive number")
        if not 0 <= self.other_weight <= 1:
            raise ValueError(f"other_weight={self.other_weight!r}: expected 0 to 1, the weight of a selected position")

    @property
    def lora_alpha(self) -> float:
        return 2.0 * self.rank if self.alpha is None else float(self.alpha)

    @property
    def scale(self) -> float:
        """What ``B A x`` is multiplied by."""
        return self.lora_alpha / self.rank


class Shown(NamedTuple):
    """How a distillation goes, averaged over the last steps or so: both at positions that select the expert.

    Attributes:
        kl: KL(expert || adapted), nats.
        agreement: share of positions at which the two have one argmax.
    """

    kl: float
    agreement: float


class Batch(NamedTuple):
    """One batch after the router has read it; the last K columns are those that predict labels, and one more."""

    ids: Tensor  # [B, T]
    mask: Tensor  # [B, T]
    labels: Tensor  # [B, K - 1]: position k predicts labels[:, k]
    selected: Tensor  # [B, K - 1], argmax of the routing weights
    router_logits: Tensor  # [B, K - 1, V]
    cache: LendingCache
    keep: int  # K

    @property
    def labelled(self) -> Tensor:
        """``[B, K - 1]`` bool."""
        return self.labels != IGNORE


@torch.no_grad()
def read_batch(model: Any, sequences: TokenSequences, rows: list[int]) -> Batch:
    """Rows of ``sequences``, after the router has read them and its route head has selected experts."""
    padded = sequences.padded(rows)
    keep = padded.keep
    ids, mask, labels = (torch.from_numpy(part).to(model.device) for part in padded[:3])
    cache = lending(model.router, None)
    logits, hidden, _ = run_router(
        model.router, slice(-keep, None), input_ids=ids, attention_mask=mask, use_cache=True, **{CACHE: cache}
    )
    # As decoding selects, which may hold on to an expert; a draw has no single answer.
    options = replace(model.config.options(), route="argmax")
    selected = select(model._routing_weights(hidden), options, mask=mask.bool())[:, -keep:-1]
    V = model.config.vocab_size
    return Batch(ids, mask, labels[:, 1 - keep :], selected, logits[:, :-1, :V], cache, keep)


def adapted_of(model: Any, adapters: LowRank, modules: dict[str, nn.Linear], batch: Batch, expert: int = 0) -> Tensor:
    """Logits of one adapter, ``[B, K - 1, V]``, with gradients to it."""
    ids = batch.ids[:, -batch.keep :]
    positions = (batch.mask.cumsum(1) - 1).clamp(min=0)[:, -batch.keep :]
    logits = adapted_logits(
        model.router,
        adapters,
        modules,
        batch.cache,
        torch.full_like(ids, expert),
        input_ids=ids,
        attention_mask=batch.mask,
        position_ids=positions,
    )
    return logits[:, :-1, : model.config.vocab_size]


def expert_of(model: Any, expert: Expert, batch: Batch) -> Tensor:
    """Logits of an expert, ``[B, K - 1, V]``."""
    device = expert.device
    out = expert(
        input_ids=batch.ids.to(device),
        attention_mask=batch.mask.to(device),
        logits_to_keep=batch.keep,
        use_cache=False,
    )
    logits: Tensor = out.logits[:, -batch.keep : -1, : model.config.vocab_size]
    return logits.to(batch.ids.device)


def divergence(target: Tensor, student: Tensor) -> Tensor:
    """KL(softmax(target) || softmax(student)) in nats, ``[...]`` from ``[..., V]`` twice; tokens that the target
    cannot write (minus infinity) add nothing. Float32, or float64 for such logits."""
    wide = torch.promote_types(student.dtype, torch.float32)
    p = target.to(wide).softmax(-1)
    kl: Tensor = -(p * student.to(wide).log_softmax(-1)).sum(-1) - torch.special.entr(p).sum(-1)
    return kl


class Distiller:
    """The training of one adapter, from the last state that was saved.

    Args:
        model: with its experts; its router is frozen and stays as it is.
        index: of the expert.
        sequences: the data.
        settings: of the compilation.
        selects: ``[rows]`` bool, the sequences that select the expert somewhere; None: found out first.
        state: file of the training's state, written by :meth:`save` and read if it is there.
    """

    def __init__(
        self,
        model: Any,
        index: int,
        sequences: TokenSequences,
        settings: Distillation,
        selects: NDArray[np.bool_] | None = None,
        state: Path | None = None,
    ) -> None:
        self.selects = selecting(model, sequences)[:, index] if selects is None else selects
        self.model, self.index, self.sequences, self.settings = model, index, sequences, settings
        self.modules = target_modules(model.router)
        self.state_file = state
        # A training that goes on has its adapter from the state.
        stored = state if state is not None and state.is_file() else None
        teacher = None if stored else model.experts[index]
        seed = settings.seed * 1_000_003 + index
        self.down, self.up = initial_adapter(self.modules, settings.rank, settings.scale, seed, teacher)
        # Beside a router in half precision, adapters are trained in float32.
        dtype = torch.promote_types(model.router.dtype, torch.float32)
        for tensors in (self.down, self.up):
            for name, value in tensors.items():
                tensors[name] = nn.Parameter(value.to(model.device, dtype))
        self.parameters: dict[str, Any] = {f"down.{name}": value for name, value in self.down.items()}
        self.parameters |= {f"up.{name}": value for name, value in self.up.items()}
        self.optimizer = torch.optim.AdamW(
            list(self.parameters.values()), lr=settings.learning_rate, betas=_BETAS, weight_decay=0.0
        )
        self.step = 0
        self._shown = torch.zeros(3)  # decayed sums: KL, agreement, count
        if stored:
            self._load(stored)

    def run(self, on_step: Callable[[int, Shown], None] = lambda _step, _shown: None, save_every: int = 0) -> None:
        """All steps that are left; ``on_step`` gets their number, and the state is saved every so many."""
        total = self.settings.steps
        batches = batches_from(self.selects, self.settings, self.step)
        while self.step < total:
            self._one(next(batches))
            self.step += 1
            if save_every and self.step % save_every == 0 and self.step < total:
                self.save()
            on_step(self.step, self.shown)

    @property
    def shown(self) -> Shown:
        kl, agreement, count = self._shown.tolist()
        return Shown(kl / count, agreement / count) if count else Shown(math.nan, math.nan)

    def _one(self, rows: list[int]) -> None:
        batch = read_batch(self.model, self.sequences, rows)
        target = expert_of(self.model, self.model.experts[self.index], batch)
        adapters = LowRank(
            {name: value[None] for name, value in self.down.items()},
            {name: value.T[None] * self.settings.scale for name, value in self.up.items()},
        )
        student = adapted_of(self.model, adapters, self.modules, batch)
        where = batch.labelled
        mine = (batch.selected == self.index)[where]
        seldom = ~torch.from_numpy(self.selects[rows]).to(where.device)[:, None].expand_as(where)[where]
        weight = torch.where(mine | seldom, 1.0, self.settings.other_weight)
        kl = divergence(target[where], student[where])
        # A batch in which the router selects this expert nowhere may have no weight at all.
        loss = (kl * weight).sum() / weight.sum().clamp(min=1e-6)
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * rate(self.step, self.settings.steps)
        self.optimizer.step()
        with torch.no_grad():
            same = (target[where].argmax(-1) == student[where].argmax(-1))[mine]
            now = torch.stack([kl[mine].sum(), same.sum(), mine.sum(), norm]).float().cpu()
        if not bool(now.isfinite().all()):
            who = f"expert {self.model.experts[self.index].name!r}, step {self.step}"
            if not bool(target[where].softmax(-1).isfinite().all()):
                raise FloatingPointError(
                    f"{who}: its own logits are no numbers: give it a wider dtype, in which they do not overflow, or "
                    "weights that are not broken"
                )
            raise FloatingPointError(
                f"{who}: the loss or its gradient is no finite number: give a lower learning_rate (it is "
                f"{self.settings.learning_rate}) or alpha (it is {self.settings.lora_alpha})"
            )
        self._shown = _SHOWN * self._shown + now[:3]

    def save(self) -> None:
        """Write adapter, optimizer and step, whole or not at all."""
        if self.state_file is None:
            return
        tensors = {f"parameter.{name}": value.detach() for name, value in self.parameters.items()}
        for name, value in self.parameters.items():
            for key, entry in self.optimizer.state[value].items():
                tensors[f"{key}.{name}"] = entry
        tensors["shown"] = self._shown
        contiguous = {name: value.cpu().contiguous() for name, value in tensors.items()}
        self.state_file.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(self.state_file, save(contiguous, {"step": str(self.step)}))

    def _load(self, file: Path) -> None:
        try:
            with safe_open(file, "pt") as opened:
                self.step = int(opened.metadata()["step"])
            stored = load_file(file)
        except SafetensorError as error:
            raise ValueError(
                f"{str(file)!r} is no state of a training ({error}): remove it, then this expert begins anew"
            ) from error
        self._shown = stored["shown"]
        with torch.no_grad():
            for name, value in self.parameters.items():
                value.copy_(stored[f"parameter.{name}"])
                entries = {key: stored[f"{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
                self.optimizer.state[value] = {
                    key: entry if key == "step" else entry.to(value.device) for key, entry in entries.items()
                }


def selecting(model: Any, sequences: TokenSequences, tokens: int = 8192) -> NDArray[np.bool_]:
    """``[rows, n]`` bool: which experts the router selects at some label of a sequence."""
    found = np.zeros((len(sequences), len(model.experts)), dtype=bool)
    for rows in sequences.batches(range(len(sequences)), tokens):
        batch = read_batch(model, sequences, rows)
        for index in range(found.shape[1]):
            found[rows, index] = ((batch.selected == index) & batch.labelled).any(1).cpu().numpy()
    return found


def batches_from(selects: NDArray[np.bool_], settings: Distillation, step: int) -> Iterator[list[int]]:
    """Batches of row numbers from a step on: pass after pass over the data, each in an order of its own.

    A pass has all rows that select the expert, and of the others a share of ``other_weight``.
    """
    own, others = np.flatnonzero(selects), np.flatnonzero(~selects)
    share = round(settings.other_weight * len(others))
    if not len(own) + share:  # nothing to learn from but what another expert is selected for
        own = others
    per_pass = len(own) + share
    size = min(settings.batch_size, per_pass)
    epoch, order = -1, own
    while True:
        batch: list[int] = []
        for place in range(step * size, (step + 1) * size):
            if place // per_pass != epoch:
                epoch = place // per_pass
                rng = np.random.default_rng([settings.seed, epoch])
                order = rng.permutation(np.concatenate([own, rng.permutation(others)[:share]]))
            batch.append(int(order[place % per_pass]))
        yield batch
        step += 1


def rate(step: int, steps: int) -> float:
    """The share of the learning rate at a step: up in a straight line, down along a cosine."""
    rise = max(1, round(_WARMUP * steps))
    if step < rise:
        return (step + 1) / rise
    return _LAST + (1 - _LAST) * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))
