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

from ebpo_core.fusionroute.experts.weights import tensors_hash

from .columns import Compute, OnChange, StoredColumns
from .expert_cache import annotate
from .ranks import everywhere, on_main, world
from .sequences import PreferencePairs

_WORDS = {
    "router": "the router (the run began with another model: pass the model of the SFT phase, not a checkpoint)",
    "data": "the preference pairs",
}


def reference_sums(
    folder: Path,
    name: str,
    pairs: PreferencePairs,
    model: Any,
    forward: Callable[..., Any],
    *,
    vocab_size: int,
    device: torch.device | None = None,
    on_change: OnChange = "raise",
    batch_tokens: int = 8192,
) -> NDArray[np.float32]:
    """The sums in ``folder``, after computing what is missing of them; ``[pairs, 2]`` float32, chosen and rejected.

    Every rank of a torch process group must call this; they share the work. Ranks whose weights are not those of rank 0
    (they are filled later, as FSDP's ``cpu_ram_efficient_loading`` does) compute nothing.

    Args:
        folder, name: where they are kept, ``reference-<name>-<fingerprint>.arrow`` with columns chosen and rejected.
        pairs: the data.
        model: the starting model: a FusionRoute model, or a PEFT model on one. An adapter that changes something (one
            that is trained further) is part of the reference; one that changes nothing yet is not part of the hash.
        forward: ``model`` as it computes in training (its precision), called with ``router_only=True``.
        vocab_size: V.
        device: where to compute, by default where the model is. The model is brought there, and back: under FSDP it
            waits on the CPU before it is sharded.
        on_change: what to do with a file of another router or other data: "raise" or "rebuild".
        batch_tokens: tokens of a batch, padding included.

    Raises:
        ValueError: a file that was made from something else, with ``on_change="raise"``.
        FloatingPointError: a log-probability of the router that is not finite.
    """
    routers = everywhere(lambda: router_hash(model, pairs))
    router, own = routers[0], routers[world()[0]]
    columns = {"chosen": pa.float32(), "rejected": pa.float32()}
    made_from = {"router": router, "data": pairs.sequences.fingerprint, "vocab_size": str(vocab_size)}
    stored = StoredColumns(folder, f"reference-{name}", len(pairs), columns, made_from, _WORDS)
    on_main(lambda: stored.settle(on_change))
    run = partial(_computing, pairs, model, forward, device or model.device, vocab_size, batch_tokens)
    found = stored.compute(run, able=own == router).with_format("numpy")
    return np.stack([found["chosen"][:], found["rejected"][:]], axis=1)


@contextmanager
def _computing(
    pairs: PreferencePairs, model: Any, forward: Callable[..., Any], device: Any, vocab_size: int, batch_tokens: int
) -> Iterator[Compute]:
    """The model in eval mode on ``device``, for as long as it computes."""

    def compute(rows: range) -> Mapping[str, Sequence[Any]]:
        found = annotate(
            partial(forward, router_only=True),
            pairs.sequences,
            range(2 * rows.start, 2 * rows.stop),
            name="the router",
            device=device,
            vocab_size=vocab_size,
            batch_tokens=batch_tokens,
        )
        sums = [float(one.logprobs.sum(dtype=np.float64)) for one in found]
        return {"chosen": sums[0::2], "rejected": sums[1::2]}

    training, home = model.training, model.device
    model.eval()
    # Not the model's own `to`, which would move the experts too.
    if home != device:
        torch.nn.Module.to(model, device)
    try:
        yield compute
    finally:
        if home != device:
            torch.nn.Module.to(model, home)
        model.train(training)


def router_hash(model: Any, pairs: PreferencePairs) -> str:
    """Hash of the router that ``model`` computes with: adapters count once they change its outputs."""
    fusion, prefix = model, None
    if hasattr(model, "peft_config"):
        fusion = model.get_base_model()
        prefix = f".{model.base_model.prefix}" if _adapter_is_idle(model, pairs) else None
    state = fusion.router.state_dict()
    if prefix is not None:
        # What is left is what the router was before PEFT wrapped it, under the names it had.
        kept = {name: value for name, value in state.items() if prefix not in name and ".modules_to_save." not in name}
        state = {name.replace(".base_layer", "").replace(".original_module", ""): v for name, v in kept.items()}
    return tensors_hash(state)


@torch.no_grad()
def _adapter_is_idle(model: Any, pairs: PreferencePairs) -> bool:
    """True if the model computes the same, bit for bit, with its adapter disabled."""
    training = model.training
    model.eval()
    ids = torch.from_numpy(pairs.sequences.padded([0]).input_ids).to(model.device)
    outputs = []
    for context in (nullcontext, model.disable_adapter):
        with context():
            outputs.append(model(input_ids=ids, router_only=True, use_cache=False).logits)
    model.train(training)
    return torch.equal(*outputs)
