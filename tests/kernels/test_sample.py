"""Sampling: keyed noise, filters and draws of the reference against known answers, and the kernels against both."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from kernels_cases import INF, NAN, padded, random_step  # noqa: E402
from kernels_device import kernels, needs_triton  # noqa: E402

from ebpo_core.kernels import select_add, select_add_argmax, select_add_sample  # noqa: E402
from ebpo_core.kernels.noise import gumbel, gumbel_noise, philox  # noqa: E402
from ebpo_core.kernels.reference import kept  # noqa: E402

# -------------------------------------------------------------------------------------------------------------- noise


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the known answers published with Random123
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_known_answers(counter, key, expected):
    words = lambda text: [torch.tensor(int(w, 16)) for w in text.split()]  # noqa: E731
    assert [int(w) for w in philox(words(counter), words(key))] == [int(w, 16) for w in expected.split()]


def test_noise_is_a_function_of_seed_step_and_token():
    seed, step = torch.tensor([1, 2, 1, 1]), torch.tensor([0, 0, 1, 0])
    noise = gumbel_noise(seed, step, 50)
    assert torch.equal(noise[0], noise[3])
    assert torch.equal(noise[:1, :13], gumbel_noise(seed[:1], step[:1], 13))
    for other in (1, 2):
        assert (noise[0] != noise[other]).all()
    assert (noise[0][:, None] == noise[0][None, :]).sum() == 50
    wide = gumbel_noise(torch.tensor([1, 1 + 2**32, -1]), torch.tensor([0, 0, 2**33]), 8)
    assert (wide[0] != wide[1]).all()  # all 64 bits of the seed count


def test_noise_follows_the_gumbel_distribution():
    """Kolmogorov-Smirnov at 0.1 %, the upper tail by counts, and finite at both ends of the words."""
    noise = gumbel_noise(torch.arange(100), torch.zeros(100, dtype=torch.int64), 10_000).flatten().double()
    N = noise.numel()
    cdf = torch.exp(-torch.exp(-noise.sort().values))
    distance = (cdf - (torch.arange(N) + 0.5) / N).abs().max().item() + 0.5 / N
    assert distance * math.sqrt(N) < 1.95
    expected = N * -math.expm1(-math.exp(-9.0))
    assert abs((noise > 9.0).sum().item() - expected) < 4 * math.sqrt(expected)
    words = torch.tensor([300, 1000, 5000, 2**20 + 1, 2**31])  # the winners among 100k tokens are words like the first
    exact = -torch.log(-torch.log1p(-(words.double() + 0.5) / 2**32))
    torch.testing.assert_close(gumbel(words).double(), exact, rtol=1e-6, atol=1e-6)
    ends = gumbel(torch.tensor([0, 1, 2**32 - 1]))
    assert torch.isfinite(ends).all()
    torch.testing.assert_close(ends[:2], torch.tensor([33 * math.log(2), -math.log(1.5 * 2**-32)]), rtol=1e-6, atol=0)


# ------------------------------------------------------------------------------------------------------------ filters


def keep_by_definition(scores, k, p, min_p):
    """One row, in plain Python: top-k, then top-p of what is left, then min-p; equal scores stay together."""
    best = max(scores)
    alive = [s >= sorted(scores, reverse=True)[k - 1] for s in scores] if 0 < k < len(scores) else [True] * len(scores)
    mass = [math.exp(s - best) if a else 0.0 for s, a in zip(scores, alive, strict=True)]
    if p < 1:
        above = [sum(m for m, other in zip(mass, scores, strict=True) if other > s) for s in scores]
        alive = [a and x < max(p * sum(mass), 1e-9) for a, x in zip(alive, above, strict=True)]
    return [a and (min_p == 0 or s >= best + math.log(min_p)) for a, s in zip(alive, scores, strict=True)]


@settings(max_examples=200)
@given(
    st.lists(st.integers(-8, 8), min_size=1, max_size=12),
    st.integers(0, 13),
    st.sampled_from([0.0, 0.13, 0.37, 0.61, 0.93, 1.0]),
    st.sampled_from([0.0, 0.017, 0.29, 1.0]),
)
def test_filters_equal_their_definition(values, k, p, min_p):
    scores = torch.tensor([values], dtype=torch.float32)
    keep = kept(scores, torch.tensor([k]), torch.tensor([p]), torch.tensor([min_p]).log())
    assert keep[0].tolist() == keep_by_definition([float(v) for v in values], k, p, min_p)
    assert keep.any()


@pytest.mark.parametrize(("k", "p", "min_p"), [(5, 1.0, 0.0), (0, 0.8, 0.0), (0, 1.0, 0.05), (9, 0.7, 0.04)])
def test_filters_equal_transformers(k, p, min_p):
    process = pytest.importorskip("transformers.generation.logits_process")
    scores = torch.randn(64, 200, generator=torch.Generator().manual_seed(4)) * 3
    expected = scores.clone()
    if k:
        expected = process.TopKLogitsWarper(k)(None, expected)
    if p < 1:
        expected = process.TopPLogitsWarper(p)(None, expected)
    if min_p:
        expected = process.MinPLogitsWarper(min_p)(None, expected)
    row = lambda x: torch.full((64,), x)  # noqa: E731
    keep = kept(scores, row(k), row(p), row(min_p).log())
    assert torch.equal(keep, expected > -INF)
    assert 64 <= keep.sum() < 64 * 200


# -------------------------------------------------------------------------------------------------------------- draws


def chi_squared(tokens, probabilities) -> tuple[float, int]:
    """Statistic and degrees of freedom, bins of fewer than five expected counts merged."""
    expected = probabilities.double() * tokens.numel()
    observed = torch.bincount(tokens, minlength=probabilities.numel()).double()
    assert observed[probabilities == 0].sum() == 0
    rare = expected < 5
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    observed = torch.cat([observed[~rare], observed[rare].sum()[None]])
    used = expected > 0
    return float(((observed - expected) ** 2 / expected)[used].sum()), int(used.sum()) - 1


def assert_fits(tokens, probabilities):
    statistic, freedom = chi_squared(tokens, probabilities)
    # Wilson and Hilferty's approximation of the 99.99 % quantile
    assert statistic < freedom * (1 - 2 / (9 * freedom) + 3.719 * math.sqrt(2 / (9 * freedom))) ** 3


FILTERS = [
    {},
    {"temperature": 0.7},
    {"temperature": 1.6, "top_k": 6},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"temperature": 1.3, "top_k": 12, "top_p": 0.9, "min_p": 0.02},
]


def rows_of_one_policy(B, V=40, seed=1):
    router, _, experts = random_step(1, 2, V, seed=seed, scale=0.5)
    expand = lambda x: x.expand(B, V)  # noqa: E731
    return expand(router), torch.ones(B, dtype=torch.int64), [expand(x) for x in experts]


def probabilities(router, ids, experts, filters, alpha):
    filters = dict(filters)
    scores = select_add(router[:1], ids[:1], [x[:1] for x in experts], alpha=alpha) / filters.pop("temperature", 1.0)
    cut = lambda name, default, dtype: torch.tensor([filters.get(name, default)], dtype=dtype)  # noqa: E731
    min_p = cut("min_p", 0.0, torch.float32)
    keep = kept(scores, cut("top_k", 0, torch.int64), cut("top_p", 1.0, torch.float32), min_p.log())
    return torch.where(keep, scores, -INF).softmax(-1)[0]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_draws_fit_the_filtered_policy(filters):
    B = 60_000
    step = rows_of_one_policy(B)
    tokens = select_add_sample(*step, seed=torch.arange(B), step=3, alpha=0.5, **filters).token_ids
    assert_fits(tokens, probabilities(*step, filters, 0.5))
    with pytest.raises(AssertionError):  # the test has the power to tell a policy from its neighbour
        assert_fits(
            tokens, probabilities(*step, {**filters, "temperature": filters.get("temperature", 1.0) * 1.2}, 0.5)
        )


def test_a_row_draws_the_same_wherever_it_stands():
    router, weights, experts = random_step(6, 2, 90, seed=8)
    seed = torch.arange(6) + 100
    options = {"temperature": 1.5, "top_p": 0.95}
    whole = select_add_sample(router, weights, experts, seed=seed, step=4, **options)
    for rows in ([3], [5, 3, 0]):
        part = select_add_sample(
            router[rows],
            weights[rows],
            [x[rows] for x in experts],
            seed=seed[rows],
            step=torch.full((len(rows),), 4),
            **options,
        )
        assert torch.equal(part.token_ids, whole.token_ids[rows])


def test_temperature_zero_is_greedy_row_by_row():
    router, weights, experts = random_step(40, 2, 60, seed=6)
    temperature = torch.tensor([0.0, 2.0] * 20)
    out = select_add_sample(router, weights, experts, seed=torch.arange(40), temperature=temperature, top_k=50)
    greedy = select_add_argmax(router, weights, experts)
    assert torch.equal(out.token_ids[::2], greedy.token_ids[::2])
    assert (out.token_ids[1::2] != greedy.token_ids[1::2]).sum() > 5
    assert torch.equal(out.expert_ids, greedy.expert_ids)


def test_rows_without_a_distribution_are_greedy():
    router = torch.zeros(4, 30)
    router[0], router[1, 7], router[2, 9] = -INF, NAN, INF
    router[3, :] = -INF
    router[3, 11] = -5.0
    for filters in ({}, {"top_k": 3, "top_p": 0.5, "min_p": 0.1}):
        out = select_add_sample(router, None, torch.zeros(4, 30), seed=torch.arange(4), **filters)
        assert out.token_ids.tolist() == [0, 7, 9, 11]


# ------------------------------------------------------------------------------------------------------------ kernels


def same(options, router, weights, experts, **how):
    out = kernels("select_add_sample", router, weights, experts, **options, **how)
    expected = select_add_sample(router, weights, experts, **options)
    assert out.token_ids.tolist() == expected.token_ids.tolist()
    assert torch.equal(out.expert_ids, expected.expert_ids)
    return out.token_ids


PER_ROW = {
    "temperature": torch.tensor([0.7, 0.0, 1.9, 1.0]),
    "top_k": torch.tensor([0, 7, 25, 400]),
    "top_p": torch.tensor([0.8, 0.5, 1.0, 0.97]),
    "min_p": torch.tensor([0.0, 0.0, 0.01, 0.1]),
}


@needs_triton
@pytest.mark.parametrize("injected", [False, True], ids=["keyed", "injected"])
@pytest.mark.parametrize("filters", [*FILTERS, PER_ROW], ids=[*map(str, FILTERS), "per row"])
def test_kernels_draw_what_the_reference_draws(filters, injected):
    router, weights, experts = random_step(4, 2, 150, torch.bfloat16, seed=12, scale=0.5)
    router, experts = padded(router, 155)[:, :150], [padded(x, 152)[:, :150] for x in experts]
    options = dict(filters)
    if injected:
        noise = gumbel_noise(torch.arange(4), torch.zeros(4, dtype=torch.int64), 160)
        options["noise"] = noise
    else:
        options |= {"seed": torch.tensor([5, -6, 2**40, 0]), "step": torch.tensor([0, 1, 2**33, 7])}
    tokens = same(options, router, weights, experts)
    assert len(set(tokens.tolist())) > 1


@needs_triton
def test_kernels_draw_the_same_with_any_tile():
    router, weights, experts = random_step(2, 2, 150, seed=13, scale=0.3)
    options = {"seed": torch.tensor([1, 2]), "temperature": 2.0, "top_p": 0.99}
    for block, row_block in ((16, 32), (256, 128)):
        same(options, router, weights, experts, block=block, row_block=row_block)


@needs_triton
@settings(max_examples=15)
@given(st.data())
def test_kernels_filter_as_the_reference_does_with_ties(data):
    """The token with the highest noise among the kept ones shows where the cut was made: noise grows as scores fall."""
    values = data.draw(st.lists(st.integers(-9, 3), min_size=20, max_size=20))
    router = torch.tensor([values], dtype=torch.float32)
    options = {
        "top_k": data.draw(st.integers(0, 21)),
        "top_p": data.draw(st.sampled_from([0.0, 0.31, 0.77, 0.99, 1.0])),
        "min_p": data.draw(st.sampled_from([0.0, 0.03, 1.0])),
        "noise": -2 * router + torch.arange(20) / 64,
    }
    same(options, router, None, torch.zeros(1, 20), block=16, row_block=16)


@needs_triton
@pytest.mark.parametrize("name", ["top_k", "top_p", "min_p", "all"])
def test_kernels_cut_where_the_reference_cuts(name):
    """One row per cut; the noise makes the draw the worst token that is left, which gives the cut away."""
    B = 24
    scores = torch.randperm(B, generator=torch.Generator().manual_seed(3)).float().div(4).expand(B, B).contiguous()
    cuts = {
        "top_k": torch.arange(B) + 1,
        "top_p": (torch.arange(B) + 0.5) / B,
        "min_p": torch.exp(-(torch.arange(B) + 0.5) / 4),
    }
    options = {"top_k": torch.full((B,), 9), "top_p": cuts["top_p"]} if name == "all" else {name: cuts[name]}
    tokens = same({**options, "noise": -2 * scores}, scores, None, torch.zeros(B, B), block=16, row_block=16)
    if name in ("top_k", "min_p"):
        assert scores[0, tokens].tolist() == sorted(scores[0].tolist(), reverse=True)


@needs_triton
def test_kernels_take_rows_without_a_distribution():
    router = torch.zeros(5, 100)
    router[0], router[1, 70], router[2, 90], router[3] = -INF, NAN, INF, -INF
    router[3, 65], router[4, :64] = -5.0, NAN
    for filters in ({}, {"top_k": 3, "top_p": 0.5, "min_p": 0.1}):
        tokens = same({"seed": torch.arange(5), **filters}, router, None, torch.zeros(5, 100))
        assert tokens.tolist() == [0, 70, 90, 65, 0]


@needs_triton
def test_kernels_fit_the_policy():
    B = 200
    step = rows_of_one_policy(B, V=9)
    tokens = kernels("select_add_sample", *step, seed=torch.arange(B), alpha=0.5, block=16).token_ids
    assert_fits(tokens, probabilities(*step, {}, 0.5))
