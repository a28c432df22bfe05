"""Drafts change no token: every mode against the same call without them, and a count of the forwards they save."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from fusionroute_ends import After, at_string
from fusionroute_oracle import VOCAB, fusionroute, padded_prompts, settled
from fusionroute_tiny import FAMILIES, SLIDING_FAMILIES, tiny_model
from transformers import AutoModelForCausalLM, DynamicCache, GPT2Config, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from ebpo_core.fusionroute import FusionRouteForCausalLM
from ebpo_core.fusionroute.compat import CACHE
from ebpo_core.fusionroute.decoding.drafts import _Length
from ebpo_core.kernels import select_add_sample

NEW = 20
SOME = 0.1  # an alpha with which the router alone is right at some positions and wrong at others


@pytest.fixture(scope="module")
def model() -> FusionRouteForCausalLM:
    return fusionroute(["llama", "qwen2", "mistral", "gemma3"])


@pytest.fixture(scope="module")
def prompts() -> dict[str, Any]:
    ids, mask = padded_prompts([4, 9, 6], seed=1)
    return {"input_ids": ids, "attention_mask": mask, "max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module")
def one(prompts: dict[str, Any]) -> dict[str, Any]:
    return {**prompts, "input_ids": prompts["input_ids"][1:2], "attention_mask": prompts["attention_mask"][1:2]}


class Forwards:
    """How often the router and each expert are called."""

    def __init__(self, model: FusionRouteForCausalLM) -> None:
        parts = [model.router, *(expert.model for expert in model.experts)]
        self.counts = [0] * len(parts)
        self._handles = [part.register_forward_pre_hook(self._hook(i)) for i, part in enumerate(parts)]

    def _hook(self, part: int) -> Any:
        def count(*_: Any) -> None:
            self.counts[part] += 1

        return count

    def __enter__(self) -> Forwards:
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()

    @property
    def experts(self) -> int:
        return sum(self.counts[1:])


def both(model: Any, arguments: dict[str, Any], draft_tokens: Any) -> tuple[Any, Any]:
    """The results without and with drafts, from the same random state."""
    torch.manual_seed(3)
    plain = model.generate(**arguments)
    torch.manual_seed(3)
    return plain, model.generate(**arguments, draft_tokens=draft_tokens)


# ------------------------------------------------------------------------------------------------------- equal tokens

MODES: dict[str, dict[str, Any]] = {
    "the paper's": {"alpha": 1.0},
    "some accepted": {},
    "all accepted": {"alpha": 0.0},
    "against the experts": {"alpha": -0.1},
    "routing only": {"complementary": False},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "filters": {"do_sample": True, "temperature": 0.6, "top_k": 30, "top_p": 0.9, "min_p": 0.01},
    "allowed": {"allowed_experts": [["llama0", "qwen21"], ["mistral2"], [3, "llama0"]]},
    "forced per row": {"forced_expert": [0, "mistral2", 3]},
    "hysteresis": {"hysteresis": 1.0},
    "eager": {"expert_prefill": "eager"},
    "budget": {"expert_cache_budget": 60_000},
    "chunked prefill": {"prefill_chunk_size": 4},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("draft_tokens", [1, 4, "auto"])
def test_tokens_are_those_without_drafts(model: Any, prompts: dict[str, Any], mode: str, draft_tokens: Any) -> None:
    plain, drafted = both(model, {**prompts, "alpha": SOME, **MODES[mode]}, draft_tokens)
    assert torch.equal(plain, drafted)
    assert len(set(drafted[0, 9:].tolist())) > 3  # a text that varies


def test_rows_of_a_batch_accept_different_lengths(model: Any, prompts: dict[str, Any]) -> None:
    from ebpo_core.fusionroute import FusionRouteCache

    removed: list[list[int]] = []
    realign = FusionRouteCache.realign
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            FusionRouteCache, "realign", lambda self, counts, *a: (removed.append(counts), realign(self, counts, *a))[1]
        )
        plain, drafted = both(model, {**prompts, "alpha": SOME}, 5)
    assert torch.equal(plain, drafted)
    assert any(len(set(counts)) > 1 for counts in removed)
    assert {0, 4} <= {count for counts in removed for count in counts}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_draft(family: str) -> None:
    """In float64, for several windows; the rows of Gemma 2, which has NaN where a row is padded, begin alike."""
    model: Any = fusionroute(["llama", family], router=family, dtype=torch.float64)
    ids, mask = padded_prompts([6, 6, 6] if family == "gemma2" else [3, 12, 6], seed=2)
    arguments = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 40, "eos_token_id": None, "alpha": SOME}
    plain, drafted = both(model, {**arguments, "pad_token_id": 0}, 4)
    assert torch.equal(plain, drafted)


@pytest.mark.parametrize("seed", range(4))
def test_tokens_are_the_oracles(seed: int) -> None:
    """Beside no cache at all, as far as float32 settles it."""
    model: Any = fusionroute(["llama", "mistral", "qwen3"], router="gemma3", seed=seed)
    ids, mask = padded_prompts([5, 11], seed=seed)
    arguments = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": NEW, "eos_token_id": None, "alpha": 0.2}
    drafted = model.generate(**arguments, pad_token_id=0, draft_tokens=3)
    plain = model.generate(**arguments, pad_token_id=0, use_cache=False)
    for row, length in enumerate([5, 11]):
        sure = settled(model, drafted[row, 11 - length :].tolist(), length, alpha=0.2)
        assert torch.equal(drafted[row, 11 : 11 + sure], plain[row, 11 : 11 + sure])


@pytest.mark.filterwarnings("ignore:.*right-padding was detected")
def test_prompts_that_end_in_padding(model: Any, prompts: dict[str, Any]) -> None:
    ids, mask = prompts["input_ids"].clone(), prompts["attention_mask"].clone()
    ids[0], mask[0] = torch.tensor([7, 8, 9, 10, 0, 0, 0, 0, 0]), torch.tensor([1] * 4 + [0] * 5)
    plain, drafted = both(model, {**prompts, "input_ids": ids, "attention_mask": mask, "alpha": SOME}, 4)
    assert torch.equal(plain, drafted)


def test_no_model_reads_beyond_its_positions() -> None:
    """Rows that rest, or need fewer tokens than a round has, go through the router all the same."""
    config = GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=2, n_positions=24, initializer_range=0.3)
    torch.manual_seed(0)
    router, expert = (AutoModelForCausalLM.from_config(config).eval() for _ in range(2))
    model: Any = FusionRouteForCausalLM.from_experts(router, {"one": expert, "two": tiny_model("llama", 3)})
    ids, mask = padded_prompts([3, 8, 5], seed=4)
    arguments = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 16, "eos_token_id": None, "alpha": SOME}
    plain, drafted = both(model, {**arguments, "pad_token_id": 0}, 7)
    assert plain.shape == (3, 24)
    assert torch.equal(plain, drafted)


# ------------------------------------------------------------------------------------------------------------ sampling


def test_injected_noise_gives_the_token_of_the_fused_policy(model: Any, one: dict[str, Any]) -> None:
    """Each token is the Gumbel-max draw of the policy with the noise of its seed and place, whatever was drafted."""
    torch.manual_seed(5)
    seed = torch.randint(2**63 - 1, (1,))
    torch.manual_seed(5)
    arguments = {**one, "do_sample": True, "top_k": 0, "temperature": 0.9, "alpha": SOME}
    tokens = model.generate(**arguments, draft_tokens=4)
    start = one["input_ids"].shape[1]
    with torch.no_grad():
        fused = model(input_ids=tokens, alpha=SOME, use_cache=False).logits[0, start - 1 : -1]
    drawn = select_add_sample(
        fused,
        torch.zeros(NEW, dtype=torch.int64),
        torch.zeros_like(fused),
        seed=seed.expand(NEW),
        step=torch.arange(start, start + NEW),
        temperature=0.9,
    ).token_ids
    assert torch.equal(tokens[0, start:], drawn)


def test_draws_follow_the_policy(model: Any, one: dict[str, Any]) -> None:
    """Chi-squared of three drafted tokens, all 27 texts that top-k leaves, against the products of their shares."""
    n, start = 3000, one["input_ids"].shape[1]
    sampling = {"do_sample": True, "top_k": 3, "temperature": 3.0, "alpha": SOME}
    torch.manual_seed(0)
    drawn = model.generate(**{**one, "max_new_tokens": 4}, **sampling, num_return_sequences=n, draft_tokens=3)[
        :, start:
    ]
    counts: dict[tuple[int, ...], int] = {}
    for row in drawn.tolist():
        counts[tuple(row)] = counts.get(tuple(row), 0) + 1
    texts = torch.tensor(sorted(counts))
    whole = torch.cat([one["input_ids"].expand(len(texts), -1), texts], dim=1)
    with torch.no_grad():
        logits = model(input_ids=whole, alpha=SOME, use_cache=False).logits[:, start - 1 : -1] / 3.0
    kept = logits >= logits.topk(3).values[..., -1:]
    logs = logits.masked_fill(~kept, float("-inf")).log_softmax(-1).gather(-1, texts[..., None])[..., 0]
    expected = logs.sum(-1).exp().double() * n
    seen = torch.tensor([counts[tuple(text)] for text in texts.tolist()]).double()
    assert bool(kept.gather(-1, texts[..., None]).all())
    likely = expected >= 5
    chi2 = float(((seen - expected)[likely] ** 2 / expected[likely]).sum())
    freedom = int(likely.sum())
    assert freedom > 20
    assert chi2 < freedom + 5 * (2 * freedom) ** 0.5


# --------------------------------------------------------------------------------------------- ends, streams and traces


class Columns(BaseStreamer):
    def __init__(self) -> None:
        self.seen: list[list[int]] = []
        self.ended = False

    def put(self, value: Any) -> None:
        self.seen.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


ENDS = ["length", "end token", "criterion", "criterion and end token", "string"]


def ending(kind: str, model: Any, prompts: dict[str, Any]) -> dict[str, Any]:
    longest = prompts["input_ids"].shape[1]
    free = model.generate(**prompts, alpha=SOME)
    found: dict[str, Any] = {}
    if "end token" in kind:
        found["eos_token_id"] = [int(free[0, longest + 3]), int(free[1, longest + 10])]
    if "criterion" in kind:
        found["stopping_criteria"] = StoppingCriteriaList([After(longest, [9, 2, 14])])
    if kind == "string":
        found |= at_string(*(int(free[row, longest + at]) for row, at in ((0, 5), (1, 2), (2, 11))))
    return found


@pytest.mark.parametrize("kind", ENDS)
@pytest.mark.parametrize("sampled", [{}, {"do_sample": True, "top_k": 5}], ids=["greedy", "sampled"])
def test_rows_end_where_they_end_without_drafts(model: Any, prompts: dict[str, Any], kind: str, sampled: Any) -> None:
    """So do traces; streamers and criteria see the same columns in the same order."""
    found, columns, criteria = [], [], []
    for drafts in ({}, {"draft_tokens": 4}):
        arguments = {**prompts, "alpha": SOME, **sampled, **ending(kind, model, prompts)}
        columns.append(Columns())
        torch.manual_seed(1)
        found.append(model.generate(**arguments, streamer=columns[-1], output_routing=True, **drafts))
        criteria.append([each.seen for each in arguments.get("stopping_criteria", [])])
    plain, drafted = found
    assert torch.equal(plain.sequences, drafted.sequences)
    assert plain.sequences.shape[1] < 9 + NEW or kind != "criterion and end token"
    assert columns[0].seen == columns[1].seen
    assert columns[1].ended
    for before, after in zip(*criteria, strict=True):
        assert all(map(torch.equal, before, after))
        assert len(before) == len(after)
    for one, other in zip(plain.routing, drafted.routing, strict=True):
        assert [(t.id, t.expert, t.overruled) for t in one.tokens] == [
            (t.id, t.expert, t.overruled) for t in other.tokens
        ]
        assert [t.weight for t in one.tokens] == pytest.approx([t.weight for t in other.tokens], abs=1e-4)


class Keeps(BaseStreamer):
    """Wipes the tokens that it was shown, once it has noted them."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def put(self, value: Any) -> None:
        if value.ndim == 1:  # a column, not the prompts
            self.seen.append(value.tolist())
            value.zero_()

    def end(self) -> None:
        pass


