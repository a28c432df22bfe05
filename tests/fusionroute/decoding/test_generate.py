"""``generate`` in every mode of transformers: the lazy cache gives what no cache gives, and state stays in the call."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from fusionroute_oracle import VOCAB, fusionroute, oracle_logits, padded_prompts, settled
from fusionroute_tiny import tiny_model, tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TopKLogitsWarper,
)

from ebpo_core.fusionroute import FusionRouteCache, FusionRouteForCausalLM, RoutingOptions
from ebpo_core.fusionroute.compat import CACHE
from ebpo_core.fusionroute.decoding.routing import permitted

FAMILIES = ["llama", "qwen2", "mistral", "gemma3"]
NEW = 24


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


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "beams returned": {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5},
    "beam sampling": {"num_beams": 2, "do_sample": True, "top_k": 20},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "num_return_sequences": 2},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "allowed": {"allowed_experts": [["llama0", "qwen21"], ["mistral2"], [3, "llama0"]]},
    "allowed and beams": {"allowed_experts": [["llama0", "qwen21"], ["mistral2"], [3, "llama0"]], "num_beams": 2},
    "forced": {"forced_expert": "gemma33"},
    "forced per row": {"forced_expert": [0, "mistral2", 3]},
    "alpha": {"alpha": 0.3},
    "routing only": {"complementary": False},
    "eager": {"expert_prefill": "eager"},
    "budget": {"expert_cache_budget": 60_000},
    "chunked prefill": {"prefill_chunk_size": 4},
}


@pytest.mark.parametrize("mode", MODES)
def test_cached_generation_is_uncached_generation(model: Any, prompts: dict[str, Any], mode: str) -> None:
    extra = dict(MODES[mode])
    if extra.get("do_sample"):
        extra["output_scores"] = True  # draws token for token as transformers' own loop does
    uncached = {**extra, "use_cache": False}
    uncached.pop("prefill_chunk_size", None)
    torch.manual_seed(3)
    lazy = model.generate(**prompts, **extra)
    torch.manual_seed(3)
    plain = model.generate(**prompts, **uncached)
    assert lazy.shape == plain.shape
    assert torch.equal(lazy, plain)
    assert len(set(lazy[0, 9:].tolist())) > 4  # a text that varies


def test_greedy_tokens_are_the_oracles(model: Any, prompts: dict[str, Any]) -> None:
    out = model.generate(**prompts)
    longest = prompts["input_ids"].shape[1]
    checked = 0
    for row, mask in zip(out, prompts["attention_mask"], strict=True):
        tokens = row[longest - int(mask.sum()) :].tolist()
        start = int(mask.sum())
        for end in range(start, start + settled(model, tokens, start)):
            with torch.no_grad():
                weights = model(
                    input_ids=torch.tensor([tokens[:end]]), router_only=True, logits_to_keep=1
                ).routing_weights
            expert = int(weights[0, -1].argmax())
            assert int(oracle_logits(model, tokens[:end], expert).argmax()) == tokens[end]
            checked += 1
    assert checked > 2 * NEW


def test_greedy_tokens_are_the_same_with_and_without_the_kernels(model: Any, prompts: dict[str, Any]) -> None:
    fast = model.generate(**prompts, return_dict_in_generate=True)
    slow = model.generate(**prompts, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(fast.sequences, slow.sequences)
    assert fast[CACHE].forwarded == slow[CACHE].forwarded
    assert len(slow.scores) == NEW
    assert "scores" not in fast


def test_the_kernels_are_used_exactly_where_nothing_needs_the_logits(
    model: Any, prompts: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ebpo_core.fusionroute import generation

    calls: list[str] = []
    for name in ("select_add_argmax", "select_add_sample"):
        original = getattr(generation, name)
        monkeypatch.setattr(generation, name, lambda *a, _n=name, _f=original, **k: (calls.append(_n), _f(*a, **k))[1])

    def used(**extra: Any) -> list[str]:
        calls.clear()
        model.generate(**{**prompts, "max_new_tokens": 2}, **extra)
        return list(calls)

    sampling: dict[str, Any] = {"do_sample": True, "top_k": 5, "top_p": 0.9, "min_p": 0.01, "temperature": 0.7}
    assert used() == ["select_add_argmax"] * 2
    assert used(**sampling) == ["select_add_sample"] * 2
    assert used(output_routing=True) == ["select_add_argmax"] * 2
    assert used(repetition_penalty=1.2) == []
    assert used(**sampling, typical_p=0.9) == []
    soft = LogitsProcessorList([TopKLogitsWarper(5, filter_value=-2.0)])  # the rest stays possible
    assert used(do_sample=True, top_k=0, logits_processor=soft) == []
    assert used(output_logits=True, return_dict_in_generate=True) == []
    assert used(num_beams=2) == []
    assert used(use_cache=False) == []
    assert used(complementary=False) == []


@pytest.mark.parametrize(
    "filters", [{}, {"top_k": 8}, {"top_p": 0.7, "temperature": 1.3}, {"min_p": 0.05, "top_k": 12}]
)
def test_draws_of_the_kernels_follow_the_policy(model: Any, one: dict[str, Any], filters: dict[str, Any]) -> None:
    """Chi-squared of 20,000 first tokens against transformers' own warpers on the fused logits."""
    with torch.no_grad():
        out = model.generate(
            **{**one, "max_new_tokens": 1},
            do_sample=True,
            top_k=filters.get("top_k", 0),
            **{k: v for k, v in filters.items() if k != "top_k"},
            output_scores=True,
            return_dict_in_generate=True,
        )
    expected = out.scores[0][0].softmax(-1)
    n = 20_000
    torch.manual_seed(0)
    kwargs = {**one, "max_new_tokens": 1, "num_return_sequences": n, "do_sample": True, "top_k": 0, **filters}
    drawn = model.generate(**kwargs)[:, -1]
    counts = torch.bincount(drawn, minlength=VOCAB).double()
    assert counts[expected == 0].sum() == 0
    likely = expected * n >= 5
    rest = torch.tensor([counts[~likely].sum(), (expected[~likely] * n).sum()])
    seen, mean = counts[likely], (expected[likely] * n).double()
    chi2 = float(((seen - mean) ** 2 / mean).sum()) + (
        float((rest[0] - rest[1]) ** 2 / rest[1]) if rest[1] > 5 else 0.0
    )
    freedom = int(likely.sum()) - (0 if rest[1] > 5 else 1)
    assert chi2 < freedom + 5 * (2 * max(freedom, 1)) ** 0.5


