"""One vocabulary: tokens that experts lack and their substitutes, renamed tokens, refusals when a model is built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fusionroute_tiny import save_tiny, tiny_model, tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from ebpo_core.fusionroute import FusionRouteForCausalLM
from ebpo_core.fusionroute.conversion import convert_checkpoint
from ebpo_core.fusionroute.experts.references import ExpertReference
from ebpo_core.fusionroute.training.preparation import expert_sources

START, END = 200, 201
TEMPLATE = (
    "{% for message in messages %}<|im_start|> <{{ message['role'] }}> {{ message['content'] }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> <assistant> {% endif %}"
)
ENDS = {"eos_token": "<|im_end|>"}
CHATML = {"<|im_start|>": "<bos>", "<|im_end|>": "<eos>"}


def chatml(**settings: Any) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = TEMPLATE
    for name, value in settings.items():
        setattr(tokenizer, name, value)
    return tokenizer


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A router of 202 tokens, whose answers end with the last; experts of 200 and of 208 with the same first 200."""
    root = tmp_path_factory.mktemp("models")
    save_tiny(root / "router", "llama", 0, vocab_size=202, eos_token_id=END, tokenizer=chatml(**ENDS))
    for seed, name in enumerate(["math", "code"], 1):
        save_tiny(root / name, "qwen2" if seed == 1 else "llama", seed)
    save_tiny(root / "chat", "llama", 3, vocab_size=208, tokenizer=chatml())
    return root


def build(root: Path, *names: str, **options: Any) -> FusionRouteForCausalLM:
    model = FusionRouteForCausalLM.from_experts(root / "router", {name: root / name for name in names}, **options)
    with torch.no_grad():
        model.route_head.weight.normal_(std=1.0, generator=torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        (ENDS, {}, r"<\|im_end\|>' has id 201, which expert 'math' lacks: pass substitutes="),
        ({"pad_token": "<|im_start|>"}, {}, r"padding '<\|im_start\|>' has id 200, which expert 'math' lacks"),
        ({}, {}, r"the chat template's '<\|im_start\|>' has id 200, which expert 'math' lacks"),
    ],
)
def test_a_needed_token_that_an_expert_lacks(root: Path, settings: Any, options: Any, message: str) -> None:
    router = tiny_model("llama", 0, vocab_size=202)
    with pytest.raises(ValueError, match=message):
        FusionRouteForCausalLM.from_experts(router, {"math": root / "math"}, tokenizer=chatml(**settings), **options)


def test_a_needed_token_for_which_an_expert_has_a_padded_row_alone(root: Path, tmp_path: Path) -> None:
    """Matrices are often wider than the tokenizer; what no text ever held has logits that mean nothing."""
    save_tiny(tmp_path / "padded", "llama", 4, vocab_size=208, tokenizer=tiny_tokenizer())
    experts = {"padded": tmp_path / "padded"}
    with pytest.raises(ValueError, match="has id 201, which expert 'padded' lacks: pass substitutes="):
        FusionRouteForCausalLM.from_experts(root / "router", experts)
    model = FusionRouteForCausalLM.from_experts(root / "router", experts, substitutes=CHATML)
    assert model.config.vocab_size == 202
    with torch.no_grad():
        read = model.experts[0](input_ids=torch.tensor([[START, 5, END]])).logits
        torch.testing.assert_close(read[..., [START, END]], read[..., [1, 2]])


def test_the_end_of_the_generation_config_is_needed_too(root: Path) -> None:
    router = tiny_model("llama", 0, vocab_size=202)
    router.generation_config.eos_token_id = [2, END]
    with pytest.raises(ValueError, match="EOS has id 201, which expert 'qwen2' lacks"):
        FusionRouteForCausalLM.from_experts(router, {"qwen2": tiny_model("qwen2", 1)})
    with pytest.raises(ValueError, match="EOS has id 201: pass a vocab_size above it, not 200"):
        FusionRouteForCausalLM.from_experts(router, {"a": tiny_model("llama", 1, vocab_size=202)}, vocab_size=200)