class ThirdEnd(StoppingCriteria):
    """Ends a row at its third end token, which is none to anybody else; views its input as one line."""

    def __init__(self, ends: Any) -> None:
        self.eos_token_id = ends

    def __call__(self, input_ids: Any, *_: Any, **__: Any) -> Any:
        ends = torch.isin(input_ids.view(-1), torch.as_tensor(self.eos_token_id)).view(input_ids.shape)
        return ends[:, 9:].sum(1) >= 3


@pytest.mark.parametrize("kind", ["tensor", "number"])
def test_what_others_do_with_what_they_are_shown(model: Any, prompts: dict[str, Any], kind: str) -> None:
    """Criteria and streamers own their tensors, and only a criterion itself knows what its attributes mean."""
    free = model.generate(**prompts, alpha=SOME)[:, 9:]
    ends = free[:, :12].flatten() if kind == "tensor" else int(free[0, 3])
    found, columns = [], []
    for drafts in ({}, {"draft_tokens": 4}):
        columns.append(Keeps())
        criteria = StoppingCriteriaList([ThirdEnd(ends)])
        arguments = {**prompts, "alpha": SOME, "streamer": columns[-1], "stopping_criteria": criteria, **drafts}
        found.append(model.generate(**arguments))
    assert torch.equal(*found)
    assert columns[0].seen == columns[1].seen
    assert (found[0].shape[1] == 9 + 3) == (kind == "tensor")


