"""The shortest context among the models counts: in building, generate, evaluation, the card, forward and training."""

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
from ebpo_core.fusionroute.context import context_length

SHORT = 24


def learned(positions: int) -> Any:
    """A model whose positions are an embedding: behind the last one is an IndexError."""
    config = GPT2Config(vocab_size=200, n_embd=32, n_layer=2, n_head=4, n_positions=positions, bos_token_id=1)
    config.eos_token_id = 2
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    messages: list[str] = []
    for name in ("context", "generation"):
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


# ------------------------------------------------------------------------------------------------------------- forward

LONGER = torch.arange(5, 5 + SHORT + 6)[None]


def never_runs(model: Any) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("a model ran")

    for each in (model.router, *(expert.model for expert in model.experts)):
        each.register_forward_pre_hook(fail)


@pytest.mark.parametrize(
    "options",
    [{}, {"use_cache": False}, {"logits_to_keep": 1}, {"labels": LONGER}, {"forced_expert": "short"}, {"fuse": False}],
    ids=str,
)
def test_forward_refuses_a_text_that_an_expert_has_no_positions_for(options: dict[str, Any]) -> None:
    model = FusionRouteForCausalLM.from_experts(
        tiny_model("llama", 0), {"a": tiny_model("qwen2"), "short": learned(SHORT)}
    )
    never_runs(model)
    message = (
        r"input_ids, with what a cache holds, has 30 tokens, and expert 'short' is a GPT2LMHeadModel, which has 24 "
        "positions: shorten it to 24"
    )
    with pytest.raises(ValueError, match=message):
        model(input_ids=LONGER, **options)


@pytest.mark.parametrize("options", [{}, {"router_only": True}], ids=str)
def test_forward_refuses_a_text_that_the_router_has_no_positions_for(options: dict[str, Any]) -> None:
    model = FusionRouteForCausalLM.from_experts(learned(SHORT), [tiny_model("llama", 1)])
    never_runs(model)
    with pytest.raises(ValueError, match="has 30 tokens, and router is a GPT2LMHeadModel, which has 24 positions"):
        model(input_ids=LONGER, **options)


def test_an_expert_that_does_not_run_does_not_count() -> None:
    model = FusionRouteForCausalLM.from_experts(
        tiny_model("llama", 0), {"long": tiny_model("qwen2", 1), "short": learned(SHORT)}
    )
    with torch.no_grad():
        expected = model.router(input_ids=LONGER).logits + model.experts["long"].model(input_ids=LONGER).logits
        torch.testing.assert_close(model(input_ids=LONGER, forced_expert="long").logits, expected)
        assert model(input_ids=LONGER, router_only=True).logits.shape[1] == LONGER.shape[1]
        with pytest.raises(ValueError, match="expert 'short'"):
            model(input_ids=LONGER, forced_expert="long", expert_prefill="eager")


def test_a_cache_counts_and_stays_as_it_was() -> None:
    model = FusionRouteForCausalLM.from_experts(tiny_model("llama", 0), [learned(SHORT)])
    with torch.no_grad():
        whole = model(input_ids=LONGER[:, :SHORT]).logits
        cache = model(input_ids=LONGER[:, : SHORT - 2])[CACHE]
        with pytest.raises(ValueError, match="has 25 tokens, and expert"):
            model(input_ids=LONGER[:, SHORT - 2 : SHORT + 1], **{CACHE: cache})
        assert cache.get_seq_length() == SHORT - 2
        last = model(input_ids=LONGER[:, SHORT - 2 : SHORT], **{CACHE: cache}).logits
        torch.testing.assert_close(last, whole[:, -2:])
        with pytest.raises(ValueError, match="has 25 tokens, and expert"):
            model(input_ids=LONGER[:, :1], **{CACHE: cache})


