"""OpenRLHF on a machine without GPUs: what it imports and this suite never calls, and its trainer without models."""

from __future__ import annotations

from typing import Any

import absent

PARTS = ("get_tokenizer", "prepare_datasets", "SamplesGenerator")
_RING = ("gather_and_pad_tensor", "unpad_and_slice_tensor", "get_ring_attn_group", "set_ring_attn_group")


def stand_ins() -> None:
    """OpenRLHF imports vLLM and flash-attn at once."""
    absent.stand_in("vllm", "SamplingParams")
    absent.stand_in("openrlhf.trainer.ray.vllm_engine", "batch_vllm_engine_call", "create_vllm_engines")
    absent.stand_in("openrlhf.models.ring_attn_utils", *_RING)


def without_models(ppo_trainer: Any) -> None:
    """The trainer's constructor then reads no tokenizer and no data."""
    ppo_trainer.get_tokenizer = lambda *_, **__: "tokenizer"
    ppo_trainer.prepare_datasets = lambda *_: ([], [], 0)
    ppo_trainer.SamplesGenerator = lambda **_: None
