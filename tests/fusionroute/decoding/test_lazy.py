"""Lazy experts are exact, and lazy: the run-everything oracle and a count of forwarded tokens, six families."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest
import torch
from fusionroute_oracle import fusionroute, oracle_logits, padded_prompts, softmax_in_the_models_dtype
from fusionroute_tiny import FAMILIES, SLIDING_FAMILIES, tiny_model
from torch import Tensor

from ebpo_core.fusionroute import FusionRouteCache, FusionRouteForCausalLM
from ebpo_core.fusionroute.compat import CACHE

WINDOW = 8


@pytest.fixture(autouse=True)
def exact_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    softmax_in_the_models_dtype(monkeypatch)


class Conversation:
    """Teacher-forced decoding of a batch: random tokens, forced experts, beside the rows as plain lists."""

    def __init__(self, model: FusionRouteForCausalLM, lengths: list[int], seed: int) -> None:
        self.model, self.random = model, random.Random(seed)
        self.ids, self.mask = padded_prompts(lengths, seed)
        longest = self.ids.shape[1]
        self.rows = [self.ids[row, longest - length :].tolist() for row, length in enumerate(lengths)]
        self.cache: FusionRouteCache | None = None
        self.last_selected: list[dict[int, int]] = [{} for _ in lengths]  # expert -> length then

    @torch.no_grad()
    def step(self, experts: list[int]) -> Tensor:
        """Fused logits ``[B, V]`` when row b selects ``experts[b]``; checked by the caller."""
        out = self.model(
            input_ids=self.ids,
            attention_mask=self.mask,
            use_cache=True,
            logits_to_keep=1,
            forced_expert=torch.tensor(experts),
            **{CACHE: self.cache},
        )
        self.cache = out[CACHE]
        for row, expert in enumerate(experts):
            self.last_selected[row][expert] = len(self.rows[row])
        self._append(1)
        return out.logits[:, -1]

    def _append(self, count: int) -> None:
        new = [[self.random.randrange(3, 200) for _ in range(count)] for _ in self.rows]
        for row, tokens in zip(self.rows, new, strict=True):
            row.extend(tokens)
        self.ids = torch.tensor(new)
        self.mask = torch.cat([self.mask, torch.ones(len(new), count, dtype=torch.int64)], dim=1)

    def worst(self, logits: Tensor, experts: list[int]) -> float:
        """Largest difference to the oracle, over the largest logit; call after ``step``: rows have grown by one."""
        errors = []
        for row, expert in enumerate(experts):
            expected = oracle_logits(self.model, self.rows[row][:-1], expert)
            errors.append(((logits[row] - expected).abs().max() / expected.abs().max()).item())
        return max(errors)

    def reorder(self, parents: list[int]) -> None:
        """As beam search: row b goes on from row ``parents[b]``. The pending token stays."""
        assert self.cache is not None
        self.cache.reorder_cache(torch.tensor(parents))
        pending = [row[-1] for row in self.rows]
        self.rows = [[*self.rows[parent][:-1], token] for parent, token in zip(parents, pending, strict=True)]
        self.last_selected = [dict(self.last_selected[parent]) for parent in parents]
        self.mask = torch.cat([self.mask[parents, :-1], self.mask[:, -1:]], dim=1)

    def crop(self, count: int) -> None:
        """Take back the last ``count`` tokens that were forwarded; the pending one takes their place."""
        assert self.cache is not None
        self.cache.crop(-count)
        self.rows = [[*row[: -count - 1], row[-1]] for row in self.rows]
        self.mask = self.mask[:, :-count]


def schedule(seed: int, rows: int, experts: int, steps: int, sticky: float = 0.0) -> list[list[int]]:
    """Experts of each step and row; ``sticky`` is the chance that a row keeps its own."""
    rng = random.Random(seed)
    plan = [[rng.randrange(experts) for _ in range(rows)]]
    for _ in range(steps - 1):
        plan.append([old if rng.random() < sticky else rng.randrange(experts) for old in plan[-1]])
    return plan


class Counter:
    """What really went through an expert: rows of each forward, and its tokens without the padding of short rows."""

    def __init__(self, model: Any) -> None:
        self.rows: list[int] = []
        self.tokens = 0
        self.handle = model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, _module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        if not kwargs["use_cache"]:
            return  # the oracle's
        positions = kwargs["position_ids"]
        assert kwargs["input_ids"].shape == positions.shape
        self.rows.append(len(positions))
        self.tokens += sum(len(set(row)) for row in positions.tolist())  # padding repeats the first position


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-9), (torch.float32, 5e-5)])
def test_teacher_forced_logits_are_the_oracles(family: str, dtype: torch.dtype, bound: float) -> None:
    model = fusionroute([family] * 3, dtype=dtype)
    talk = Conversation(model, [3, 9, 6, 12], seed=1)
    for experts in schedule(2, rows=4, experts=3, steps=30):
        assert talk.worst(talk.step(experts), experts) <= bound


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_the_router(family: str) -> None:
    model = fusionroute(["llama", "qwen2"], router=family, dtype=torch.float64)
    talk = Conversation(model, [7, 7], seed=3)  # unpadded: transformers' own Gemma 2 gives NaN where a row is padded
    for experts in schedule(4, rows=2, experts=2, steps=20):
        assert talk.worst(talk.step(experts), experts) <= 1e-9


@pytest.mark.parametrize("family", SLIDING_FAMILIES)
@pytest.mark.parametrize("windows", [1, 2, 3])
@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_catching_up_on_several_windows_at_once(family: str, windows: int, extra: int) -> None:
    """Row 0 leaves expert 1 for one to three windows, then comes back, while row 1 keeps it."""
    model = fusionroute([family, family], dtype=torch.float64)
    talk = Conversation(model, [2 * WINDOW, 5], seed=windows)
    away = windows * WINDOW + extra
    for experts in [[1, 1], *[[0, 1]] * away, [1, 1], [1, 0], [1, 1]]:
        assert talk.worst(talk.step(experts), experts) <= 1e-9


def test_a_window_keeps_no_more_than_it_needs_and_stays_exact() -> None:
    model = fusionroute(["mistral"], dtype=torch.float64)
    talk = Conversation(model, [600, 90], seed=5)
    first = talk.step([0, 0])
    assert talk.worst(first, [0, 0]) <= 1e-9
    assert talk.cache is not None
    (group,) = talk.cache.states[0].cache.columns.values()
    assert group.capacity < 300  # of 600 tokens read, a window of 8 and what may be rolled back
    for _ in range(200):
        logits = talk.step([0, 0])
    assert talk.worst(logits, [0, 0]) <= 1e-9
    assert group.capacity < 300


@pytest.mark.parametrize("family", FAMILIES)
def test_reordered_and_cropped_caches_stay_exact(family: str) -> None:
    model = fusionroute([family] * 3, dtype=torch.float64)
    talk = Conversation(model, [4, 11, 7], seed=7)
    rng = random.Random(8)
    for step, experts in enumerate(schedule(9, rows=3, experts=3, steps=45)):
        assert talk.worst(talk.step(experts), experts) <= 1e-9
        if step % 4 == 1:
            talk.reorder([rng.randrange(3) for _ in range(3)])
        if step % 7 == 5:
            talk.cache.activate_past_recording()  # type: ignore[union-attr] -- the router's windows
        if step % 7 == 6:
            talk.crop(1)


def test_a_deep_crop_makes_a_windowed_expert_start_anew() -> None:
    model = fusionroute(["mistral", "llama"], router="llama", dtype=torch.float64)
    talk = Conversation(model, [5, 8], seed=10)
    for _ in range(400):
        talk.step([0, 0])
    talk.crop(250)
    for experts in ([0, 1], [1, 0], [0, 0]):
        assert talk.worst(talk.step(experts), experts) <= 1e-9


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sticky", [0.0, 0.9])
def test_only_rows_that_select_an_expert_go_through_it(family: str, sticky: float) -> None:
    """The tokens forwarded to expert e for row b are b's length when it last selected e, and 0 if it never did."""
    model = fusionroute([family] * 4, dtype=torch.float32)
    lengths = [3, 12, 6, 9]
    talk = Conversation(model, lengths, seed=11)
    counters = [Counter(expert.model) for expert in model.experts]
    plan = schedule(12, rows=4, experts=4, steps=25, sticky=sticky)
    plan = [[0 if row == 0 else expert for row, expert in enumerate(step)] for step in plan]  # row 0 never leaves
    before = [[0] * 4 for _ in counters]
    for experts in plan:
        done = [len(counter.rows) for counter in counters]
        talk.step(experts)
        for expert, counter in enumerate(counters):
            assert sum(counter.rows[done[expert] :]) == experts.count(expert)
    assert talk.cache is not None
    for expert, counter in enumerate(counters):
        before[expert] = [talk.last_selected[row].get(expert, 0) for row in range(4)]
        assert talk.cache.forwarded[expert] == before[expert]
        assert counter.tokens == sum(before[expert])
    assert before[1][0] == before[2][0] == before[3][0] == 0