@pytest.mark.parametrize("router", ["llama", "mistral", "gemma3"])
@pytest.mark.parametrize("kind", ENDS)
def test_a_conversation_goes_on_from_the_cache(router: str, kind: str) -> None:
    """The returned cache holds the columns of the sequences, whatever rows wrote beyond their ends or short of them."""
    model: Any = fusionroute(["llama", "mistral"], router=router)
    ids, mask = padded_prompts([4, 9, 6], seed=1)
    prompts = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0}
    arguments = {**prompts, "alpha": SOME, "return_dict_in_generate": True, **ending(kind, model, prompts)}
    first = model.generate(**arguments, draft_tokens=4)
    cache = first[CACHE]
    grown = first.sequences.shape[1] - ids.shape[1]
    assert cache.get_seq_length() == cache.columns == first.sequences.shape[1] - 1
    assert torch.equal(cache.history.ids, first.sequences[:, :-1])
    turn = torch.cat([first.sequences, padded_prompts([5, 5, 5], seed=2)[0]], dim=1)
    seen = torch.cat([mask, torch.ones(3, grown + 5, dtype=torch.int64)], dim=1)
    second = {**prompts, "input_ids": turn, "attention_mask": seen, "alpha": SOME, "max_new_tokens": 1}
    second |= {"output_logits": True, "return_dict_in_generate": True}
    held = model.generate(**second, **{CACHE: cache}).logits[0]
    whole = model.generate(**second, use_cache=False).logits[0]
    assert (held - whole).abs().max() <= 5e-5 * whole.abs().max()