def test_sampling_is_reproducible_and_rows_draw_apart(model: Any, one: dict[str, Any]) -> None:
    def draw(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        out: torch.Tensor = model.generate(**one, do_sample=True, num_return_sequences=3)
        return out

    assert torch.equal(draw(5), draw(5))
    assert not torch.equal(draw(5), draw(6))
    assert len({tuple(row) for row in draw(5).tolist()}) == 3


def test_greedy_stops_rows_at_the_end_token_and_spares_their_experts(model: Any, prompts: dict[str, Any]) -> None:
    free = model.generate(**prompts)
    longest = prompts["input_ids"].shape[1]
    stop = int(free[0, longest + 3])
    kwargs = {**prompts, "eos_token_id": stop, "return_dict_in_generate": True}
    fast, slow = model.generate(**kwargs), model.generate(**kwargs, output_scores=True)
    assert torch.equal(fast.sequences, slow.sequences)
    assert fast.sequences[0, longest + 4 :].eq(0).all()
    ended = 4 + int(prompts["attention_mask"][0].sum())
    assert max(forwarded[0] for forwarded in fast[CACHE].forwarded) < ended
    assert max(forwarded[0] for forwarded in slow[CACHE].forwarded) >= ended  # transformers' loop cannot know


def test_a_batch_gives_what_its_rows_give_alone(model: Any, prompts: dict[str, Any]) -> None:
    batch = model.generate(**prompts)
    for row, mask in enumerate(prompts["attention_mask"]):
        alone = prompts["input_ids"][row, -int(mask.sum()) :][None]
        out = model.generate(alone, max_new_tokens=NEW, eos_token_id=None, pad_token_id=0)
        sure = settled(model, out[0].tolist(), alone.shape[1])
        assert out[0, alone.shape[1] :][:sure].tolist() == batch[row, -NEW:][:sure].tolist()


def test_prompt_lookup_and_assisted_decoding_give_greedy_tokens(model: Any, one: dict[str, Any]) -> None:
    greedy = model.generate(**one)
    assert torch.equal(model.generate(**one, prompt_lookup_num_tokens=3), greedy)
    for assistant in (model.experts[0].model, tiny_model("llama", 9)):
        assert torch.equal(model.generate(**one, assistant_model=assistant), greedy)
    steady = model.generate(**one, hysteresis=1.0)
    assert torch.equal(model.generate(**one, hysteresis=1.0, assistant_model=model.experts[0].model), steady)


def test_a_conversation_goes_on_from_its_cache(model: Any, prompts: dict[str, Any]) -> None:
    first = model.generate(**prompts, return_dict_in_generate=True)
    cache = first[CACHE]
    assert isinstance(cache, FusionRouteCache)
    turn = torch.randint(3, VOCAB, (3, 5), generator=torch.Generator().manual_seed(2))
    ids = torch.cat([first.sequences, turn], dim=1)
    grown = ids.shape[1] - prompts["input_ids"].shape[1]
    mask = torch.cat([prompts["attention_mask"], torch.ones(3, grown, dtype=torch.int64)], dim=1)
    before = [sum(rows) for rows in cache.forwarded]
    second = {**prompts, "input_ids": ids, "attention_mask": mask}
    continued = model.generate(**second, **{CACHE: cache})
    assert torch.equal(continued, model.generate(**second))
    assert any(sum(rows) - done < 3 * ids.shape[1] for rows, done in zip(cache.forwarded, before, strict=True))


def test_a_conversation_goes_on_after_rows_that_ended_early(model: Any, prompts: dict[str, Any]) -> None:
    """What `generate` filled up an ended row with is padding in the next turn: no expert may look at it either."""
    longest = prompts["input_ids"].shape[1]
    stop = int(model.generate(**prompts)[0, longest + 3])
    first = model.generate(**{**prompts, "eos_token_id": stop}, return_dict_in_generate=True)
    turn = torch.randint(3, VOCAB, (3, 5), generator=torch.Generator().manual_seed(2))
    ids = torch.cat([first.sequences, turn], dim=1)
    mask = (ids != 0).long()
    assert 0 in mask[0, longest:]
    second = {**prompts, "input_ids": ids, "attention_mask": mask, "output_logits": True, "max_new_tokens": 1}
    cached = model.generate(**second, **{CACHE: first[CACHE]}, return_dict_in_generate=True).logits[0]
    for row, (tokens, real) in enumerate(zip(ids, mask.bool(), strict=True)):
        with torch.no_grad():
            alone = model(input_ids=tokens[real][None], logits_to_keep=1).logits[0, -1]
        assert (cached[row] - alone).abs().max() <= 5e-5 * alone.abs().max()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"forced_expert": "nobody"}, "forced_expert names 'nobody'"),
        ({"input_ids": torch.tensor([[9]])}, "input_ids has 1 rows, the cache holds 2"),
        ({"router_only": True}, "router_only=True with a cache"),
        ({"logits_to_keep": torch.tensor([0])}, "logits_to_keep is a tensor"),
        ({"attention_mask": torch.ones(2, 3)}, r"attention_mask has shape \[2, 3\]"),
    ],
)
def test_a_forward_that_is_refused_leaves_the_cache_as_it_was(
    model: Any, arguments: dict[str, Any], message: str
) -> None:
    ids, mask = padded_prompts([5, 8], seed=3)
    steps = [torch.tensor([[7], [18]]), torch.tensor([[9], [11]])]

    @torch.no_grad()
    def run(refused: bool) -> torch.Tensor:
        state, seen = model(input_ids=ids, attention_mask=mask, use_cache=True)[CACHE], mask
        for tokens in steps:
            if refused:
                with pytest.raises(ValueError, match=message):
                    model(**{"input_ids": tokens, **arguments, CACHE: state})
            seen = torch.cat([seen, torch.ones_like(tokens)], dim=1)
            out = model(input_ids=tokens, attention_mask=seen, use_cache=True, **{CACHE: state})
        logits: torch.Tensor = out.logits
        return logits

    assert torch.equal(run(refused=True), run(refused=False))