def test_an_evicted_expert_catches_up_from_zero() -> None:
    model = fusionroute(["llama", "qwen3", "gemma3"], dtype=torch.float64)
    talk = Conversation(model, [6, 9], seed=13)
    talk.step([0, 1])
    assert talk.cache is not None
    one = talk.cache.states[0].nbytes
    model.config.expert_cache_budget = one + one // 2  # room for one expert, not for two
    for experts in schedule(14, rows=2, experts=3, steps=25):
        assert talk.worst(talk.step(experts), experts) <= 1e-9
        held = [state.nbytes for state in talk.cache.states]
        assert talk.cache.expert_bytes == sum(held)
        assert talk.cache.expert_bytes <= model.config.expert_cache_budget or sum(size > 0 for size in held) == 1
    assert sum(map(sum, talk.cache.forwarded)) > sum(len(row) for row in talk.rows) * 2


def test_eager_prefill_reads_the_prompt_with_every_expert() -> None:
    model = fusionroute(["llama", "mistral", "qwen2"], dtype=torch.float64)
    model.config.expert_prefill = "eager"
    talk = Conversation(model, [6, 9], seed=15)
    assert talk.worst(talk.step([0, 1]), [0, 1]) <= 1e-9
    assert talk.cache is not None
    assert talk.cache.forwarded == [[6, 9]] * 3
    for experts in schedule(16, rows=2, experts=3, steps=12):
        assert talk.worst(talk.step(experts), experts) <= 1e-9
    assert talk.cache.forwarded[2][0] < len(talk.rows[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_differs_no_more_than_twice_what_stock_caching_does(family: str) -> None:
    """Largest differences over a run: ours to no caching, against transformers' own cache to no caching."""
    model = fusionroute([family] * 2, dtype=torch.bfloat16)
    talk = Conversation(model, [40], seed=17)
    ours = stock = 0.0
    caches: dict[Any, Any] = {}
    read: dict[Any, int] = {}
    for experts in schedule(18, rows=1, experts=2, steps=40):
        logits = talk.step(experts)
        tokens = talk.rows[0][:-1]
        expected = oracle_logits(model, tokens, experts[0])
        ours = max(ours, (logits[0] - expected).abs().max().item())
        total = torch.zeros(model.config.vocab_size)
        for part in (model.router, model.experts[experts[0]].model):
            with torch.no_grad():
                out = part(
                    input_ids=torch.tensor([tokens[read.get(part, 0) :]]), use_cache=True, **{CACHE: caches.get(part)}
                )
            caches[part], read[part] = out[CACHE], len(tokens)
            total += out.logits[0, -1].float()
        stock = max(stock, (total - expected).abs().max().item())
    assert stock > 0
    assert ours <= 2 * stock


def test_flash_like_attention_gets_rows_of_equal_length() -> None:
    """Attention that takes no mask of ours: rows are split into uniform chunks, and transformers makes the masks."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register("maskless", sdpa_attention_forward)
    AttentionMaskInterface.register("maskless", sdpa_mask)
    model = fusionroute(["llama", "mistral", "gemma3"], dtype=torch.float64)
    for expert in model.experts:
        expert.model.set_attn_implementation("maskless")
    talk = Conversation(model, [3, 12, 6], seed=19)
    for step, experts in enumerate(schedule(20, rows=3, experts=3, steps=40)):
        assert talk.worst(talk.step(experts), experts) <= 1e-9
        if step == 20:
            talk.reorder([2, 0, 0])
    assert talk.cache is not None
    assert not any(state.explicit for state in talk.cache.states)


def test_holes_in_the_mask_are_padding_too() -> None:
    """A second turn that is padded on the left leaves holes in the middle of a row."""
    model = fusionroute(["llama", "mistral"], router="llama", dtype=torch.float64)
    talk = Conversation(model, [4, 6], seed=21)
    for experts in ([0, 1], [1, 0]):
        talk.step(experts)
    talk.ids, turn = padded_prompts([3, 5], seed=22)
    talk.rows = [
        [*row[:-1], *ids[real.bool()].tolist()] for row, ids, real in zip(talk.rows, talk.ids, turn, strict=True)
    ]
    talk.mask = torch.cat([talk.mask[:, :-1], turn], dim=1)
    for experts in ([1, 1], [0, 1], [1, 0]):
        assert talk.worst(talk.step(experts), experts) <= 1e-9


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_that_turn_out_to_be_padding_are_forgotten(family: str) -> None:
    """As after `generate` filled up a row that had ended, and the next turn's mask says so."""
    model = fusionroute([family] * 2, dtype=torch.float64)
    talk = Conversation(model, [4, 9, 6], seed=27)
    for experts in schedule(28, rows=3, experts=2, steps=14):
        talk.step(experts)
    for row, count in ((0, 10), (2, 3)):  # of the tokens forwarded so far, the last ones
        talk.rows[row] = [*talk.rows[row][: -count - 1], talk.rows[row][-1]]
        talk.mask[row, -count - 1 : -1] = 0
    for experts in schedule(29, rows=3, experts=2, steps=12):
        assert talk.worst(talk.step(experts), experts) <= 1e-9
        assert talk.cache is not None
        assert talk.cache.history is not None
        assert talk.cache.history.lengths == [len(row) - 1 for row in talk.rows]


@pytest.mark.parametrize("kind", ["gpt_neo", "bloom"])
def test_models_that_mask_columns_by_themselves_get_rows_of_equal_length(kind: str) -> None:
    """GPT-Neo's local layers and Bloom's biases go by columns: a row must not lie beside a longer one."""
    from transformers import AutoModelForCausalLM, BloomConfig, GPTNeoConfig

    configs: dict[str, Any] = {
        "gpt_neo": lambda: GPTNeoConfig(
            vocab_size=200,
            hidden_size=64,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
            window_size=WINDOW,
            initializer_range=0.3,
        ),
        "bloom": lambda: BloomConfig(vocab_size=200, hidden_size=64, n_layer=2, n_head=4, initializer_range=0.3),
    }
    torch.manual_seed(1)
    expert = AutoModelForCausalLM.from_config(configs[kind]()).to(torch.float64).eval()
    experts = {kind: expert, "llama": tiny_model("llama", 2, torch.float64)}
    model = FusionRouteForCausalLM.from_experts(tiny_model("llama", 0, torch.float64), experts).double()
    talk = Conversation(model, [5, 12, 9], seed=30)
    for experts_of_step in schedule(31, rows=3, experts=2, steps=26):
        # GPT-Neo's attention is in float32.
        assert talk.worst(talk.step(experts_of_step), experts_of_step) <= 5e-5


@pytest.mark.parametrize("cost", [1, 4, 128])
def test_rows_that_lag_differently_share_a_forward_where_padding_is_cheaper(cost: int) -> None:
    from ebpo_core.fusionroute.decoding.lazy import _cheapest_cuts

    def price(lags: list[int], cuts: list[int]) -> int:
        bounds = [0, *cuts, len(lags)]
        return sum(cost + (high - low) * lags[high - 1] for low, high in pairwise(bounds))

    rng = random.Random(cost)
    for _ in range(60):
        lags = sorted(rng.choice([1, 1, 2, 5, 40, 300]) for _ in range(rng.randrange(1, 8)))
        cuts = _cheapest_cuts(lags, cost)
        every = range(2 ** (len(lags) - 1))
        best = min(price(lags, [i for i in range(1, len(lags)) if bits >> (i - 1) & 1]) for bits in every)
        assert price(lags, cuts) == best


def test_one_family_beside_another_with_other_depth_width_and_vocabulary() -> None:
    experts = {
        "wide": tiny_model("llama", 1, torch.float64, hidden_size=96, layers=3),
        "padded": tiny_model("qwen2", 2, torch.float64, vocab_size=256),
        "sliding": tiny_model("mistral", 3, torch.float64),
    }
    model = FusionRouteForCausalLM.from_experts(tiny_model("llama", 0, torch.float64, vocab_size=208), experts).double()
    assert model.config.vocab_size == 200
    talk = Conversation(model, [5, 9], seed=23)
    for experts_of_step in schedule(24, rows=2, experts=3, steps=20):
        logits = talk.step(experts_of_step)
        assert logits.shape == (2, 200)
        assert talk.worst(logits, experts_of_step) <= 1e-9


def lfm2() -> Any:
    """Convolutions mixed with attention."""
    from transformers import Lfm2Config

    return Lfm2Config(
        vocab_size=200,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention", "conv", "full_attention"],
        initializer_range=0.3,
    )


@pytest.mark.parametrize("lengths", [[9, 9], [4, 9]])
def test_recurrent_layers_fall_back_to_whole_batches_and_stay_exact_and_lazy(lengths: list[int]) -> None:
    """LFM2 mixes convolutions with attention: its state cannot be kept row by row."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    recurrent = AutoModelForCausalLM.from_config(lfm2()).to(torch.float64)
    experts = {"recurrent": recurrent, "llama": tiny_model("llama", 2, torch.float64)}
    model = FusionRouteForCausalLM.from_experts(tiny_model("llama", 0, torch.float64), experts).double()
    talk = Conversation(model, lengths, seed=25)
    counter = Counter(model.experts[0].model)

    def run(plan: list[list[int]]) -> None:
        for step in plan:
            assert talk.worst(talk.step(step), step) <= 1e-9

    run([[1, 1], [1, 1]])
    assert counter.rows == []  # lazy as well: nobody selected it
    run(schedule(26, rows=2, experts=2, steps=10))
    assert set(counter.rows) == {2}
    talk.reorder([1, 1])
    run([[0, 1], [1, 1], [1, 1], [1, 0]])
    talk.crop(2)
    run([[1, 0], [0, 1]])
    # A mask that changed: the state has seen what is padding now, and begins anew.
    talk.mask[0, -3:-1] = 0
    talk.rows[0] = [*talk.rows[0][:-3], talk.rows[0][-1]]
    talk.step([0, 1])
    assert counter.rows[-1] == 2
    assert talk.cache is not None
    assert talk.cache.states[0].runs[-1] == talk.mask.shape[1] - 1


def test_experts_that_cannot_catch_up_are_refused() -> None:
    from transformers import AutoModelForCausalLM, MambaConfig

    config = MambaConfig(vocab_size=200, hidden_size=32, state_size=8, num_hidden_layers=1)
    experts = {"mamba": AutoModelForCausalLM.from_config(config), "llama": tiny_model("llama", 2)}
    model = FusionRouteForCausalLM.from_experts(tiny_model("llama", 0), experts)
    with pytest.raises(ValueError, match="'mamba' is a MambaForCausalLM, which cannot catch up on several tokens"):
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2)