def test_a_cache_forgets_what_a_row_wrote_beyond_its_end(model: Any, one: dict[str, Any]) -> None:
    """Also where that is as much as the other row's text, at the same pace."""
    ids = one["input_ids"].repeat(2, 1)
    two = {**one, "input_ids": ids, "attention_mask": torch.ones_like(ids), "alpha": 0.0}
    unused = next(token for token in range(3, VOCAB) if token not in model.generate(**two))
    start = ids.shape[1]
    out = model.generate(
        **{**two, "eos_token_id": unused},
        stopping_criteria=StoppingCriteriaList([After(start, [3, 9])]),
        return_dict_in_generate=True,
        draft_tokens=8,
    )
    assert out.sequences.shape[1] == start + 9
    assert out.sequences[0, start + 3 :].eq(0).all()
    assert torch.equal(out[CACHE].history.ids, out.sequences[:, :-1])
    assert max(state.cache.lengths[0] for state in out[CACHE].states) <= start + 3


def test_drafts_go_on_from_a_cache(model: Any, prompts: dict[str, Any]) -> None:
    for drafts in ({}, {"draft_tokens": 3}):
        first = model.generate(**prompts, alpha=SOME, return_dict_in_generate=True, **drafts)
        ids = torch.cat([first.sequences, torch.tensor([[9, 8, 7]] * 3)], dim=1)
        mask = torch.cat([prompts["attention_mask"], torch.ones(3, NEW + 3, dtype=torch.int64)], dim=1)
        second = {**prompts, "input_ids": ids, "attention_mask": mask, "alpha": SOME}
        expected = model.generate(**second)
        assert torch.equal(model.generate(**second, **{CACHE: first[CACHE]}, draft_tokens=4), expected)
        assert first[CACHE].columns == expected.shape[1] - 1  # the cache that was given is kept up too


