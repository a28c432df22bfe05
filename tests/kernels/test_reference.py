"""``ebpo_core.kernels.select_add_argmax`` against a loop over scalars."""

from __future__ import annotations

import pytest
from hypothesis import given, settings

torch = pytest.importorskip("torch")

from kernels_cases import INF, NAN, brute_force, padded, ragged, random_step, steps  # noqa: E402

from ebpo_core.kernels import SelectedTokens, select_add, select_add_argmax  # noqa: E402


def check(router, weights, experts, **options) -> SelectedTokens:
    out = select_add_argmax(router, weights, experts, **options)
    expected = brute_force(router, weights, list(experts), **options)
    assert (out.token_ids.tolist(), out.expert_ids.tolist()) == expected
    assert out.token_ids.dtype == out.expert_ids.dtype == torch.int64
    assert out.token_ids.shape == out.expert_ids.shape == router.shape[:1]
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("batch", "n", "vocab"), [(1, 1, 1), (2, 3, 17), (7, 2, 128), (5, 8, 33)])
def test_equals_the_definition(dtype, batch, n, vocab):
    g = torch.Generator().manual_seed(batch * 100 + vocab)
    router = torch.randn(batch, vocab, generator=g).to(dtype)
    weights = torch.randn(batch, n, generator=g)
    experts = torch.randn(n, batch, vocab, generator=g).to(dtype)
    stacked = check(router, weights, experts, alpha=0.7)
    listed = check(router, weights, list(experts), alpha=0.7)
    assert torch.equal(stacked.token_ids, listed.token_ids)


@settings(max_examples=300, deadline=None)
@given(steps())
def test_equals_the_definition_with_ties_nan_and_infinities(step):
    router, weights, experts, options = step
    check(router, weights, experts, **options)


def test_ties_go_to_the_lowest_index():
    router = torch.zeros(1, 5)
    out = select_add_argmax(router, torch.tensor([[1.0, 3.0, 3.0]]), torch.zeros(3, 1, 5))
    assert out.expert_ids.tolist() == [1]
    assert out.token_ids.tolist() == [0]


def test_a_tie_made_by_the_sum_and_signed_zeros():
    router = torch.tensor([[-0.0, 1.0, 0.0, 2.0]])
    expert = torch.tensor([[0.0, 1.0, 0.0, 0.0]])
    assert select_add_argmax(router, torch.ones(1, 1), [expert]).token_ids.tolist() == [1]  # 2.0 at 1 and at 3
    assert select_add_argmax(router[:, [0, 2]], torch.ones(1, 1), [expert[:, [0, 2]]]).token_ids.tolist() == [0]


def test_sums_are_taken_in_float32_not_in_the_inputs_dtype():
    router = torch.tensor([[256.0, 256.0]], dtype=torch.bfloat16)
    expert = torch.tensor([[0.25, 0.5]], dtype=torch.bfloat16)
    assert (router + expert).argmax(-1).item() == 0  # bfloat16 rounds both sums to 256
    assert select_add_argmax(router, torch.ones(1, 1), [expert]).token_ids.item() == 1


@pytest.mark.parametrize("side", ["router", "expert"])
def test_float32_inputs_keep_all_their_bits(side):
    close, zeros = torch.tensor([[1.0, 1.0 + 2**-20]]), torch.zeros(1, 2, dtype=torch.bfloat16)
    router, expert = (close, zeros) if side == "router" else (zeros, close)
    assert select_add_argmax(router, torch.ones(1, 1), [expert]).token_ids.item() == 1


def test_the_product_is_rounded_before_the_sum():
    """A fused multiply-add keeps 0.1 * 3's low bits and would separate the two columns."""
    alpha = 0.1
    product = (torch.tensor(3.0) * alpha).item()
    router = torch.tensor([[-product, 0.0]])
    out = select_add_argmax(router, torch.ones(1, 1), [torch.tensor([[3.0, 0.0]])], alpha=alpha)
    assert out.token_ids.item() == 0
    router = torch.tensor([[0.0, -product]])
    out = select_add_argmax(router, torch.ones(1, 1), [torch.tensor([[0.0, 3.0]])], alpha=alpha)
    assert out.token_ids.item() == 0


@pytest.mark.parametrize("masked", ["router", "expert"])
def test_minus_infinity_masks_hold_on_either_side(masked):
    router, expert = torch.tensor([[9.0, 1.0, 8.0]]), torch.tensor([[9.0, 1.0, 0.0]])
    (router if masked == "router" else expert)[0, 0] = -INF
    assert select_add_argmax(router, torch.ones(1, 1), [expert]).token_ids.item() == 2


def test_rows_without_a_finite_score_give_a_valid_token():
    router = torch.tensor([[-INF, -INF], [NAN, NAN], [INF, 0.0], [0.0, NAN]])
    expert = torch.tensor([[-INF, -INF], [0.0, 0.0], [-INF, 0.0], [9.0, 0.0]])
    out = select_add_argmax(router, torch.ones(4, 1), [expert])
    assert out.token_ids.tolist() == [0, 0, 0, 1]


def test_nan_in_an_expert_that_was_not_selected_is_not_seen():
    experts = [torch.tensor([[0.0, 1.0]]), torch.tensor([[NAN, NAN]])]
    out = select_add_argmax(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]), experts)
    assert (out.token_ids.item(), out.expert_ids.item()) == (1, 0)