def test_generation_works_after_an_expert_failed(model: Any, prompts: dict[str, Any]) -> None:
    expected = model.generate(**prompts)

    def fail(*_: Any) -> None:
        raise MemoryError("no room")

    handle = model.experts[1].model.get_output_embeddings().register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        model.generate(**prompts)
    handle.remove()
    assert torch.equal(model.generate(**prompts), expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_copies_of_a_prefix_cache_serve_several_prompts(model: Any, one: dict[str, Any], mode: Any) -> None:
    """transformers' recipe for prompts with one beginning. The copies share the experts; the cache is not used up."""
    with mode():
        prefix = model(input_ids=one["input_ids"], use_cache=True)[CACHE]
    for seed in (1, 2):
        state = copy.deepcopy(prefix)
        assert [each.expert for each in state.states] == list(model.experts)
        ids = torch.cat([one["input_ids"], padded_prompts([4], seed)[0]], dim=1)
        full = {**one, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        assert torch.equal(model.generate(**full, **{CACHE: state}), model.generate(**full))
    assert prefix.get_seq_length() == one["input_ids"].shape[1]


def test_streaming_yields_the_text(model: Any, one: dict[str, Any]) -> None:
    tokenizer = tiny_tokenizer(VOCAB)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = threading.Thread(target=model.generate, kwargs={**one, "streamer": streamer, "alpha": 0.5})
    thread.start()
    text = "".join(streamer)
    thread.join()
    out = model.generate(**one, alpha=0.5)
    assert text == tokenizer.decode(out[0, one["input_ids"].shape[1] :])


def test_calls_run_side_by_side(model: Any) -> None:
    """Several threads, other prompts and options each, on one model: the same tokens as one after the other."""
    options: list[dict[str, Any]] = [
        {},
        {"alpha": 0.2},
        {"forced_expert": 1},
        {"complementary": False},
        {"num_beams": 2},
    ]
    jobs = []
    for i in range(10):
        ids, mask = padded_prompts([3 + i, 8], seed=30 + i)
        jobs.append(
            {
                "input_ids": ids,
                "attention_mask": mask,
                "max_new_tokens": 12,
                "eos_token_id": None,
                "pad_token_id": 0,
                "output_routing": i % 2 == 0,
                **options[i % len(options)],
            }
        )
    alone = [model.generate(**job) for job in jobs]
    together: list[Any] = [None] * len(jobs)

    def run(i: int) -> None:
        together[i] = model.generate(**jobs[i])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for job, expected, got in zip(jobs, alone, together, strict=True):
        if job["output_routing"]:
            assert torch.equal(expected.sequences, got.sequences)
            assert [[t.expert for t in trace.tokens] for trace in expected.routing] == [
                [t.expert for t in trace.tokens] for trace in got.routing
            ]
        else:
            assert torch.equal(expected, got)


def first_tokens_and_experts(model: Any, tokens: list[int], start: int, count: int) -> tuple[list[int], list[int]]:
    """The oracle's greedy tokens after ``tokens[:start]``, as long as margins are wide, and the experts they are of."""
    found, experts = list(tokens[:start]), []
    for _ in range(count):
        with torch.no_grad():
            weights = model(input_ids=torch.tensor([found]), router_only=True, logits_to_keep=1).routing_weights[0, -1]
        logits = oracle_logits(model, found, int(weights.argmax()))
        best, route = logits.topk(2).values, weights.topk(2).values
        if best[0] - best[1] < 5e-4 * logits.abs().max() or route[0] - route[1] < 5e-4:
            break
        experts.append(int(weights.argmax()))
        found.append(int(logits.argmax()))
    return found[start:], experts


@pytest.mark.parametrize("seed", range(8))
def test_logits_of_a_whole_prompt_may_be_asked_for(seed: int) -> None:
    """The next token comes from the last position, whatever other positions selected: the run-everything oracle's."""
    model: Any = fusionroute(["llama", "qwen2", "mistral"], seed=seed)
    ids, mask = padded_prompts([4, 9, 6], seed=seed)
    prompts = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}
    out = model.generate(**prompts, logits_to_keep=0)
    for keep in (1, 3, 9):
        assert torch.equal(out, model.generate(**prompts, logits_to_keep=keep))
    assert torch.equal(out, model.generate(**prompts, logits_to_keep=0, output_scores=True))
    checked = 0
    for row, length in enumerate([4, 9, 6]):
        tokens = out[row, 9 - length :].tolist()
        expected, experts = first_tokens_and_experts(model, tokens, length, 6)
        assert tokens[length : length + len(expected)] == expected
        trace = model.generate(**prompts, logits_to_keep=0, output_routing=True).routing[row]
        assert [token.expert for token in trace.tokens][: len(experts)] == experts
        checked += len(expected)
    assert checked > 9


def test_how_many_logits_are_asked_for_changes_no_token(model: Any) -> None:
    heads = {seed: torch.randn(4, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(200)}
    kept = model.route_head.weight.detach().clone()
    try:
        for seed, head in heads.items():
            model.route_head.weight.data.copy_(head)
            ids, mask = padded_prompts([4, 9, 6, 7][: 1 + seed % 4], seed=seed)
            prompts = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 2, "eos_token_id": None}
            expected = model.generate(**prompts, pad_token_id=0)
            assert torch.equal(model.generate(**prompts, pad_token_id=0, logits_to_keep=seed % 3 * 2), expected), seed
    finally:
        model.route_head.weight.data.copy_(kept)


def test_as_many_positions_as_rows_that_selected_an_expert_are_not_taken_for_the_batch() -> None:
    """One expert selected at as many positions of the prompt as the batch has rows, by fewer rows at the last one."""
    found = 0
    for seed in range(40):
        model: Any = fusionroute(["llama", "qwen2"], seed=seed)
        ids, mask = padded_prompts([2, 2], seed=seed)
        with torch.no_grad():
            experts = model(input_ids=ids, attention_mask=mask, use_cache=False).expert_ids
        if not any((experts == expert).sum() == 2 and (experts[:, -1] == expert).sum() == 1 for expert in (0, 1)):
            continue
        found += 1
        prompts = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 1, "eos_token_id": None}
        with torch.no_grad():
            expected = [
                int(oracle_logits(model, row.tolist(), int(chosen[-1])).argmax())
                for row, chosen in zip(ids, experts, strict=True)
            ]
        assert model.generate(**prompts, pad_token_id=0, logits_to_keep=0)[:, -1].tolist() == expected
    assert found > 5


