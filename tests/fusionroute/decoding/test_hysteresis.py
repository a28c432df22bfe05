"""Hysteresis has one definition: the expert before is that of the position before, wherever a forward began."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from fusionroute_oracle import VOCAB, fusionroute, padded_prompts
from hypothesis import given, settings
from hypothesis import strategies as st

from ebpo_core.fusionroute import FusionRouteForCausalLM, RoutingOptions
from ebpo_core.fusionroute.compat import CACHE
from ebpo_core.fusionroute.decoding.routing import select

FAMILIES = ["llama", "qwen2", "mistral", "gemma3"]
NEW = 24
MARGIN = 2.5


@pytest.fixture(scope="module")
def model() -> FusionRouteForCausalLM:
    return fusionroute(FAMILIES)


@pytest.fixture(scope="module")
def prompts() -> dict[str, Any]:
    ids, mask = padded_prompts([4, 9, 6], seed=1)
    return {"input_ids": ids, "attention_mask": mask, "max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture
def one(prompts: dict[str, Any]) -> dict[str, Any]:
    return {**prompts, "input_ids": prompts["input_ids"][1:2], "attention_mask": prompts["attention_mask"][1:2]}


def one_after_the_other(weights: list[list[float]], margin: float, before: int = -1) -> list[int]:
    """The definition, position by position."""
    ids = []
    for scores in weights:
        best = max(range(len(scores)), key=scores.__getitem__)
        before = before if before >= 0 and scores[best] - scores[before] <= margin else best
        ids.append(before)
    return ids


@torch.no_grad()
def by_definition(model: Any, tokens: list[int], margin: float = MARGIN) -> list[int]:
    """Experts at every position of one text, from the routing weights of a plain forward."""
    weights = model(input_ids=torch.tensor([tokens]), router_only=True).routing_weights[0]
    return one_after_the_other(weights.tolist(), margin)


@settings(deadline=None)
@given(
    st.integers(1, 3).flatmap(
        lambda n: st.lists(st.lists(st.integers(-3, 3), min_size=n, max_size=n), min_size=1, max_size=20)
    ),
    st.integers(0, 4),
    st.data(),
)
def test_selection_in_rounds_is_selection_one_after_the_other(scores: Any, margin: int, data: Any) -> None:
    n = len(scores[0])
    start = data.draw(st.integers(-1, n - 1))
    real = data.draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores)))
    expected = one_after_the_other([row for row, kept in zip(scores, real, strict=True) if kept], margin + 0.5, start)
    ids = select(
        torch.tensor([scores], dtype=torch.float32),
        RoutingOptions(hysteresis=margin + 0.5),
        previous=torch.tensor([start]),
        mask=torch.tensor([real]),
    )
    assert ids[0, torch.tensor(real)].tolist() == expected


@pytest.mark.parametrize(("margin", "seed"), [(1.0, 0), (2.5, 1), (5.0, 2), (10.0, 3)])
def test_every_way_to_read_a_text_selects_the_same_experts(model: Any, margin: float, seed: int) -> None:
    ids, mask = padded_prompts([5, 12, 9], seed=seed)
    texts = [row[real].tolist() for row, real in zip(ids, mask.bool(), strict=True)]
    expected = [by_definition(model, text, margin) for text in texts]
    assert expected != [by_definition(model, text, 0) for text in texts], "the margin never mattered"
    inputs = {"input_ids": ids, "attention_mask": mask, "hysteresis": margin}

    def same(experts: torch.Tensor, last: int) -> None:
        """``experts`` are those of the last columns but ``last``."""
        K = experts.shape[1]
        for row, found in zip(experts.tolist(), expected, strict=True):
            columns = [-1] * (12 - len(found)) + found
            assert row == columns[12 - last - K : 12 - last]

    with torch.no_grad():
        same(model(**inputs, use_cache=False).expert_ids, 0)
        for keep in (0, 1, 4):
            same(model(**inputs, logits_to_keep=keep, use_cache=False).expert_ids, 0)
            same(model(**inputs, logits_to_keep=keep).expert_ids, 0)
        some = model(**inputs, logits_to_keep=torch.tensor([11, 8])).expert_ids
        same(some[:, :1], 0)
        same(some[:, 1:], 3)
        for chunk in (1, 3, 5):
            state, done = None, 0
            while done < 12:
                end = min(done + chunk, 12)
                part = {**inputs, "input_ids": ids[:, done:end], "attention_mask": mask[:, :end]}
                out = model(**part, logits_to_keep=1 + done % 2, **{CACHE: state})
                state, done = out[CACHE], end
                same(out.expert_ids, 12 - end)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"prefill_chunk_size": 2},
        {"logits_to_keep": 0},
        {"output_scores": True},
        {"num_beams": 3},
        {"do_sample": True},
        {"expert_prefill": "eager"},
    ],
)
def test_generated_tokens_are_of_the_experts_of_one_forward(
    model: Any, prompts: dict[str, Any], options: dict[str, Any]
) -> None:
    out = model.generate(**prompts, hysteresis=MARGIN, output_routing=True, **options)
    longest = prompts["input_ids"].shape[1]
    differ = 0
    for row, (sequence, trace) in enumerate(zip(out.sequences, out.routing, strict=True)):
        tokens = sequence[longest - int(prompts["attention_mask"][row].sum()) :].tolist()
        expected = by_definition(model, tokens[:-1])
        assert [token.expert for token in trace.tokens] == expected[-NEW:]
        differ += expected[-NEW:] != by_definition(model, tokens[:-1], 0)[-NEW:]
    assert differ, "the margin never mattered"


def test_a_draft_that_is_taken_back_takes_its_experts_back(model: Any, one: dict[str, Any]) -> None:
    tokens = one["input_ids"][0].tolist()
    state = None
    with torch.no_grad():
        state = model(input_ids=torch.tensor([tokens]), hysteresis=MARGIN, logits_to_keep=1)[CACHE]
        for turn in range(6):
            draft = torch.randint(3, VOCAB, (1, 4), generator=torch.Generator().manual_seed(turn))
            out = model(input_ids=draft, hysteresis=MARGIN, **{CACHE: state})
            assert out.expert_ids[0].tolist() == by_definition(model, [*tokens, *draft[0].tolist()])[-4:]
            state.crop(-3)
            tokens.append(int(draft[0, 0]))


def test_hysteresis_may_begin_in_the_middle_of_a_conversation(model: Any, one: dict[str, Any]) -> None:
    """The position before is then that of a call without hysteresis."""
    margin = 1e9
    with torch.no_grad():
        first = model(input_ids=one["input_ids"], logits_to_keep=1)
        out = model(input_ids=torch.tensor([[7, 19, 23]]), hysteresis=margin, **{CACHE: first[CACHE]})
    assert out.expert_ids[0].tolist() == first.expert_ids[0].tolist() * 3


@pytest.mark.parametrize("loop", [{}, {"output_scores": True}, {"draft_tokens": 4}], ids=["kernels", "stock", "drafts"])
def test_rows_that_ended_go_on_from_their_last_real_token(
    model: Any, prompts: dict[str, Any], loop: dict[str, Any]
) -> None:
    """Its own expert was never asked for, since no token came after it; the next turn compares itself with it."""
    margin = 4 * MARGIN  # most positions keep the expert of the one before
    longest = prompts["input_ids"].shape[1]
    free = model.generate(**prompts, hysteresis=margin)
    for at in (3, 6, 11):
        ended = {**prompts, "eos_token_id": [int(free[0, longest + at]), int(free[1, longest + at + 2])], **loop}
        first = model.generate(**ended, hysteresis=margin, return_dict_in_generate=True)
        turn = torch.randint(3, VOCAB, (3, 5), generator=torch.Generator().manual_seed(2))
        ids = torch.cat([first.sequences, turn], dim=1)
        mask = (ids != 0).long()
        with torch.no_grad():
            past = first[CACHE].get_seq_length()
            out = model(input_ids=ids[:, past:], attention_mask=mask, hysteresis=margin, **{CACHE: first[CACHE]})
        for row, (tokens, real) in enumerate(zip(ids, mask.bool(), strict=True)):
            assert out.expert_ids[row, -5:].tolist() == by_definition(model, tokens[real].tolist(), margin)[-5:]


def test_hysteresis_switches_by_a_margin_only(model: Any, one: dict[str, Any]) -> None:
    def switches(margin: float) -> int:
        trace = model.generate(**one, hysteresis=margin, output_routing=True).routing[0]
        experts = [token.expert for token in trace.tokens]
        return sum(a != b for a, b in pairwise(experts))

    assert switches(1e9) == 0
    assert switches(1e9) < switches(2.0) < switches(0.0)


def test_hysteresis_of_a_batch_survives_beam_reordering(model: Any, prompts: dict[str, Any]) -> None:
    """The previous expert moves with its beam: replaying the returned sequences gives the recorded experts."""
    out = model.generate(**prompts, num_beams=3, hysteresis=1.5, output_routing=True)
    longest = prompts["input_ids"].shape[1]
    for row, (sequence, trace) in enumerate(zip(out.sequences, out.routing, strict=True)):
        tokens = sequence[longest - int(prompts["attention_mask"][row].sum()) :].tolist()
        start = len(tokens) - NEW
        with torch.no_grad():
            weights = model(input_ids=torch.tensor([tokens[:-1]]), router_only=True).routing_weights
        replayed = select(weights, RoutingOptions(hysteresis=1.5))[0, start - 1 :].tolist()
        assert [token.expert for token in trace.tokens] == replayed


@pytest.mark.parametrize("seed", range(6))
def test_hysteresis_does_not_begin_at_padding(model: Any, seed: int) -> None:
    ids, mask = padded_prompts([5, 9], seed=seed)
    options = {"hysteresis": 4.0}
    with torch.no_grad():
        padded = model(input_ids=ids, attention_mask=mask, **options).expert_ids[0, 4:]
        assert torch.equal(padded, model(input_ids=ids[:1, 4:], **options).expert_ids[0])
        cached = model(input_ids=ids, attention_mask=mask, use_cache=True, **options)
    assert torch.equal(cached.expert_ids[0, 4:], padded)


def test_drawn_experts_need_a_cache_in_generate(model: Any, one: dict[str, Any]) -> None:
    """Without one every forward would draw the experts before anew."""
    with pytest.raises(ValueError, match="hysteresis is 1.0 and use_cache is False"):
        model.generate(**one, hysteresis=1.0, use_cache=False, route="sample")
