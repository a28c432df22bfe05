"""The Triton kernels of argmax and sum against the definition: exactly equal, in every form the inputs come in."""

from __future__ import annotations

import pytest
from hypothesis import given, settings

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from kernels_cases import DTYPES, INF, NAN, as_read, brute_force, padded, ragged, random_step, steps  # noqa: E402
from kernels_device import kernels  # noqa: E402

from ebpo_core.kernels import select_add, select_add_argmax  # noqa: E402


def same(out, expected) -> None:
    assert out.token_ids.tolist() == expected.token_ids.tolist()
    assert out.expert_ids.tolist() == expected.expert_ids.tolist()
    assert out.token_ids.dtype == out.expert_ids.dtype == torch.int64


def check(router, weights, experts, block=64, **options):
    expected = select_add_argmax(router, weights, experts, return_logits=True, **options)
    out = kernels("select_add_argmax", router, weights, experts, block=block, return_logits=True, **options)
    same(out, expected)
    torch.testing.assert_close(out.fused_logits, expected.fused_logits, rtol=0, atol=0, equal_nan=True)
    return out


@settings(max_examples=60)
@given(steps(max_vocab=9, max_batch=2, max_experts=3))
def test_equals_the_definition_with_ties_nan_and_infinities(step):
    router, weights, experts, options = step
    out = kernels("select_add_argmax", router, weights, experts, block=4, **options)
    assert (out.token_ids.tolist(), out.expert_ids.tolist()) == brute_force(router, weights, experts, **options)


@pytest.mark.parametrize("V", [1, 7, 63, 64, 65, 127, 128, 129, 200])
def test_ragged_last_tiles(V):
    router, weights, experts = random_step(2, 2, V, torch.bfloat16, seed=V)
    check(padded(router, V + 3), weights, [padded(x, V + 3 * i, gap=i) for i, x in enumerate(experts)], vocab_size=V)


@pytest.mark.parametrize("expert_dtype", DTYPES)
@pytest.mark.parametrize("router_dtype", DTYPES)
def test_forms_and_dtypes(router_dtype, expert_dtype):
    router, weights, experts = random_step(4, 3, 100, seed=3)
    router, experts = router.to(router_dtype), [x.to(expert_dtype) for x in experts]
    ids = weights.argmax(-1)
    expected = check(router, weights, experts, alpha=0.3)
    stacked = torch.stack(experts)
    forms = [
        (weights, stacked),
        (weights, stacked[:, :, ::1].transpose(0, 1).contiguous().transpose(0, 1)),  # experts innermost but one
        (weights, stacked[ids, torch.arange(4)]),
        (ids, stacked),
        (ids.int(), experts),
        (weights, ragged(experts, ids)),
        (ids, ragged(experts, ids)),
    ]
    for selection, form in forms:
        same(check(router, selection, form, alpha=0.3), expected)
    gathered = check(router, None, stacked[ids, torch.arange(4)], alpha=0.3)
    assert torch.equal(gathered.token_ids, expected.token_ids)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_weights_select_as_argmax_does(dtype):
    weights = torch.tensor(
        [[1.0, 3.0, 3.0], [NAN, 9.0, NAN], [0.0, NAN, 9.0], [-INF, -INF, -INF], [INF, 1.0, INF], [-0.0, 0.0, -1.0]]
    ).to(dtype)
    router, _, experts = random_step(6, 3, 40)
    out = check(router, weights, experts)
    assert out.expert_ids.tolist() == [1, 0, 1, 0, 0, 0]
    check(router, weights.T.contiguous().T, experts)
    if dtype == torch.float64:  # a difference float32 does not hold
        assert (
            check(router[:1], torch.tensor([[1.0, 1.0 + 1e-12, 0.0]], dtype=dtype), [x[:1] for x in experts]).expert_ids
            == 1
        )


@pytest.mark.parametrize(("value", "expected"), [(-INF, [0, 0]), (NAN, [0, 0]), (INF, [0, 0]), (0.0, [0, 0])])
def test_constant_rows_give_a_valid_token(value, expected):
    router = torch.full((2, 150), value)
    assert check(router, torch.ones(2, 1), [torch.zeros(2, 150)]).token_ids.tolist() == expected


@pytest.mark.parametrize("at", [0, 63, 64, 149])
def test_ties_across_tiles_go_to_the_lowest_index(at):
    router = torch.zeros(1, 150)
    router[0, at:] = 5.0
    assert check(router, torch.ones(1, 1), [torch.zeros(1, 150)]).token_ids.tolist() == [at]
    router[0, at] = NAN
    router[0, -1] = NAN
    router[0, 1] = INF
    assert check(router, torch.ones(1, 1), [torch.zeros(1, 150)]).token_ids.tolist() == [at]


