"""Tiny FusionRoute checkpoints, what ``generate`` makes of them, and what workers in processes of their own say."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from fusionroute_oracle import settled
from fusionroute_tiny import save_tiny, tiny_tokenizer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ebpo_core.fusionroute import FusionRouteForCausalLM, RoutedToken

VOCAB = 200
WIDE: dict[str, Any] = {"hidden_size": 128, "num_attention_heads": 4, "head_dim": 32}
"""The CPU build's attention takes heads of 32 and more."""

MIXED = {
    "deep": ("llama", {"layers": 3, "num_key_value_heads": 4}),
    "qwen": ("qwen2", {}),
    "window": ("mistral", {"window": 16, "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}),
}
"""Experts that differ from the router, and from each other, in depth, width, heads, architecture and attention."""


def save_checkpoint(
    folder: Path,
    router: str,
    experts: Mapping[str, tuple[str | Path, dict[str, Any]]],
    *,
    spread: float = 1.0,
    **options: Any,
) -> Path:
    """A router of seed 0 and experts of seeds 1, 2, ... in ``folder``; returns the checkpoint ``folder/fused``.

    Args:
        folder: where to.
        router: its family; of tied Gemma 2, since vLLM knows no other.
        experts: family and settings per name, or the folder of a model.
        spread: of the route head's weights.
        options: stored defaults of decoding.
    """
    paths = {}
    for number, (name, (family, settings)) in enumerate(experts.items(), start=1):
        if isinstance(family, Path):
            paths[name] = family
            continue
        paths[name] = save_tiny(folder / name, family, number, **{**WIDE, **tied(family), **settings})
    save_tiny(folder / "router", router, 0, **WIDE, **tied(router))
    model = FusionRouteForCausalLM.from_experts(
        folder / "router", {n: str(path) for n, path in paths.items()}, **options
    )
    with torch.no_grad():
        model.route_head.weight.normal_(std=spread, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(folder / "fused")
    tiny_tokenizer(VOCAB).save_pretrained(folder / "fused")
    return folder / "fused"


def tied(family: str) -> dict[str, Any]:
    """Whether the LM head is the embedding matrix, as vLLM expects it of a family."""
    return {"tie_word_embeddings": family in ("gemma2", "gemma3")}


def load(checkpoint: Path, **live: PreTrainedModel) -> FusionRouteForCausalLM:
    """The checkpoint under transformers, some experts replaced by live models.

    Gemma 2 needs eager attention there: the other kinds leave its soft cap out.
    """
    config = json.loads((checkpoint / "config.json").read_text())
    if config.get("compiled"):  # there are no experts to load
        return FusionRouteForCausalLM.from_pretrained(checkpoint, attn_implementation="eager")
    eager: dict[str, Any] = {expert["name"]: {"attn_implementation": "eager"} for expert in config["experts"]}
    return FusionRouteForCausalLM.from_pretrained(checkpoint, attn_implementation="eager", expert_paths=eager | live)


def prompts(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Random prompts without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(6, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def said_by(worker: str, *questions: Any, environment: Mapping[str, str] | None = None, timeout: float = 900) -> Any:
    """What a worker of this folder answers, in a process of its own: vLLM is configured by its environment.

    Args:
        worker: its file's name; it reads questions as JSON from its arguments, and prints a line: ``answer``, JSON.
        questions: for it.
        environment: variables beside those of the tests' own process.
        timeout: in seconds.
    """
    variables = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(worker)), *map(json.dumps, questions)],
        env=os.environ | variables | dict(environment or {}),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("answer ")]
    return json.loads(line.removeprefix("answer "))


class Answer(NamedTuple):
    """Greedy tokens and their routing, and how many of them float32 decides."""

    tokens: list[int]
    routing: tuple[RoutedToken, ...]
    sure: int

    def check(self, tokens: Sequence[int], routing: Sequence[RoutedToken] | None = None) -> None:
        """Assert that a server's tokens (and routing) are these, as far as float32 decides."""
        assert len(tokens) == len(self.tokens)
        assert list(tokens[: self.sure]) == self.tokens[: self.sure]
        for found, expected in zip((routing or ())[: self.sure], self.routing, strict=False):
            assert (found.expert, found.overruled) == (expected.expert, expected.overruled)
            assert abs(found.weight - expected.weight) < 1e-3


def reference(
    model: FusionRouteForCausalLM, prompt: Sequence[int], new: int, *, rounding: float = 5e-5, **options: Any
) -> Answer:
    """What our own ``generate`` answers, greedily, with ``new`` tokens; ``rounding`` as in :func:`settled`."""
    ids = torch.tensor([list(prompt)])
    out = model.generate(
        ids, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0, output_routing=True, **options
    )
    sequence = out.sequences[0].tolist()
    return Answer(
        sequence[len(prompt) :], out.routing[0].tokens, settled(model, sequence, len(prompt), rounding=rounding)
    )


def quantise(folder: Path, keep: Sequence[str] = ()) -> PreTrainedModel:
    """Rewrite a saved model's linear layers as int8 with a scale per channel, and activations per token.

    This is compressed-tensors' ``int-quantized`` format, which vLLM runs on CPUs.

    Args:
        folder: of the model.
        keep: linear layers that stay as they are: names, or patterns that begin with ``re:``.

    Returns:
        A float32 model that computes what such a model computes.
    """
    file = folder / "model.safetensors"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tensors = {}
    for name, tensor in load_file(file).items():
        tensors[name] = tensor
        layer = name.removesuffix(".weight")
        kept = any(re.match(one[3:], layer) if one.startswith("re:") else one == layer for one in keep)
        if name.endswith("_proj.weight") and not kept:
            # Seven bits of weights: without VNNI, oneDNN adds two products in 16 bits, where eight would saturate.
            scale = tensor.abs().amax(dim=1, keepdim=True) / 63
            tensors |= {name: (tensor / scale).round().to(torch.int8), f"{name}_scale": scale}
            linear: Any = model.get_submodule(layer)
            linear.forward = _int8_activations(tensors[name] * scale)
    save_file(tensors, file, metadata={"format": "pt"})
    eight = {"num_bits": 8, "type": "int", "symmetric": True}
    scheme = {
        "weights": {**eight, "strategy": "channel"},
        "input_activations": {**eight, "strategy": "token", "dynamic": True},
        "targets": ["Linear"],
    }
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head", *keep],
        "config_groups": {"group_0": scheme},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return model


def _int8_activations(weight: torch.Tensor) -> Any:
    def forward(states: torch.Tensor) -> torch.Tensor:
        scale = (states.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-12)  # padding's embedding is zero
        return nn.functional.linear((states / scale).round() * scale, weight)

    return forward
