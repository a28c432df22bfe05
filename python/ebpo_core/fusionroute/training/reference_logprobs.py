"""Reference: sums of log π_ref over completions, computed once by the starting router and kept beside the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from ebpo_core.fusionroute.experts.hashes import tensors_hash

from .columns import Compute, StoredColumns
from .config import FusionRouteArguments
from .expert_cache import annotate
from .preparation import fusion_model
from .ranks import everywhere, on_main, world
from .sequences import PreferencePairs

_WORDS = {
    "router": "the router (the run began with another model: pass the model of the SFT phase, not a checkpoint)",
    "data": "the preference pairs",
}


def reference_sums(
    args: FusionRouteArguments,
    name: str,
    pairs: PreferencePairs,
    model: Any,
    forward: Callable[..., Any],
    *,
    with_adapter: bool = True,
) -> NDArray[np.float32]:
    """The sums of one data set, after computing what is missing of them; ``[pairs, 2]`` float32, chosen and rejected.

    They are kept in ``reference-<name>-<fingerprint>.arrow`` in ``output_dir``, with columns chosen and rejected. Every
    rank of a torch process group must call this; they share the work. Ranks whose weights are not those of rank 0 (they
    are filled later, as FSDP's ``cpu_ram_efficient_loading`` does) compute nothing.

    Args:
        args: the trainer's: where the sums are kept and computed, in batches of how many tokens, ``on_change``.
        name: of the data set.
        pairs: the data.
        model: the starting model: a FusionRoute model, or a PEFT model on one. An adapter that changes something (one
            that is trained further) is part of the reference; one that changes nothing yet is not part of the hash.
        forward: ``model`` as it computes in training (its precision), called with ``router_only=True``.
        with_adapter: False leaves an adapter out that has been trained since; ``forward`` does so too.

    Raises:
        ValueError: sums that were made from something else, with ``on_change="raise"``.
        FloatingPointError: a log-probability of the router that is not finite.
    """
    V = int(fusion_model(model).config.vocab_size or 0)
    routers = everywhere(lambda: router_hash(model, pairs, with_adapter=with_adapter))
    router, own = routers[0], routers[world()[0]]
    columns = {"chosen": pa.float32(), "rejected": pa.float32()}
    made_from = {"router": router, "data": pairs.sequences.fingerprint, "vocab_size": str(V)}
    stored = StoredColumns(Path(str(args.output_dir)), f"reference-{name}", len(pairs), columns, made_from, _WORDS)
    on_main(lambda: stored.settle(args.on_change))

    @contextmanager
    def computing() -> Iterator[Compute]:
        with _evaluating(model, args.device):
            yield compute

    def compute(rows: range) -> Mapping[str, Sequence[Any]]:
        found = annotate(
            partial(forward, router_only=True),
            pairs.sequences,
            range(2 * rows.start, 2 * rows.stop),  # chosen and rejected sides in turn
            name="the router",
            device=args.device,
            vocab_size=V,
            batch_tokens=args.expert_cache_batch_tokens,
        )
        sums = [float(one.logprobs.sum(dtype=np.float64)) for one in found]
        return {"chosen": sums[0::2], "rejected": sums[1::2]}

    found = stored.compute(computing, able=own == router).with_format("numpy")
    return np.stack([found["chosen"][:], found["rejected"][:]], axis=1)


@contextmanager
def _evaluating(model: Any, device: torch.device | None = None) -> Iterator[None]:
    """``model`` in eval mode and on ``device``, and then as it was. Under FSDP it waits on the CPU to be sharded."""
    training, home = model.training, model.device
    moved = device is not None and device != home
    model.eval()
    # Not the model's own `to`, which would move the experts too.
    if moved:
        torch.nn.Module.to(model, device)
    try:
        yield
    finally:
        if moved:
            torch.nn.Module.to(model, home)
        model.train(training)


def router_hash(model: Any, pairs: PreferencePairs, *, with_adapter: bool = True) -> str:
    """Hash of the router that ``model`` computes with: adapters count once they change its outputs, or never."""
    state = fusion_model(model).router.state_dict()
    if hasattr(model, "peft_config") and (not with_adapter or _adapter_is_idle(model, pairs)):
        prefix = f".{model.base_model.prefix}"
        # What is left is what the router was before PEFT wrapped it, under the names it had.
        kept = {name: value for name, value in state.items() if prefix not in name and ".modules_to_save." not in name}
        state = {name.replace(".base_layer", "").replace(".original_module", ""): v for name, v in kept.items()}
    return tensors_hash(state)


@torch.no_grad()
def _adapter_is_idle(model: Any, pairs: PreferencePairs) -> bool:
    """True if the model computes the same, bit for bit, with its adapter disabled."""
    ids = torch.from_numpy(pairs.sequences.padded([0]).input_ids).to(model.device)
    outputs = []
    with _evaluating(model):
        for context in (nullcontext, model.disable_adapter):
            with context():
                outputs.append(model(input_ids=ids, router_only=True, use_cache=False).logits)
    return torch.equal(*outputs)
