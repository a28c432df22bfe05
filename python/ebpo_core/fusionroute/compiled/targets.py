"""The modules of a router that a compiled expert adapts."""

from __future__ import annotations

from typing import Any

from torch import nn

from ebpo_core.fusionroute.decoding.ragged import windows_of

# Of every layer. Keys and values are the router's own, so their projections are not among them.
OF_A_LAYER = ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
HEAD = "lm_head"


def target_modules(router: Any) -> dict[str, nn.Linear]:
    """The adapted modules by their names in ``router``: q and o projections, MLPs, the LM head, in the model's order.

    Raises:
        ValueError: a family that has other modules, or layers that keep more than keys and values.
    """
    kind, text = router.config.model_type, router.config.get_text_config()
    if windows_of(text) is None:
        raise ValueError(
            f"the router is a {kind!r}, whose layers keep more than keys and values, so no second stream can read "
            "them: choose a router with attention in every layer, or leave the experts uncompiled"
        )
    found = {
        name: module
        for name, module in router.named_modules()
        if name.rpartition(".")[2] in (*OF_A_LAYER, HEAD) and isinstance(module, nn.Linear)
    }
    counts = {leaf: sum(name.rpartition(".")[2] == leaf for name in found) for leaf in (*OF_A_LAYER, HEAD)}
    expected = {**dict.fromkeys(OF_A_LAYER, int(text.num_hidden_layers)), HEAD: 1}
    wrong = [leaf for leaf, count in expected.items() if counts[leaf] != count]
    if wrong or found.get(HEAD) is not router.get_output_embeddings():
        raise ValueError(
            f"the router is a {kind!r}, which lacks linear layers named {', '.join(wrong or [HEAD])} in every layer: "
            "experts are compiled for routers such as Llama, Qwen2, Qwen3, Mistral, Gemma 2 and Gemma 3"
        )
    return found
