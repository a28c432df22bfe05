"""The fused LM heads: integers, whose float32 sums are exact in any order, so that tokens must be equal."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from kernels_cases import NAN, padded  # noqa: E402
from kernels_device import ON_GPU, kernels, needs_triton  # noqa: E402

from ebpo_core.kernels import lm_head_select_add_argmax, select_add_argmax  # noqa: E402

# Triton's interpreter gets bfloat16 products wrong, so bfloat16 waits for a GPU.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])]


def case(B, n, V, D=(40, 24), dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    whole = lambda *shape: torch.randint(-3, 4, shape, generator=g).to(dtype)  # noqa: E731
    router_hidden, expert_hidden = whole(B, D[0]), whole(B, D[1])
    return (
        router_hidden,
        whole(V, D[0]),
        torch.randn(B, n, generator=g),
        expert_hidden,
        [whole(V, D[1]) for _ in range(n)],
    )


def by_definition(router_hidden, router_head, weights, expert_hidden, heads, alpha=1.0):
    experts = [expert_hidden.double() @ head.double().T for head in heads]
    router = router_hidden.double() @ router_head.double().T
    return select_add_argmax(router.float(), weights, [x.float() for x in experts], alpha=alpha)


def test_reference_equals_the_definition():
    arguments = case(7, 3, 90)
    out, expected = lm_head_select_add_argmax(*arguments, alpha=0.5), by_definition(*arguments, alpha=0.5)
    assert torch.equal(out.token_ids, expected.token_ids)
    assert torch.equal(out.expert_ids, expected.expert_ids)
    stacked = lm_head_select_add_argmax(*arguments[:4], torch.stack(arguments[4]), alpha=0.5)
    assert torch.equal(stacked.token_ids, expected.token_ids)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "n", "V"), [(1, 1, 5), (3, 2, 64), (20, 3, 130)])
def test_kernel_equals_the_definition(dtype, B, n, V):
    router_hidden, router_head, weights, expert_hidden, heads = case(B, n, V, dtype=dtype)
    router_head = padded(router_head, 44)[:, :40]
    expected = by_definition(router_hidden, router_head, weights, expert_hidden, heads, alpha=-0.5)
    for selection in (weights, weights.argmax(-1).int()):
        out = kernels(
            "lm_head_select_add_argmax", router_hidden, router_head, selection, expert_hidden, heads, alpha=-0.5
        )
        assert out.token_ids.tolist() == expected.token_ids.tolist()
        assert out.expert_ids.tolist() == expected.expert_ids.tolist()


@needs_triton
def test_more_rows_of_one_expert_than_a_program_takes():
    arguments = case(35, 2, 70, seed=2)
    arguments[2][:, 1] -= 2.0
    out, expected = kernels("lm_head_select_add_argmax", *arguments), by_definition(*arguments)
    assert (expected.expert_ids == 0).sum() > 20
    assert torch.equal(out.token_ids, expected.token_ids)


@needs_triton
def test_widths_nan_and_ids_out_of_range():
    router_hidden, router_head, _, expert_hidden, heads = case(4, 2, 80)
    heads[1] = heads[1][:70]
    router_hidden[0, 0] = NAN
    router_head[72:] = 100.0
    ids = torch.tensor([0, 1, 5, -1])
    arguments = router_hidden, router_head, ids, expert_hidden, heads
    out = kernels("lm_head_select_add_argmax", *arguments)
    assert out.token_ids.tolist() == lm_head_select_add_argmax(*arguments).token_ids.tolist()
    assert out.token_ids[[0, 2, 3]].tolist() == [0, 0, 0]
    assert out.token_ids.max() < 70


@needs_triton
def test_negative_scores_do_not_lose_to_the_padding_of_the_last_tile():
    hidden, head = torch.ones(2, 8), -torch.ones(70, 8)
    head[67] = -0.5
    out = kernels("lm_head_select_add_argmax", hidden, head, torch.ones(2, 1), hidden, [head])
    assert out.token_ids.tolist() == [67, 67]
