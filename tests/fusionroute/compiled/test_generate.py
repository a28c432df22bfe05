"""``generate`` with compiled experts: the definition's tokens, two forwards a token, one cache, every mode."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from fusionroute_compiled import definition, load_compiled, save_compiled
from fusionroute_oracle import fusionroute, padded_prompts
from torch import Tensor

from ebpo_core.fusionroute import FusionRouteForCausalLM
from ebpo_core.fusionroute.compat import CACHE

NEW = 14


@pytest.fixture(scope="module", params=["llama", "mistral", "gemma3"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_compiled(tmp_path_factory.mktemp("compiled") / request.param, request.param)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> FusionRouteForCausalLM:
    return load_compiled(checkpoint, torch.float64)


def greedy(model: FusionRouteForCausalLM, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Any:
    mask = torch.ones_like(ids) if mask is None else mask
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
    return model.generate(ids, attention_mask=mask, **settings)


def by_definition(model: FusionRouteForCausalLM, folder: Path, prompt: list[int], count: int = NEW) -> list[int]:
    """Greedy tokens, each from the whole text anew."""
    text = list(prompt)
    for _ in range(count):
        logits, _ = definition(model, folder, text)
        text.append(int(logits[-1].argmax()))
    return text


def test_greedy_is_the_definition(model: FusionRouteForCausalLM, checkpoint: Path) -> None:
    prompt = padded_prompts([11], 1)[0]
    assert greedy(model, prompt)[0].tolist() == by_definition(model, checkpoint, prompt[0].tolist())


def test_padded_rows_are_those_alone_and_traces_name_their_experts(model: FusionRouteForCausalLM) -> None:
    lengths = [3, 12, 7]
    ids, mask = padded_prompts(lengths, 2)
    out = greedy(model, ids, mask, output_routing=True)
    for row, length in enumerate(lengths):
        alone = greedy(model, ids[row : row + 1, -length:], output_routing=True)
        assert out.sequences[row, -NEW:].tolist() == alone.sequences[0, -NEW:].tolist()
        assert [token.expert for token in out.routing[row].tokens] == [t.expert for t in alone.routing[0].tokens]


def test_beams_are_those_of_decoding_without_a_cache(model: FusionRouteForCausalLM) -> None:
    ids, mask = padded_prompts([6, 9], 3)
    kwargs = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 10}
    assert torch.equal(greedy(model, ids, mask, **kwargs), greedy(model, ids, mask, use_cache=False, **kwargs))


@pytest.mark.parametrize("drafts", [2, 5, "auto"])
def test_drafts_give_the_same_tokens(model: FusionRouteForCausalLM, drafts: Any) -> None:
    ids, mask = padded_prompts([4, 10, 7], 5)
    plain = greedy(model, ids, mask, max_new_tokens=25)
    assert torch.equal(plain, greedy(model, ids, mask, max_new_tokens=25, draft_tokens=drafts))


def test_sampled_drafts_give_the_same_tokens(model: FusionRouteForCausalLM) -> None:
    ids, mask = padded_prompts([4, 10], 6)
    sampling = {"do_sample": True, "top_k": 20, "temperature": 1.5}
    texts = []
    for drafts in (1, 4):
        torch.manual_seed(0)
        texts.append(greedy(model, ids, mask, draft_tokens=drafts, **sampling))
    assert torch.equal(*texts)


def test_prompt_lookup_gives_the_same_tokens(model: FusionRouteForCausalLM) -> None:
    ids, _ = padded_prompts([6], 5)
    ids = torch.cat([ids, ids, ids], dim=1)  # something to look up, longer than the window
    expected = greedy(model, ids, max_new_tokens=20)
    assert torch.equal(greedy(model, ids, max_new_tokens=20, prompt_lookup_num_tokens=3), expected)


def test_a_returned_cache_goes_on(model: FusionRouteForCausalLM) -> None:
    ids, mask = padded_prompts([5, 8], 7)
    whole = greedy(model, ids, mask, max_new_tokens=12)
    first = greedy(model, ids, mask, max_new_tokens=5, return_dict_in_generate=True)
    longer = torch.cat([mask, torch.ones(2, 5, dtype=torch.int64)], dim=1)
    rest = greedy(model, first.sequences, longer, max_new_tokens=7, **{CACHE: first[CACHE]})
    assert torch.equal(rest, whole)


def test_hysteresis_streaming_static_caches_and_chunked_prompts(model: FusionRouteForCausalLM) -> None:
    class Streamer:
        def __init__(self) -> None:
            self.seen: list[Tensor] = []

        def put(self, tokens: Tensor) -> None:
            self.seen.append(tokens)

        def end(self) -> None:
            self.seen.append(torch.tensor([-1]))

    ids, _ = padded_prompts([13], 8)
    expected = greedy(model, ids)
    streamer = Streamer()
    greedy(model, ids, streamer=streamer)
    assert torch.cat([part.flatten() for part in streamer.seen]).tolist() == [*expected[0].tolist(), -1]
    assert torch.equal(greedy(model, ids, cache_implementation="static"), expected)
    assert torch.equal(greedy(model, ids, prefill_chunk_size=5), expected)
    held = greedy(model, ids, hysteresis=0.3, output_routing=True)
    again = greedy(model, ids, hysteresis=0.3, output_routing=True, use_cache=False)
    assert torch.equal(held.sequences, again.sequences)
    assert held.routing[0] == again.routing[0]


def test_a_cache_of_uncompiled_experts_is_refused_and_the_reverse(tmp_path: Path) -> None:
    compiled = load_compiled(save_compiled(tmp_path, "llama"))
    models = [compiled, fusionroute(["llama"] * 3, "llama")]
    ids, _ = padded_prompts([4], 1)
    for model, other in (models, models[::-1]):
        cache = model(input_ids=ids, use_cache=True)[CACHE]
        with pytest.raises(ValueError, match=r"the cache is of a model whose experts have caches \[.*compiled"):
            other(input_ids=ids[:, :1], use_cache=True, **{CACHE: cache})
        assert cache.columns == 4


class Columns:
    """Counts the columns that go through the router's first layer, and keys that a cache keeps."""

    def __init__(self, model: FusionRouteForCausalLM) -> None:
        self.calls: list[int] = []
        layer = model.router.model.layers[0]
        self._handle = layer.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, _layer: Any, inputs: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        hidden = inputs[0] if inputs else kwargs["hidden_states"]
        self.calls.append(hidden.shape[1])

    def __enter__(self) -> Columns:
        return self

    def __exit__(self, *_: Any) -> None:
        self._handle.remove()