def test_an_added_token_that_nothing_needs_is_left_out() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<tool>"])
    router, expert = tiny_model("llama", 0, vocab_size=208), tiny_model("llama", 1)
    model = FusionRouteForCausalLM.from_experts(router, {"a": expert}, tokenizer=tokenizer)
    assert model.config.vocab_size == 200
    ids = torch.tensor([[5, 6, 200, 7]])
    for call in (
        lambda: model.generate(ids, max_new_tokens=2),
        lambda: model(ids),
        lambda: model(ids, use_cache=False),
    ):
        with pytest.raises(ValueError, match="input_ids has 200, which expert 'a' lacks: pass substitutes={200: "):
            call()
    with pytest.raises(ValueError, match="input_ids has 203"):
        model.generate(ids[:, :2], max_new_tokens=2, pad_token_id=203)
    with torch.no_grad():
        model(ids, router_only=True)  # the router has it


def test_substitutes_are_read_and_score(root: Path) -> None:
    model = build(root, "math", "chat", substitutes=CHATML)
    assert model.config.vocab_size == 202
    ids = torch.tensor([[START, 5, 40, END, START, 5, 9]])
    plain = torch.tensor([[1, 5, 40, 2, 1, 5, 9]])
    with torch.no_grad():
        router = model.router(ids).logits
        math = model.experts["math"].model(plain).logits
        expected = router + torch.cat([math, math[..., [1, 2]]], -1)
        torch.testing.assert_close(model(ids, forced_expert="math").logits, expected, rtol=0, atol=1e-4)
        own = model.experts["chat"].model(ids).logits[..., :202]  # has the tokens
        torch.testing.assert_close(model(ids, forced_expert="chat").logits, router + own, rtol=0, atol=1e-4)
    assert model.experts["chat"].reference.substitutes is None


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 2}, {"output_scores": True}])
def test_generation_with_substitutes_is_that_of_plain_forwards(root: Path, options: dict[str, Any]) -> None:
    model = build(root, "math", "code", substitutes=CHATML)
    ids = torch.tensor([[0, 0, START, 5, 40, END, START, 5, 9], [START, 5, 7, 11, 13, END, START, 5, 19]])
    mask = (ids != 0).long()
    answer = model.generate(ids, attention_mask=mask, max_new_tokens=20, pad_token_id=0, eos_token_id=END, **options)
    if "num_beams" not in options:
        for row, tokens in enumerate(answer):
            with torch.no_grad():
                logits = model(tokens[None, mask[row].argmax() :], use_cache=False).logits[0]
            new = tokens[ids.shape[1] :]
            length = new.tolist().index(END) + 1 if END in new else len(new)
            start = ids.shape[1] - int(mask[row].argmax()) - 1
            assert torch.equal(logits[start : start + length].argmax(-1), new[:length])


def test_an_answer_ends_with_a_substituted_token(root: Path) -> None:
    model = build(root, "math", "code", substitutes=CHATML)
    with torch.no_grad():
        model.router.lm_head.weight[END] = 0
        model.router.lm_head.weight[2] = 0
    ids = torch.tensor([[START, 5, 40]])

    def favour(_: Any, __: Any, out: Any) -> None:
        out.logits[..., 2] = 1e3  # the expert ends

    handles = [expert.model.register_forward_hook(favour) for expert in model.experts]
    answer = model.generate(ids, max_new_tokens=8, bad_words_ids=[[2]])
    for handle in handles:
        handle.remove()
    assert answer[0, 3:].tolist() == [END]


