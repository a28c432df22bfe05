"""Log-probabilities in both meanings: the reference against log_softmax and autograd, the kernels against it."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from kernels_cases import INF, NAN, padded, ragged, random_step  # noqa: E402
from kernels_device import kernels, needs_triton  # noqa: E402

from ebpo_core.kernels import select_add, select_add_argmax, select_add_logprob  # noqa: E402

ALPHA = 0.6


def by_definition(router, expert, tokens, alpha):
    """Float64, as the two meanings are written down."""
    pick = lambda x: x.gather(1, tokens[:, None])[:, 0]  # noqa: E731
    router, expert = router.double(), expert.double()
    policy = pick((router + alpha * expert).log_softmax(-1))
    return policy, pick(router.log_softmax(-1)) + alpha * pick(expert.log_softmax(-1))


def close(actual, expected):
    torch.testing.assert_close(actual.double(), expected.double(), rtol=2e-6, atol=2e-6, equal_nan=True)


def check(logprobs, scores, expected):
    close(logprobs, expected[0])
    close(scores, expected[1])


def case(dtype=torch.float32, V=150):
    router, weights, experts = random_step(4, 3, V, dtype, seed=9)
    ids = weights.argmax(-1)
    tokens = torch.tensor([0, V - 1, 64, 77])
    return router, weights, experts, ids, tokens, torch.stack(experts)[ids, torch.arange(4)]


def test_both_meanings_and_they_differ():
    router, weights, experts, _, tokens, chosen = case()
    out = select_add_logprob(router, weights, experts, tokens, alpha=ALPHA)
    check(out.logprobs, out.scores, by_definition(router, chosen, tokens, ALPHA))
    assert (out.logprobs - out.scores).abs().min() > 0.1
    # The policy is a distribution; the score is not.
    V = router.shape[1]
    each = [select_add_logprob(router, weights, experts, torch.full((4,), v), alpha=ALPHA) for v in range(V)]
    assert torch.allclose(sum(x.logprobs.exp() for x in each), torch.ones(4), atol=1e-5)
    assert (sum(x.scores.exp() for x in each) < 0.9).all()


def test_gradients_are_those_of_the_definition():
    router, weights, experts, ids, tokens, _ = case()
    inputs = [router, *experts]
    gradients = []
    for compute in ("ours", "definition"):
        leaves = [x.double().float().requires_grad_() for x in inputs]
        if compute == "ours":
            out = select_add_logprob(leaves[0], weights, leaves[1:], tokens, alpha=ALPHA)
            logprobs, scores = out.logprobs, out.scores
        else:
            chosen = torch.stack(leaves[1:])[ids, torch.arange(4)]
            logprobs, scores = by_definition(leaves[0], chosen, tokens, ALPHA)
        (2 * logprobs.sum() - 3 * scores.sum()).backward()
        gradients.append([torch.zeros_like(x) if x.grad is None else x.grad for x in leaves])
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    assert sum(float(g.abs().sum()) for g in gradients[0]) > 1


def test_gradients_reach_ragged_and_fused_logits():
    router, weights, experts, ids, tokens, _ = case()
    leaves = [x.clone().requires_grad_() for x in ragged(experts, ids)]
    select_add_logprob(router, ids, leaves, tokens).logprobs.sum().backward()
    assert all(x.grad.abs().sum() > 0 for x in leaves if x.shape[0])
    leaf = router.clone().requires_grad_()
    select_add(leaf, weights, experts).sum().backward()
    assert torch.equal(leaf.grad, torch.ones_like(leaf))
    out = select_add_argmax(leaf, weights, experts, return_logprobs=True)
    assert out.logprobs.requires_grad
    assert not out.token_ids.requires_grad


@pytest.mark.parametrize("token", [-100, -1, 150, 2**40])
def test_tokens_outside_of_the_vocabulary_give_nan(token):
    router, weights, experts, _, tokens, _ = case()
    tokens[2] = token
    out = select_add_logprob(router, weights, experts, tokens)
    assert torch.isnan(out.logprobs).tolist() == torch.isnan(out.scores).tolist() == [False, False, True, False]


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ["listed", "stacked", "gathered", "ragged"])
def test_kernels_equal_the_reference(dtype, form):
    router, weights, experts, ids, tokens, chosen = case(dtype)
    router = padded(router, 153)[:, :150]
    logits = {
        "listed": [padded(x, 151)[:, :150] for x in experts],
        "stacked": torch.stack(experts),
        "gathered": chosen,
        "ragged": ragged(experts, ids),
    }[form]
    out = kernels("select_add_logprob", router, weights, logits, tokens, alpha=ALPHA)
    check(out.logprobs, out.scores, by_definition(router, chosen, tokens, ALPHA))
    assert torch.equal(out.expert_ids, ids)
    best = kernels("select_add_argmax", router, weights, logits, alpha=ALPHA, return_logprobs=True)
    expected = select_add_argmax(router, weights, logits, alpha=ALPHA, return_logprobs=True)
    assert torch.equal(best.token_ids, expected.token_ids)
    check(best.logprobs, best.scores, by_definition(router, chosen, best.token_ids, ALPHA))


@needs_triton
def test_kernels_equal_the_reference_on_masks_nan_and_bad_ids():
    router, _, experts, _, _, _ = case()
    router[0, :100] = -INF  # a whole tile without a finite logit, and more
    experts[1][1, 5:] = -INF
    router[2, 70] = NAN
    ids = torch.tensor([0, 1, 2, 7])  # the last expert does not exist
    tokens = torch.tensor([120, 2, 3, 4])
    for given in (tokens, torch.tensor([-100, 150, 2, 1]), torch.tensor([3, 9, 2, 1])):
        out = kernels("select_add_logprob", router, ids, experts, given, alpha=ALPHA)
        expected = select_add_logprob(router, ids, experts, given, alpha=ALPHA)
        check(out.logprobs, out.scores, (expected.logprobs, expected.scores))
    assert torch.isfinite(kernels("select_add_logprob", router, ids, experts, tokens).logprobs[:2]).all()


@needs_triton
def test_large_logits_do_not_overflow():
    router, weights, experts, _, tokens, chosen = case()
    out = kernels("select_add_logprob", router * 1e4, weights, [x * 1e4 for x in experts], tokens)
    expected = by_definition(router * 1e4, chosen * 1e4, tokens, 1.0)
    torch.testing.assert_close(out.logprobs.double(), expected[0], rtol=1e-5, atol=1e-2)
    assert torch.isfinite(out.scores).all()