@pytest.mark.filterwarnings("ignore:.*right-padding was detected")
def test_prompts_that_end_in_padding_are_the_same_with_and_without_the_kernels(model: Any, prompts: Any) -> None:
    ids, mask = prompts["input_ids"].roll(-5, 1), prompts["attention_mask"].clone()
    mask[0, :], ids[0, :] = torch.tensor([1] * 4 + [0] * 5), torch.tensor([7, 8, 9, 10, 0, 0, 0, 0, 0])
    right = {**prompts, "input_ids": ids, "attention_mask": mask, "max_new_tokens": 4}
    assert torch.equal(model.generate(**right), model.generate(**right, output_scores=True))


# -------------------------------------------------------------------------------------------- logits that others change


class Bias(LogitsProcessor):
    """Notes what it saw and forbids all tokens but some, as a grammar does."""

    def __init__(self, allowed: list[int]) -> None:
        self.allowed, self.seen = allowed, []  # type: ignore[var-annotated]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.seen.append(scores.clone())
        masked = torch.full_like(scores, float("-inf"))
        masked[:, self.allowed] = scores[:, self.allowed]
        return masked


def test_constraints_act_on_the_fused_logits(model: Any, one: dict[str, Any]) -> None:
    allowed = [5, 17, 40, 120]
    grammar = Bias(allowed)
    out = model.generate(**one, logits_processor=LogitsProcessorList([grammar]))
    tokens = out[0].tolist()
    start = one["input_ids"].shape[1]
    assert set(tokens[start:]) <= set(allowed)
    assert len(set(tokens[start:])) > 1
    for step, seen in enumerate(grammar.seen):
        with torch.no_grad():
            weights = model(input_ids=torch.tensor([tokens[: start + step]]), router_only=True, logits_to_keep=1)
        expert = int(weights.routing_weights[0, -1].argmax())
        expected = oracle_logits(model, tokens[: start + step], expert)
        assert seen.dtype == torch.float32
        assert (seen[0] - expected).abs().max() <= 5e-5 * expected.abs().max()
        assert tokens[start + step] == allowed[int(expected[allowed].argmax())]