def test_substitutes_are_stored_with_the_expert(root: Path, tmp_path: Path) -> None:
    model = build(root, "math", "chat", substitutes=CHATML)
    model.save_pretrained(tmp_path / "fused")
    stored = json.loads((tmp_path / "fused" / "config.json").read_text())["experts"]
    assert [expert.get("substitutes") for expert in stored] == [{"200": 1, "201": 2}, None]
    ids = torch.tensor([[START, 5, 40, END, 9]])
    with torch.no_grad():
        expected = model(ids).logits
        for options in ({}, {"expert_paths": {"math": model.experts["math"].model}}):
            loaded = FusionRouteForCausalLM.from_pretrained(tmp_path / "fused", **options)
            torch.testing.assert_close(loaded(ids).logits, expected, rtol=0, atol=0)
        model.save_pretrained(tmp_path / "complete", save_experts=True)
        loaded = FusionRouteForCausalLM.from_pretrained(tmp_path / "complete")
        torch.testing.assert_close(loaded(ids).logits, expected, rtol=0, atol=0)


def test_an_expert_in_another_place_keeps_its_substitutes(root: Path, tmp_path: Path) -> None:
    """Given by whatever ``expert_paths`` takes, and through ``fusionroute convert``."""
    model = build(root, "math", substitutes=CHATML)
    model.save_pretrained(tmp_path / "fused")
    ids = torch.tensor([[START, 5, 40, END, 9]])
    live = model.experts["math"].model
    for number, moved in enumerate(
        (root / "math", {"path": root / "math"}, ExpertReference(path=str(root / "math")), live)
    ):
        paths = {"expert_paths": {"math": moved}, "verify_experts": False}
        convert_checkpoint(tmp_path / "fused", tmp_path / str(number), copy_all=True, **paths)
        for loaded in (
            FusionRouteForCausalLM.from_pretrained(tmp_path / "fused", **paths),
            FusionRouteForCausalLM.from_pretrained(tmp_path / str(number)),
        ):
            with torch.no_grad():
                torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=0)
            assert loaded.experts["math"].reference.substitutes == {"200": 1, "201": 2}


def test_a_reference_may_hold_the_substitutes(root: Path) -> None:
    expert = {"path": root / "math", "substitutes": {START: 1, END: 2}}
    model = FusionRouteForCausalLM.from_experts(root / "router", {"math": expert})
    assert model.config.vocab_size == 202
    caches = [source.identity for source in expert_sources(model, torch.device("cpu"))]
    assert "substitutes" in caches[0]


@pytest.mark.parametrize(
    ("substitutes", "message"),
    [
        ({"<|im_end|>": "<nothing>"}, "'<nothing>': the router's tokenizer has no such token"),
        ({"w9": "w10"}, r"substitutes names \[9\], which every expert has"),
        ({200: 201, 201: 2}, "names 201 for 200: name an id below 200"),
        ({200: 1, 201: -1}, "substitutes names -1: pass a token"),
        ({201: 2}, "expert 'math': substitutes names 201, and none for 200 below it: name one, too"),
    ],
)
def test_bad_substitutes_are_named(root: Path, substitutes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(root, "math", substitutes=substitutes)


def test_a_renamed_token(root: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary["model"]["vocab"] = {
        {"w190": "<reserved>", "w191": "<end>"}.get(token, token): index
        for token, index in vocabulary["model"]["vocab"].items()
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(vocabulary))
    renamed = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    router, experts = tiny_model("llama", 0), {"math": root / "math"}
    with pytest.raises(ValueError, match=r"disagree at id 190: '<reserved>' against 'w190'.*renamed_ids=\[190\]"):
        FusionRouteForCausalLM.from_experts(router, experts, tokenizer=renamed)
    with pytest.raises(ValueError, match="disagree at id 191"):
        FusionRouteForCausalLM.from_experts(router, experts, tokenizer=renamed, renamed_ids=[190])
    model = FusionRouteForCausalLM.from_experts(router, experts, tokenizer=renamed, renamed_ids=[190, 191])
    assert model.config.vocab_size == 200
    with pytest.raises(ValueError, match="renamed_ids names 7, which is 'w7' in all tokenizers: leave it out"):
        FusionRouteForCausalLM.from_experts(router, experts, tokenizer=renamed, renamed_ids=[190, 191, 7])
    with pytest.raises(ValueError, match="renamed_ids names 999, which is a token of none"):
        FusionRouteForCausalLM.from_experts(router, experts, tokenizer=renamed, renamed_ids=[190, 191, 999])