def test_one_adapted_token_per_token_and_no_second_cache(model: FusionRouteForCausalLM) -> None:
    ids, mask = padded_prompts([9, 9, 9, 9], 9)
    with Columns(model) as columns:
        out = greedy(model, ids, mask, return_dict_in_generate=True, output_routing=True)
    selected = {token.expert for trace in out.routing for token in trace.tokens}
    assert len(selected) == 3  # however many experts the rows select
    assert columns.calls == [9, 1] + [1, 1] * (NEW - 1)
    cache = out[CACHE]
    assert cache.states == []
    assert cache.expert_bytes == 0
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    alone = model.router.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
    )
    assert held == sum(layer.keys.nbytes + layer.values.nbytes for layer in alone[CACHE].layers)


def test_drafts_are_verified_in_one_adapted_chunk(model: FusionRouteForCausalLM) -> None:
    ids, _ = padded_prompts([9], 9)
    with Columns(model) as columns:
        greedy(model, ids, draft_tokens=4, max_new_tokens=9)
    assert columns.calls[:2] == [9, 1]
    rounds, at = 0, 2
    while at < len(columns.calls):  # k steps of the router, then one chunk of k
        k = next(n for n in range(1, 5) if (columns.calls[at + n] == n and n > 1) or at + n + 1 == len(columns.calls))
        assert columns.calls[at : at + k] == [1] * k
        rounds, at = rounds + 1, at + k + 1
    assert 1 < rounds <= 8


@pytest.mark.parametrize(
    "options", [{"expert_prefill": "eager"}, {"expert_cache_budget": 1000}], ids=["prefill", "budget"]
)
def test_options_of_caches_are_refused(model: FusionRouteForCausalLM, options: dict[str, Any]) -> None:
    ids, _ = padded_prompts([4], 1)
    with pytest.raises(ValueError, match=f"{next(iter(options))}=.* compiled: they have no caches"):
        greedy(model, ids, **options)
    with pytest.raises(ValueError, match="compiled: they have no caches"):
        model(input_ids=ids, **options)


def test_a_deep_copy_has_the_copied_router(model: FusionRouteForCausalLM) -> None:
    twin = copy.deepcopy(model)
    assert twin.compiled is not None
    assert twin.compiled.router is twin.router
    ids, _ = padded_prompts([6], 1)
    expected = greedy(model, ids)
    with torch.no_grad():
        for weight in model.router.parameters():
            weight.mul_(0.5)
        try:
            assert torch.equal(greedy(twin, ids), expected)
        finally:
            for weight in model.router.parameters():
                weight.mul_(2.0)
