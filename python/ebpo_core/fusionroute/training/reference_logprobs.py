"""Sums of log π_ref over completions: computed once by the starting router, and kept beside the run.

One file per data set, ``reference-<name>.safetensors``, with ``sums`` float32 ``[pairs, 2]`` (chosen, rejected). Its
metadata names the router, the data and V it was made from, so that a run that goes on later with another starting model
notices.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open

from ebpo_core.files import write_arrays
from ebpo_core.fusionroute.experts.hashes import tensors_hash

from .cache_build import OnChange
from .losses import label_logprobs
from .ranks import gather, on_main, world
from .sequences import PreferencePairs

Forward = Callable[..., Any]


def reference_sums(
    file: Path,
    pairs: PreferencePairs,
    model: Any,
    forward: Forward,
    *,
    vocab_size: int,
    device: torch.device | None = None,
    on_change: OnChange = "raise",
    batch_tokens: int = 8192,
) -> NDArray[np.float32]:
    """Read the sums from ``file``, or compute and write them; ``[pairs, 2]`` float32 on every rank.

    Every rank of a torch process group must call this; each computes a share. Ranks whose weights are not those of rank
    0 (they are filled later, as FSDP's ``cpu_ram_efficient_loading`` does) compute nothing.

    Args:
        file: where they are kept.
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
    """
    made_from = {
        "router": router_hash(model, pairs),
        "data": pairs.sequences.fingerprint,
        "vocab_size": str(vocab_size),
    }
    routers = gather(made_from["router"])
    made_from["router"] = routers[0]
    found: NDArray[np.float32] | None = on_main(lambda: _read(file, made_from, on_change))
    if found is not None:
        return found
    workers = [rank for rank, router in enumerate(routers) if router == routers[0]]
    rank, _ = world()
    mine = range(len(pairs.sequences))[workers.index(rank) :: len(workers)] if rank in workers else range(0)
    sums = np.zeros(len(pairs.sequences), dtype=np.float32)
    for share in gather(_compute(pairs, mine, model, forward, device or model.device, batch_tokens)):
        sums[list(share)] = list(share.values())
    on_main(lambda: write_arrays(file, {"sums": sums.reshape(-1, 2)}, made_from))
    return sums.reshape(-1, 2)


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
    """Whether the model computes the same, bit for bit, with its adapter disabled."""
    training = model.training
    model.eval()
    ids = torch.from_numpy(pairs.sequences.padded([0]).input_ids).to(model.device)
    outputs = []
    for context in (nullcontext, model.disable_adapter):
        with context():
            outputs.append(model(input_ids=ids, router_only=True, use_cache=False).logits)
    model.train(training)
    return torch.equal(*outputs)


def _read(file: Path, made_from: dict[str, str], on_change: OnChange) -> NDArray[np.float32] | None:
    if not file.exists():
        return None
    with safe_open(file, framework="np") as opened:
        reader: Any = opened
        stored: dict[str, str] = reader.metadata() or {}
        if stored == made_from:
            sums: NDArray[np.float32] = reader.get_tensor("sums")
            return sums
    if on_change == "rebuild":
        return None
    words = {
        "router": "the router (the run began with another model: pass the model of the SFT phase, not a checkpoint)",
        "data": "the preference pairs",
        "vocab_size": "vocab_size",
    }
    changed = [words[name] for name in made_from if stored.get(name) != made_from[name]]
    raise ValueError(
        f"{str(file)!r} holds reference log-probabilities of something else; changed since: {', '.join(changed)}. "
        "Use another output_dir, or on_change='rebuild' to replace them"
    )


@torch.no_grad()
def _compute(
    pairs: PreferencePairs, indices: range, model: Any, forward: Forward, device: torch.device, batch_tokens: int
) -> dict[int, float]:
    training, home = model.training, model.device
    model.eval()
    # Not the model's own `to`, which would move the experts too.
    if len(indices) and home != device:
        torch.nn.Module.to(model, device)
    sums: dict[int, float] = {}
    for batch in pairs.sequences.batches(indices, batch_tokens):
        ids, mask, labels, keep = pairs.sequences.padded(batch)
        logits = forward(
            input_ids=torch.from_numpy(ids).to(device),
            attention_mask=torch.from_numpy(mask).to(device),
            router_only=True,
            use_cache=False,
            logits_to_keep=keep,
        ).logits[:, :-1]
        wanted = torch.from_numpy(np.ascontiguousarray(labels[:, 1 - keep :])).to(device)
        sums |= zip(batch, label_logprobs(logits, wanted).sum(dim=1).tolist(), strict=True)
    if len(indices) and home != device:
        torch.nn.Module.to(model, home)
    model.train(training)
    return sums