# -------------------------------------------------------------------------------------------------- forwards per token


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "temperature": 1.5}], ids=["greedy", "sampled"])
def test_accepted_drafts_cost_one_expert_forward_a_round(model: Any, one: dict[str, Any], sampling: Any) -> None:
    """With alpha 0 the router is always right: k of its forwards and one of the expert write k tokens."""
    arguments = {**one, "alpha": 0.0, "forced_expert": 2, **sampling}
    with Forwards(model) as plain:
        model.generate(**arguments)
    assert plain.counts == [NEW, 0, 0, NEW, 0]  # the prompt gives the first token
    with Forwards(model) as drafted:
        model.generate(**arguments, draft_tokens=4)
    rounds = -(-(NEW - 1) // 4)
    assert drafted.counts == [NEW, 0, 0, 1 + rounds, 0]  # the last round is as long as the text needs


@pytest.mark.parametrize("draft_tokens", [16, "auto"])
def test_the_router_drafts_nothing_behind_its_end_token(model: Any, prompts: Any, draft_tokens: Any) -> None:
    """In a batch: until all rows have one."""
    arguments = {**prompts, "alpha": 0.0}
    new = model.generate(**arguments)[:, 9:].tolist()
    ends = [row[at] for row, at in zip(new, (5, 8, 2), strict=True)]
    longest = max(min(row.index(end) for end in ends if end in row) + 1 for row in new)
    with Forwards(model) as drafted:
        out = model.generate(**{**arguments, "eos_token_id": ends}, draft_tokens=draft_tokens)
    assert out.shape[1] == 9 + longest
    assert drafted.counts[0] == longest


def test_forwards_are_those_of_the_rounds(model: Any, one: dict[str, Any]) -> None:
    """What is accepted can be told from the tokens: where the router's own are those of the sum."""
    k = 4
    tokens = model.generate(**one, alpha=SOME)
    start = one["input_ids"].shape[1]
    with torch.no_grad():
        out = model(input_ids=tokens, alpha=SOME, use_cache=False)
        own = model.router(input_ids=tokens, use_cache=False).logits[0, :, :VOCAB].argmax(-1)
    right = (own[start - 1 : -1] == tokens[0, start:]).tolist()
    assert 0.2 < sum(right) / NEW < 0.95
    at, routers, chunks = 1, 1, 0
    while at < NEW:
        length = min(k, NEW - at)
        guessed = list(itertools.takewhile(bool, right[at : at + length - 1]))
        routers, chunks, at = routers + length, chunks + 1, at + len(guessed) + 1
    with Forwards(model) as drafted:
        assert torch.equal(model.generate(**one, alpha=SOME, draft_tokens=k), tokens)
    assert drafted.counts[0] == routers
    assert 1 + chunks <= drafted.experts <= 1 + chunks * min(k, len(out.expert_ids.unique()))
    with Forwards(model) as forced:
        model.generate(**one, alpha=SOME, draft_tokens=k, forced_expert=1)
    assert forced.counts[1] == forced.counts[3] == forced.counts[4] == 0


def test_rejected_drafts_leave_no_trace_in_the_experts_caches(model: Any, one: dict[str, Any]) -> None:
    out = model.generate(**one, draft_tokens=6, return_dict_in_generate=True)
    read = out.sequences.shape[1] - 1
    assert out[CACHE].history.lengths == [read]
    assert all(state.cache.lengths[0] <= read for state in out[CACHE].states)


def test_auto_drafts_where_the_router_is_right(model: Any, one: dict[str, Any]) -> None:
    """Forwards per token fall towards the longest round's, and to those without drafts where no guess is right."""
    arguments = {**one, "max_new_tokens": 60, "forced_expert": 0}
    with Forwards(model) as right:
        model.generate(**arguments, alpha=0.0, draft_tokens="auto")
    with Forwards(model) as wrong:
        model.generate(**arguments, alpha=-3.0, draft_tokens="auto")
    assert sum(right.counts) < 60 * 1.25
    assert 60 * 2 <= sum(wrong.counts) < 60 * 2.4


def test_the_length_that_costs_least(model: Any, one: dict[str, Any]) -> None:
    """The choice is the minimum of (k + c) (1 - a) / (1 - a^k)."""
    cache = model(input_ids=one["input_ids"], use_cache=True)[CACHE]
    for a, c in ((0.05, 1.0), (0.5, 1.0), (0.9, 1.0), (0.9, 4.0), (0.98, 7.0)):
        length = _Length("auto", model, cache)
        length._accepted, length._tried, length._cost, length._rounds = 100 * a, 100.0, 10 * c, 10.0
        assert length.next() == min(range(1, 17), key=lambda k, a=a, c=c: (k + c) * (1 - a) / (1 - a**k))  # type: ignore[misc]
    assert _Length(5, model, cache).next() == 5


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"draft_tokens": 0}, "draft_tokens is 0: pass 1 to 64"),
        ({"draft_tokens": True}, "draft_tokens is True"),
        ({"draft_tokens": "many"}, "draft_tokens is 'many'"),
        ({"draft_tokens": 65}, "draft_tokens is 65"),
        ({"draft_tokens": np.array([2, 3])}, r"draft_tokens is array\(\[2, 3\]\)"),
        ({CACHE: DynamicCache()}, "is a DynamicCache: pass the FusionRouteCache"),
        ({"num_beams": 2}, "draft_tokens=4 with beam_search"),
        ({"num_beams": 2, "do_sample": True}, "draft_tokens=4 with beam_sample"),
        ({"prompt_lookup_num_tokens": 3}, "draft_tokens=4 with assisted_generation"),
        ({"use_cache": False}, "draft_tokens=4 with use_cache=False"),
        ({"output_scores": True}, "draft_tokens=4 with output_scores=True"),
        ({"output_logits": True}, "draft_tokens=4 with output_logits=True"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "draft_tokens=4 with output_attentions=True"),
        ({"repetition_penalty": 1.3}, "draft_tokens=4 with a RepetitionPenaltyLogitsProcessor"),
        ({"min_new_tokens": 3, "eos_token_id": 2}, "draft_tokens=4 with a MinLengthLogitsProcessor"),
        ({"do_sample": True, "typical_p": 0.9}, "draft_tokens=4 with a TypicalLogitsWarper"),
        ({"guidance_scale": 1.5}, "draft_tokens=4 with a UnbatchedClassifierFreeGuidanceLogitsProcessor"),
        ({"cache_implementation": "static"}, "draft_tokens=4 with cache_implementation"),
        ({"cache_implementation": "offloaded"}, "draft_tokens=4 with cache_implementation"),
        ({"custom_generate": lambda *_, **__: None}, "draft_tokens=4 with custom_generate"),
        ({"active_rows": torch.ones(3, dtype=torch.bool)}, "draft_tokens=4 with active_rows"),
    ],
)
def test_what_does_not_go_with_drafts_is_refused_by_name(
    model: Any, prompts: dict[str, Any], arguments: dict[str, Any], message: str
) -> None:
    with Forwards(model) as forwards, pytest.raises(ValueError, match=message):
        model.generate(**{**prompts, "draft_tokens": 4, **arguments})
    assert not any(forwards.counts)


def test_more_drafts_than_a_window_sees_are_refused(prompts: dict[str, Any]) -> None:
    for family in SLIDING_FAMILIES:
        model: Any = fusionroute(["llama"], router=family)
        with pytest.raises(ValueError, match="draft_tokens is 9, and the router's windows see 8 tokens: pass 8"):
            model.generate(**prompts, draft_tokens=9)
    model.generate(**{**prompts, "max_new_tokens": 4}, draft_tokens="auto")


@pytest.mark.parametrize("place", ["router", "expert"])
def test_recurrent_layers_are_refused(place: str) -> None:
    from transformers import Lfm2Config

    config = Lfm2Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
    )
    parts = [AutoModelForCausalLM.from_config(config), tiny_model("llama", 1)]
    router, expert = parts if place == "router" else parts[::-1]
    model: Any = FusionRouteForCausalLM.from_experts(router, {"other": expert})
    who = "LinearAttention.*Layers in the router" if place == "router" else "expert 'other'"
    with Forwards(model) as forwards, pytest.raises(ValueError, match=f"draft_tokens='auto' with {who}"):
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, draft_tokens="auto")
    assert not any(forwards.counts)