def test_nan_weight_selects_its_expert_as_argmax_does():
    out = select_add_argmax(torch.zeros(1, 2), torch.tensor([[5.0, NAN, NAN]]), torch.zeros(3, 1, 2))
    assert out.expert_ids.item() == 1


def test_widths_differ_and_the_smallest_is_the_vocabulary():
    router, experts = torch.zeros(1, 6), [torch.zeros(1, 4), torch.zeros(1, 8)]
    router[0, 5] = experts[1][0, 7] = 100.0
    router[0, 3] = 1.0
    weights = torch.tensor([[0.0, 1.0]])
    assert select_add_argmax(router, weights, experts).token_ids.item() == 3
    assert select_add_argmax(router, weights, experts, vocab_size=3).token_ids.item() == 0


def test_strided_inputs_give_what_contiguous_ones_give():
    g = torch.Generator().manual_seed(0)
    router = padded(torch.randn(4, 16, generator=g), 20)[:, :16]
    experts = torch.randn(4, 3, 20, generator=g)[:, :, 3:19].transpose(0, 1)
    weights = torch.randn(3, 4, generator=g).T
    a = select_add_argmax(router, weights, experts)
    b = select_add_argmax(router.contiguous(), weights.contiguous(), experts.contiguous())
    assert torch.equal(a.token_ids, b.token_ids)
    check(router, weights, experts)


def test_every_form_of_the_experts_gives_the_same():
    router, weights, experts = random_step(5, 3, 40)
    ids, stacked = weights.argmax(-1), torch.stack(experts)
    expected = check(router, weights, experts, alpha=0.3)
    gathered = stacked[ids, torch.arange(5)]
    for selection, form in [(weights, gathered), (ids, gathered), (ids, experts), (ids.int(), stacked),
                            (ids, ragged(experts, ids)), (weights, ragged(experts, ids))]:  # fmt: skip
        out = select_add_argmax(router, selection, form, alpha=0.3)
        assert torch.equal(out.token_ids, expected.token_ids)
        assert torch.equal(out.expert_ids, ids)
    out = select_add_argmax(router, None, gathered, alpha=0.3)
    assert torch.equal(out.token_ids, expected.token_ids)
    assert out.expert_ids.tolist() == [0] * 5


def test_a_stated_layout_gives_what_the_shapes_give():
    router, weights, experts = random_step(5, 3, 40)
    ids, stacked = weights.argmax(-1), torch.stack(experts)
    rows = ragged(experts, ids)
    layouts = {"listed": experts, "stacked": stacked, "gathered": stacked[ids, torch.arange(5)], "ragged": rows}
    for layout, form in layouts.items():
        out = select_add_argmax(router, ids, form, layout=layout)
        assert torch.equal(out.token_ids, check(router, weights, experts).token_ids)
        assert torch.equal(select_add(router, ids, form, layout=layout), select_add(router, ids, form))
    # Shapes alone cannot tell one expert's list from the rows that selected it, nor anything about an empty batch.
    zeros = torch.zeros(5, dtype=torch.int64)
    alone = select_add_argmax(router, zeros, experts[:1], layout="ragged")
    assert torch.equal(alone.token_ids, select_add_argmax(router, zeros, experts[:1], layout="listed").token_ids)
    empty = select_add_argmax(router[:0], ids[:0], [x[:0] for x in experts], layout="ragged")
    assert empty.token_ids.shape == (0,)


def test_ids_out_of_range_and_missing_rows_are_nan():
    router, _, experts = random_step(4, 2, 9)
    fused = select_add(router, torch.tensor([0, 2, -1, 1]), experts)
    assert torch.isnan(fused).all(-1).tolist() == [False, True, True, False]
    fused = select_add(router, torch.tensor([0, 0, 0, 1]), [experts[0][:1], experts[1][:3]])
    assert torch.isnan(fused).all(-1).tolist() == [False, True, True, False]


def test_round_sum_rounds_as_eager_arithmetic_does():
    router, weights, experts = random_step(6, 2, 300, torch.bfloat16, seed=3)
    router, experts = router * 37, [x * 0.11 for x in experts]
    chosen = torch.stack(experts)[weights.argmax(-1), torch.arange(6)]
    fused = select_add(router, weights, experts, alpha=0.3, round_sum=True)
    assert torch.equal(fused, (router + 0.3 * chosen).float())
    assert not torch.equal(fused, select_add(router, weights, experts, alpha=0.3))
    with pytest.raises(ValueError, match="round_sum=True with experts of .*one dtype"):
        select_add(router, weights, [experts[0], experts[1].float()], round_sum=True)


def test_the_winning_logit_is_that_of_the_sum():
    router, weights, experts = random_step(3, 2, 20)
    out = select_add_argmax(router, weights, experts, alpha=0.5, return_logits=True)
    assert torch.equal(out.fused_logits, select_add(router, weights, experts, alpha=0.5).amax(-1))
    assert select_add_argmax(router, weights, experts).fused_logits is None


def test_an_empty_batch_gives_empty_ids():
    out = select_add_argmax(torch.zeros(0, 4), torch.zeros(0, 2), torch.zeros(2, 0, 4))
    assert out.token_ids.shape == out.expert_ids.shape == (0,)


def test_inputs_are_left_as_they_were():
    router, weights, experts = torch.randn(3, 8), torch.randn(3, 2), torch.randn(2, 3, 8)
    before = [x.clone() for x in (router, weights, experts)]
    select_add_argmax(router, weights, experts, alpha=0.5)
    for x, y in zip((router, weights, experts), before, strict=True):
        assert torch.equal(x, y)