def test_positions_that_the_caller_gives_count() -> None:
    model = FusionRouteForCausalLM.from_experts(tiny_model("llama", 0), [learned(SHORT)])
    ids = LONGER[:, :4]
    with pytest.raises(ValueError, match="has 25 tokens, and expert"):
        model(input_ids=ids, position_ids=torch.tensor([[0, 1, 2, SHORT]]))
    assert model(input_ids=ids, position_ids=torch.tensor([[0, 1, 2, SHORT - 1]])).logits.shape == (1, 4, 200)


def test_forward_beyond_the_shortest_context_warns_once(warned: list[str]) -> None:
    """Rotary positions go on: the answer is what the models say there, as each of them alone does."""
    model = FusionRouteForCausalLM.from_experts(
        tiny_model("llama", 0), {"a": tiny_model("qwen2", 1, max_position_embeddings=19)}
    )
    warned.clear()
    with torch.no_grad():
        model(input_ids=LONGER[:, :19])
        assert not warned
        for ids in (LONGER, LONGER[:, :-1], LONGER[:, :20]):
            fused = model(input_ids=ids).logits
            torch.testing.assert_close(fused, model.router(ids).logits + model.experts[0].model(ids).logits)
    assert [message[:56] for message in warned] == ["a text is longer than 19 tokens, the shortest context am"]
    model(input_ids=LONGER, router_only=True)
    assert len(warned) == 1


# ------------------------------------------------------------------------------------------------------------ training


def sft_trainer(model: Any, folder: Path, **options: Any) -> Any:
    worker = pytest.importorskip("fusionroute_worker")
    rows = [{"input_ids": ids, "labels": ids} for ids in (LONGER[0, :9].tolist(), LONGER[0].tolist())]
    return worker.sft_trainer(model, folder, rows, max_steps=1, **options)


@pytest.mark.parametrize("short", ["router", "expert"])
def test_training_data_that_a_model_has_no_positions_for_is_refused_before_any_runs(short: str, tmp_path: Path) -> None:
    first, second = tiny_model("llama", 0), learned(SHORT)
    model = FusionRouteForCausalLM.from_experts(
        *((second, {"a": first}) if short == "router" else (first, {"a": second}))
    )
    who = "router" if short == "router" else "expert 'a'"
    never_runs(model)
    message = (
        f"sft-train: a sequence has 30 tokens, and {who} is a GPT2LMHeadModel, which has 24 positions: "
        "pass max_length=24"
    )
    with pytest.raises(ValueError, match=message):
        sft_trainer(model, tmp_path)


def test_training_data_is_cut_to_what_the_models_can_read(tmp_path: Path) -> None:
    model = FusionRouteForCausalLM.from_experts(tiny_model("llama", 0), {"a": learned(SHORT)})
    sft_trainer(model, tmp_path, max_length=SHORT).train()
    assert len(list(tmp_path.glob("expert_cache/*"))) == 1


def test_an_expert_that_is_loaded_for_the_cache_alone_refuses_them_too(tmp_path: Path) -> None:
    learned(SHORT).save_pretrained(tmp_path / "short")
    made = FusionRouteForCausalLM.from_experts(tiny_model("llama", 0), {"a": tmp_path / "short"})
    made.save_pretrained(tmp_path / "fused")
    model = FusionRouteForCausalLM.from_pretrained(tmp_path / "fused", load_experts=False)
    with pytest.raises(ValueError, match="a sequence has 30 tokens, and expert 'a' is a GPT2LMHeadModel"):
        sft_trainer(model, tmp_path / "out", routing_loss="softmax")


def test_training_beyond_a_context_that_can_be_read_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    short = tiny_model("qwen2", 1, max_position_embeddings=SHORT)
    model = FusionRouteForCausalLM.from_experts(tiny_model("llama", 0), {"a": short})
    sft_trainer(model, tmp_path / "1", max_length=SHORT)
    assert "shortest context" not in caplog.text
    sft_trainer(model, tmp_path / "2")
    assert "sft-train: a sequence has 30 tokens, and the shortest context among router and experts is 24" in caplog.text
