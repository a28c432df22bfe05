"""Tiny compiled FusionRoute checkpoints with random adapters, and what their definition makes of them, step by step."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from checkpoints import Answer, save_checkpoint
from fusionroute_tiny import save_tiny_adapter
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from ebpo_core.fusionroute import RoutedToken

RANK, SCALE = 4, 2.0
TARGETS = ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]


def save_compiled(folder: Path, router: str, names: Sequence[str], *, spread: float = 1.0, **options: Any) -> Path:
    """A compiled checkpoint of experts with these names, whose adapters have weights of their own seeds.

    Args:
        folder: where to; the checkpoint is ``folder/fused``, the router ``folder/router``.
        router: its family.
        names: of the experts, Llamas that nothing reads.
        spread: of the route head's weights.
        options: stored defaults of decoding.
    """
    checkpoint = save_checkpoint(folder, router, {name: ("llama", {}) for name in names}, spread=spread, **options)
    model = AutoModelForCausalLM.from_pretrained(folder / "router")
    for seed, name in enumerate(names, start=1):
        settings = {"r": RANK, "lora_alpha": SCALE * RANK, "target_modules": TARGETS}
        target = checkpoint / "compiled" / name
        save_tiny_adapter(target, copy.deepcopy(model), seed, **settings)
        file = target / "adapter_model.safetensors"
        save_file({key: tensor for key, tensor in load_file(file).items() if "base_layer" not in key}, file)
    config = json.loads((checkpoint / "config.json").read_text())
    config["compiled"] = {"rank": RANK, "scale": SCALE, "router": ""}
    (checkpoint / "config.json").write_text(json.dumps(config))
    return checkpoint


class _Borrowed(DynamicCache):
    """The router's keys and values, whatever is written."""

    def __init__(self, cache: DynamicCache) -> None:
        super().__init__()
        self.cache = cache

    def update(self, key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.cache.layers[layer].keys, self.cache.layers[layer].values


@torch.no_grad()
def reference(checkpoint: Path, prompt: Sequence[int], new: int, *, rounding: float = 5e-5) -> Answer:
    """Greedy tokens by the definition: at each step, the whole text through the router and every adapted router."""
    config = json.loads((checkpoint / "config.json").read_text())
    eager = {"attn_implementation": "eager"}  # Gemma 2's soft cap
    router = AutoModelForCausalLM.from_pretrained(checkpoint.parent / "router", **eager)
    head = load_file(checkpoint / "model.safetensors")["route_head.weight"]
    experts = []
    for expert in config["experts"]:
        base = AutoModelForCausalLM.from_pretrained(checkpoint.parent / "router", **eager)
        experts.append(PeftModel.from_pretrained(base, checkpoint / "compiled" / expert["name"]).eval())
    tokens, sure, routing = list(prompt), new, []
    for step in range(new):
        ids, cache = torch.tensor([tokens]), DynamicCache()  # without a config it keeps what a window has passed, too
        out = router(ids, past_key_values=cache, use_cache=True, output_hidden_states=True)
        weights = head @ out.hidden_states[-1][0, -1]
        chosen = int(weights.argmax())
        own = experts[chosen](ids, past_key_values=_Borrowed(cache), use_cache=True).logits[0, -1]
        fused = (out.logits[0, -1] if config["complementary"] else 0) + config["alpha"] * own
        best, scale = fused.topk(2).values, float(fused.abs().max())
        if best[0] - best[1] < 10 * rounding * scale or float(-weights.topk(2).values.diff()) < 10 * rounding:
            sure = min(sure, step)
        tokens.append(int(fused.argmax()))
        share = float(weights.softmax(-1)[chosen])
        routing.append(RoutedToken(tokens[-1], chosen, share, tokens[-1] != int(own.argmax())))
    return Answer(tokens[len(prompt) :], tuple(routing), sure)