def test_sequence_bias_and_bad_words_act_on_the_fused_logits(model: Any, one: dict[str, Any]) -> None:
    greedy = model.generate(**one)[0].tolist()
    start = one["input_ids"].shape[1]
    assert model.generate(**one, bad_words_ids=[[greedy[start]]])[0, start] != greedy[start]
    assert model.generate(**one, sequence_bias={(77,): 1e4})[0, start:].eq(77).all()


def test_own_stopping_criteria_are_asked(model: Any, one: dict[str, Any]) -> None:
    class AfterFive(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            return torch.full((len(input_ids),), input_ids.shape[1] >= one["input_ids"].shape[1] + 5)

    out = model.generate(**one, stopping_criteria=StoppingCriteriaList([AfterFive()]))
    assert out.shape[1] == one["input_ids"].shape[1] + 5


# --------------------------------------------------------------------------------------------------------------- traces


def recomputed(model: Any, tokens: list[int], start: int, **options: Any) -> list[tuple[int, int, float, bool]]:
    """(token, expert, weight, overruled) of each new token, by plain forwards."""
    found = []
    for end in range(start, len(tokens)):
        ids = torch.tensor([tokens[:end]])
        with torch.no_grad():
            weights = model(input_ids=ids, router_only=True, logits_to_keep=1).routing_weights[0, -1]
            expert = int(weights.argmax())
            own = int(model.experts[expert].model(input_ids=ids).logits[0, -1, :VOCAB].argmax())
        found.append((tokens[end], expert, float(weights.softmax(-1)[expert]), tokens[end] != own))
    return found


TRACED: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "chunked prefill": {"prefill_chunk_size": 2},
    "scores": {"output_scores": True},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("mode", TRACED)
def test_the_trace_says_which_expert_wrote_each_token(model: Any, prompts: dict[str, Any], one: Any, mode: str) -> None:
    kwargs = one if mode == "prompt lookup" else prompts
    torch.manual_seed(0)
    out = model.generate(**kwargs, **TRACED[mode], output_routing=True)
    assert len(out.routing) == len(out.sequences)
    longest = kwargs["input_ids"].shape[1]
    per_prompt = len(out.sequences) // len(kwargs["input_ids"])
    overruled = 0
    for index, (sequence, trace) in enumerate(zip(out.sequences, out.routing, strict=True)):
        pad = longest - int(kwargs["attention_mask"][index // per_prompt].sum())
        tokens = sequence[pad:].tolist()
        assert trace.experts == tuple(model.experts.names)
        assert len(trace.tokens) == NEW
        for token, expected in zip(trace.tokens, recomputed(model, tokens, longest - pad), strict=True):
            assert (token.id, token.expert) == expected[:2]
            assert token.weight == pytest.approx(expected[2], abs=1e-4)
            assert token.overruled == expected[3]
            overruled += token.overruled
    assert overruled > 0


def test_traces_end_at_the_end_token(model: Any, prompts: dict[str, Any]) -> None:
    longest = prompts["input_ids"].shape[1]
    stop = int(model.generate(**prompts)[0, longest + 3])
    for extra in ({}, {"num_beams": 3}):
        out = model.generate(**{**prompts, "eos_token_id": stop}, output_routing=True, **extra)
        for sequence, trace in zip(out.sequences, out.routing, strict=True):
            new = sequence[longest:].tolist()
            length = new.index(stop) + 1 if stop in new else len(new)
            assert [token.id for token in trace.tokens] == new[:length]
    assert any(len(trace.tokens) < NEW for trace in out.routing) or extra


def test_traces_heed_a_generation_config_and_the_models_defaults(prompts: dict[str, Any]) -> None:
    model = fusionroute(FAMILIES)
    longest = prompts["input_ids"].shape[1]
    inputs = {name: prompts[name] for name in ("input_ids", "attention_mask")}
    model.generation_config.eos_token_id = int(model.generate(**prompts)[0, longest + 3])
    model.generation_config.pad_token_id = 0
    config = GenerationConfig(max_new_tokens=NEW)  # the end token is the model's
    assert len(model.generate(**inputs, generation_config=config, output_routing=True).routing[0].tokens) == 4
    beams = GenerationConfig(max_new_tokens=NEW, num_beams=3)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    given = model.generate(ids, beams, attention_mask=mask, output_routing=True)
    named = model.generate(**inputs, max_new_tokens=NEW, num_beams=3, output_routing=True)
    assert torch.equal(given.sequences, named.sequences)
    assert given.routing == named.routing
    assert "beam_indices" in given
    assert len(model.generate(max_new_tokens=5, eos_token_id=None, output_routing=True).routing[0].tokens) == 5


def test_a_trace_with_guidance_is_refused(model: Any, one: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"output_routing with guidance_scale=1\.5"):
        model.generate(**one, guidance_scale=1.5, output_routing=True)
    assert model.generate(**one, guidance_scale=1.5).shape == (1, one["input_ids"].shape[1] + NEW)


def test_a_trace_of_a_continued_conversation_covers_the_new_turn(model: Any, one: dict[str, Any]) -> None:
    first = model.generate(**one, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, torch.tensor([[9, 8, 7]])], dim=1)
    full = {**one, "input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 6}
    out = model.generate(**full, **{CACHE: first[CACHE]}, output_routing=True)
    tokens = out.sequences[0].tolist()
    assert [(t.id, t.expert) for t in out.routing[0].tokens] == [x[:2] for x in recomputed(model, tokens, ids.shape[1])]


# -------------------------------------------------------------------------------------------------------------- routing


def test_sampled_routes_follow_the_softmax(one: dict[str, Any]) -> None:
    model = fusionroute(FAMILIES, spread=0.1)
    with torch.no_grad():
        weights = model(input_ids=one["input_ids"], router_only=True, logits_to_keep=1).routing_weights[0, -1]
    torch.manual_seed(0)
    n = 4000
    out = model.generate(
        **{**one, "max_new_tokens": 1}, route="sample", do_sample=True, num_return_sequences=n, output_routing=True
    )
    counts = torch.bincount(torch.tensor([trace.tokens[0].expert for trace in out.routing]), minlength=4)
    expected = weights.softmax(-1) * n
    assert ((counts - expected) ** 2 / expected).sum() < 3 + 5 * 6**0.5
    assert (counts > 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"forced_expert": "nobody"}, "forced_expert names 'nobody'"),
        ({"forced_expert": 4}, "forced_expert names 4"),
        ({"allowed_experts": [["llama0"], []]}, "leaves a row without any expert"),
        ({"allowed_experts": ["llama0"], "forced_expert": 0}, "both given"),
        ({"allowed_experts": [["llama0"], [0]]}, "2 rows for a batch of 3"),
        ({"allowed_experts": torch.ones(3, 2, dtype=torch.bool)}, r"shape \[3, 2\]"),
        ({"allowed_experts": torch.ones(0, 4, dtype=torch.bool)}, "leaves a row without any expert"),
        ({"allowed_experts": 1.0}, "allowed_experts is 1.0: pass names or indices"),
        ({"allowed_experts": ["llama0", None]}, "allowed_experts is None: pass names or indices"),
        ({"forced_expert": 1.5}, "forced_expert is 1.5: pass names or indices"),
        ({"forced_expert": []}, r"forced_expert is \[\]: pass one expert for all rows, or one per row"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"route": "best"}, "route is 'best'"),
        ({"hysteresis": -1.0}, "hysteresis is -1.0"),
        ({"expert_prefill": "now"}, "expert_prefill is 'now'"),
        ({"expert_cache_budget": -1}, "expert_cache_budget is -1"),
    ],
)
def test_bad_options_are_named(model: Any, prompts: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.generate(**prompts, **options)


def test_allowed_experts_as_a_mask_and_as_names() -> None:
    names = ["a", "b", "c"]
    table = torch.tensor([[True, False, True], [False, True, False]])
    for given in (table, [["a", 2], ["b"]]):
        assert torch.equal(permitted(RoutingOptions(allowed_experts=given), names, 2, torch.device("cpu")), table)  # type: ignore[arg-type]
    repeated = permitted(RoutingOptions(allowed_experts=table), names, 4, torch.device("cpu"))
    assert repeated is not None
    assert torch.equal(repeated, table[[0, 0, 1, 1]])


def test_experts_may_be_given_as_numbers_of_any_kind() -> None:
    import numpy as np

    names, device = ["a", "b", "c"], torch.device("cpu")
    expected = permitted(RoutingOptions(forced_expert=1), names, 2, device)
    assert expected is not None
    for one in (np.int64(1), np.array([1]), torch.tensor(1), [np.int32(1)]):
        assert torch.equal(permitted(RoutingOptions(forced_expert=one), names, 2, device), expected)  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------------------------- forward


def test_forward_scores_all_positions_with_and_without_a_cache(model: Any) -> None:
    ids, mask = padded_prompts([5, 9], seed=40)
    with torch.no_grad():
        plain = model(input_ids=ids, attention_mask=mask)
        cached = model(input_ids=ids, attention_mask=mask, use_cache=True)
    real = mask.bool()
    scale = plain.logits[real].abs().max()
    assert plain.logits.shape == (2, 9, VOCAB)
    assert plain.logits.dtype == torch.float32
    assert torch.equal(plain.expert_ids, cached.expert_ids)
    assert plain.expert_ids[~real].eq(-1).all()
    assert (plain.logits[real] - cached.logits[real]).abs().max() <= 5e-5 * scale
    assert plain.logits.isfinite().all()
    assert len(plain.expert_ids[real].unique()) > 2
    for row in range(2):
        tokens = ids[row][real[row]].tolist()
        for end in range(1, len(tokens) + 1):
            column = 9 - len(tokens) + end - 1
            expected = oracle_logits(model, tokens[:end], int(plain.expert_ids[row, column]))
            assert (plain.logits[row, column] - expected).abs().max() <= 5e-5 * scale


def test_forward_keeps_the_positions_asked_for(model: Any) -> None:
    ids, mask = padded_prompts([9, 9], seed=41)
    with torch.no_grad():
        every = model(input_ids=ids, attention_mask=mask).logits
        some = model(input_ids=ids, attention_mask=mask, logits_to_keep=torch.tensor([2, 5])).logits
        last = model(input_ids=ids, attention_mask=mask, logits_to_keep=3, use_cache=True).logits
    torch.testing.assert_close(some, every[:, [2, 5]], rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(last, every[:, -3:], rtol=1e-5, atol=1e-3)


def test_forward_with_labels_is_the_cross_entropy_of_the_policy(model: Any) -> None:
    ids, mask = padded_prompts([7, 4], seed=42)
    labels = ids.masked_fill(mask == 0, -100)
    out = model(input_ids=ids, attention_mask=mask, labels=labels)
    logprobs = out.logits[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    expected = -logprobs[labels[:, 1:] != -100].mean()
    torch.testing.assert_close(out.loss, expected)
    model.zero_grad()
    out.loss.backward()
    assert model.router.get_output_embeddings().weight.grad.abs().sum() > 0
    assert model.route_head.weight.grad is None  # argmax passes no gradient
    assert all(weight.grad is None for expert in model.experts for weight in expert.model.parameters())
    model.zero_grad()


def test_router_only_runs_no_expert(model: Any) -> None:
    ids, mask = padded_prompts([7, 4], seed=43)

    def fail(*_: Any) -> None:
        raise AssertionError("an expert ran")

    handles = [expert.model.register_forward_pre_hook(fail) for expert in model.experts]
    out = model(input_ids=ids, attention_mask=mask, router_only=True)
    for handle in handles:
        handle.remove()
    assert out.logits.shape == (2, 7, VOCAB)
    assert out.routing_weights.shape == (2, 7, 4)
    assert out.routing_weights.requires_grad
    assert torch.equal(out.expert_ids, out.routing_weights.argmax(-1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": None}, "input_ids is None"),
        ({"attention_mask": torch.ones(1, 1, 3, 3)}, "attention_mask has 4 dimensions"),
        ({"attention_mask": torch.ones(1, 5)}, r"attention_mask has shape \[1, 5\]: pass \[1, 3\]"),
        ({"past_key_values": object()}, "FusionRouteCache of an earlier call"),
    ],
)
def test_bad_arguments_of_forward_are_named(model: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(**{"input_ids": torch.tensor([[5, 6, 7]]), **arguments})


def test_the_router_may_use_any_cache_of_transformers(model: Any, prompts: dict[str, Any]) -> None:
    greedy = model.generate(**prompts)
    assert torch.equal(model.generate(**prompts, cache_implementation="static"), greedy)


def test_a_model_without_experts_says_so() -> None:
    model = fusionroute(["llama"])
    object.__setattr__(model, "_experts", model.experts[:0])
    with pytest.raises(ValueError, match="no experts are loaded"):
        model(input_ids=torch.tensor([[5, 6]]))


def test_a_router_of_many_layers_keeps_its_backbone() -> None:
    model = fusionroute(["llama"])
    assert model.base_model is model.router.model
    assert model.get_decoder() is model.router.get_decoder()
    assert model.can_generate()
    assert isinstance(model.router, type(AutoModelForCausalLM.from_config(model.config.router_config)))


def test_forward_as_a_tuple(model: Any) -> None:
    with torch.no_grad():
        logits, weights, ids = model(torch.tensor([[5, 6, 7]]), use_cache=False, return_dict=False)
        expected = model(torch.tensor([[5, 6, 7]]), use_cache=False)
        labelled = model(torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]]))
    assert torch.equal(logits, expected.logits)
    assert torch.equal(logits, expected[0])
    assert [float(labelled[0]), labelled[1].shape] == [float(labelled.loss), logits.shape]
    assert torch.equal(weights, expected.routing_weights)
    assert torch.equal(ids, expected.expert_ids)


def test_threads_may_make_a_models_first_forward_together(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fusionroute(["llama"])
    head = model.get_output_embeddings()
    register = head.register_forward_pre_hook

    def slowly(hook: Any) -> Any:
        threading.Event().wait(0.05)  # so that every thread gets here, where nothing stops it
        return register(hook)

    monkeypatch.setattr(head, "register_forward_pre_hook", slowly)
    done: list[Any] = []
    threads = [
        threading.Thread(target=lambda: done.append(model(torch.tensor([[5, 6]]), router_only=True))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 3
    assert len(head._forward_pre_hooks) == 1


def test_a_loop_that_never_asks_for_a_cache_keeps_its_context(model: Any) -> None:
    ids = torch.randint(5, 190, (2, 9), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        whole = model(ids).logits[:, -1]
        first = model(ids[:, :-1])
        assert isinstance(getattr(first, CACHE), FusionRouteCache)
        last = model(ids[:, -1:], **{CACHE: getattr(first, CACHE)}).logits[:, -1]
        assert torch.allclose(whole, last, rtol=0, atol=1e-4 * float(whole.abs().max()))
        assert getattr(model(ids, labels=ids), CACHE) is None
        assert getattr(model(ids, use_cache=False), CACHE) is None


def test_continuous_batching_is_refused(model: Any) -> None:
    with pytest.raises(NotImplementedError, match="generate_batch"):
        model.generate_batch([[5, 6]])