def test_signed_zeros_are_equal():
    router, expert = torch.full((1, 100), -0.0), torch.full((1, 100), -0.0)
    router[0, 70] = expert[0, 70] = 0.0
    assert check(router, torch.ones(1, 1), [expert]).token_ids.tolist() == [0]


@pytest.mark.parametrize("masked", ["router", "expert"])
def test_minus_infinity_masks_hold_on_either_side(masked):
    router, weights, experts = random_step(3, 2, 130, seed=5)
    allowed = torch.tensor([[100], [3], [129]])
    for x in [router] if masked == "router" else experts:
        x.copy_(torch.full_like(x, -INF).scatter(1, allowed, x.gather(1, allowed)))
    assert check(router, weights, experts).token_ids.tolist() == [100, 3, 129]


def test_the_product_is_rounded_before_the_sum():
    product = (torch.tensor(3.0) * 0.1).item()
    router, expert = torch.tensor([[-product, 0.0]]), torch.tensor([[3.0, 0.0]])
    assert check(router, torch.ones(1, 1), [expert], alpha=0.1).token_ids.item() == 0
    assert check(router.flip(1), torch.ones(1, 1), [expert.flip(1)], alpha=0.1).token_ids.item() == 0


def test_ids_out_of_range_and_missing_rows_are_nan_not_read():
    router, _, experts = random_step(4, 2, 90)
    ids = torch.tensor([0, 2, -1, 1])
    for form in (experts, torch.stack(experts)):
        out = check(router, ids, form)
        assert out.token_ids[1:3].tolist() == [0, 0]
        assert torch.isnan(out.fused_logits[1:3]).all()
        assert not torch.isnan(out.fused_logits[[0, 3]]).any()
    # Ids ask for three rows of expert 0, which holds one.
    out = check(router, torch.tensor([0, 0, 0, 1]), [experts[0][:1], experts[1][:3]])
    assert torch.isnan(out.fused_logits).tolist() == [False, True, True, False]


def test_ragged_ranks_beyond_one_block_of_rows():
    B = 290
    router, weights, experts = random_step(B, 3, 3, seed=11)
    ids = weights.argmax(-1)
    out = check(router, ids, ragged(experts, ids))
    same(out, select_add_argmax(router, weights, experts))


@pytest.mark.parametrize("alpha", [1.0, 0.3, -2.0])
@pytest.mark.parametrize("expert_dtype", DTYPES)
@pytest.mark.parametrize("router_dtype", DTYPES)
def test_round_sum_is_eager_arithmetic_bit_for_bit(router_dtype, expert_dtype, alpha):
    g = torch.Generator().manual_seed(7)
    values = torch.randn(2, 3, 200, generator=g) * torch.tensor([[1.0], [100.0], [1e-3]])
    values[:, 0, :9] = torch.tensor([0.0, -0.0, INF, -INF, NAN, 3.3e38, -3.3e38, 6.5e4, 2.0**-24])
    values[1, 0, 9:12] = torch.tensor([3.3e38, INF, NAN])
    values[0, 1, :64], values[1, 1, :64] = 256.0, torch.arange(64) / 16  # every kind of tie of a bfloat16 sum
    router, expert = as_read(values[0].to(router_dtype)), as_read(values[1].to(expert_dtype))
    eager = (router + alpha * expert).float()
    out = kernels("select_add", router, None, expert, alpha=alpha, round_sum=True)
    torch.testing.assert_close(out, eager, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_select_add_writes_the_fused_logits(dtype):
    router, weights, experts = random_step(3, 2, 145, dtype)
    router[1, 7], experts[0][:, 90] = NAN, -INF
    out = kernels("select_add", router, weights, experts, alpha=-0.7)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, select_add(router, weights, experts, alpha=-0.7), rtol=0, atol=0, equal_nan=True)


def test_results_do_not_depend_on_the_tile():
    router, weights, experts = random_step(3, 2, 300, torch.bfloat16, seed=2)
    for block in (16, 128, 512):
        check(router, weights, experts, block=block)


def test_an_empty_batch_launches_nothing():
    out = kernels("select_add_argmax", torch.zeros(0, 4), torch.zeros(0, 2), torch.zeros(2, 0, 4))
    assert out.token_ids.shape == out.expert_ids.shape == (0,)
