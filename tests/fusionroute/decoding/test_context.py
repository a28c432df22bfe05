"""The shortest context among the models counts: when a model is built, in generate, in evaluation and in the card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fusionroute_tiny import tiny_model
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig
from transformers.utils import logging

from ebpo_core.fusionroute import FusionRouteForCausalLM
from ebpo_core.fusionroute.card import model_card
from ebpo_core.fusionroute.compat import CACHE
from ebpo_core.fusionroute.families import context_length

SHORT = 24


def learned(positions: int) -> Any:
    """A model whose positions are an embedding: behind the last one is an IndexError."""
    config = GPT2Config(vocab_size=200, n_embd=32, n_layer=2, n_head=4, n_positions=positions, bos_token_id=1)
    config.eos_token_id = 2
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    messages: list[str] = []
    for name in ("families", "generation"):
        logger = logging.get_logger(f"ebpo_core.fusionroute.{name}")
        monkeypatch.setattr(logger, "warning", messages.append)
    return messages


def test_built_and_loaded_models_warn(tmp_path: Path, warned: list[str]) -> None:
    learned(SHORT).save_pretrained(tmp_path / "short")
    model = FusionRouteForCausalLM.from_experts(
        tiny_model("llama", 0), {"long": tiny_model("qwen2", 1), "short": tmp_path / "short"}
    )
    message = "expert 'short' reads 24 tokens, the router 512: prompt and answer together may have 24"
    assert warned == [message]
    assert model.config.max_position_embeddings == SHORT
    model.save_pretrained(tmp_path / "fused")
    config = FusionRouteForCausalLM.from_pretrained(tmp_path / "fused", load_experts=False).config
    assert config.max_position_embeddings == SHORT
    FusionRouteForCausalLM.from_pretrained(tmp_path / "fused", expert_paths={"long": tiny_model("qwen2", 1)})
    assert warned == [message] * 2
    assert "together may have 24 tokens" in model_card(config)


@pytest.mark.parametrize("router", ["llama", "learned"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"output_scores": True}, {"use_cache": False}])
def test_generation_ends_at_the_shortest_context(router: str, options: dict[str, Any], warned: list[str]) -> None:
    short, long = learned(SHORT), tiny_model("llama", 1)
    model = FusionRouteForCausalLM.from_experts(*((long, [short]) if router == "llama" else (short, [long])))
    warned.clear()
    ids = torch.tensor([[5, 6, 7, 8]])
    plain = {"eos_token_id": None, "pad_token_id": 0}
    assert model.generate(ids, max_new_tokens=30, **plain, **options).shape[1] == SHORT
    assert warned == ["generation ends at 24 tokens, the shortest context among the models, not at 34"]
    assert model.generate(ids, max_length=SHORT, **plain, **options).shape[1] == SHORT
    assert len(warned) == 1
    with pytest.raises(ValueError, match="input_ids has 24 columns, and the shortest context among the models is 24"):
        model.generate(ids.repeat(1, 6), max_new_tokens=1, **plain)


def test_a_conversation_ends_there_too() -> None:
    model = FusionRouteForCausalLM.from_experts(tiny_model("llama", 1), [learned(SHORT)])
    plain = {"eos_token_id": None, "pad_token_id": 0, "return_dict_in_generate": True}
    first = model.generate(torch.tensor([[5, 6, 7, 8]]), max_new_tokens=8, **plain)
    ids = torch.cat([first.sequences, torch.tensor([[9, 10]])], dim=1)
    for given in (ids, ids[:, first[CACHE].get_seq_length() :]):
        cache = model.generate(torch.tensor([[5, 6, 7, 8]]), max_new_tokens=8, **plain)[CACHE]
        mask = torch.ones_like(ids)
        out = model.generate(given, attention_mask=mask, max_new_tokens=40, **{CACHE: cache}, **plain)
        assert out.sequences.shape[1] - given.shape[1] == SHORT - ids.shape[1]


def test_evaluation_takes_the_shortest_context() -> None:
    evaluation = pytest.importorskip("ebpo_core.fusionroute.evaluation")
    from fusionroute_tiny import tiny_tokenizer

    model = FusionRouteForCausalLM.from_experts(tiny_model("llama", 1), [learned(SHORT)])
    harness = evaluation.FusionRouteLM(model, tokenizer=tiny_tokenizer(), device="cpu")
    assert harness.max_length == SHORT
    with pytest.raises(ValueError, match="max_length is 64: pass at most 24, the shortest context among the models"):
        evaluation.FusionRouteLM(model, tokenizer=tiny_tokenizer(), device="cpu", max_length=64)


def test_contexts_of_configs() -> None:
    assert context_length(LlamaConfig(max_position_embeddings=99)) == 99
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}
    assert context_length(LlamaConfig(max_position_embeddings=32, rope_parameters=yarn)) == 128
