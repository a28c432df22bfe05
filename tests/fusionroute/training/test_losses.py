"""FusionRoute's torch losses against the NumPy twin, their gradients, and CDPO against TRL's own DPO."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ebpo_core.fusionroute.training import losses, reference
from ebpo_core.fusionroute.training.batches import informative_positions

READINGS = ("normalized", "softmax")
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-4, torch.bfloat16: 2e-4}


def sample(
    rng: np.random.Generator, length: int, V: int, n: int, dtype: torch.dtype, labelled: float, scale: float
) -> reference.Sample:
    """Random logits that ``dtype`` holds exactly; experts share most of theirs, so that they agree here and there."""

    def exact(x: np.ndarray) -> np.ndarray:
        return torch.from_numpy(x).to(dtype).double().numpy()

    common = scale * rng.normal(size=(length, V))
    widths = V + rng.integers(0, 3, size=n)
    experts = [np.concatenate([common, np.full((length, w - V), 50.0)], axis=1) for w in widths]
    experts = [exact(x + 0.3 * scale * rng.normal(size=x.shape)) for x in experts]
    ids = rng.integers(0, V, size=length)
    return reference.Sample(
        router_logits=exact(scale * rng.normal(size=(length, V))),
        weights=exact(2 * rng.normal(size=(length, n))),
        expert_logits=experts,
        labels=np.where(rng.random(length) < labelled, ids, reference.IGNORE),
    )


class Padded:
    """Samples as the trainers hold them: padded on the right, and shifted so that position t predicts labels[t]."""

    def __init__(self, samples: list[reference.Sample], dtype: torch.dtype) -> None:
        self.V = samples[0].router_logits.shape[1]
        width = max(len(s.labels) for s in samples)

        def pad(parts: list[np.ndarray], value: float) -> np.ndarray:
            return np.stack(
                [np.pad(x, [(0, width - len(x)), *[(0, 0)] * (x.ndim - 1)], constant_values=value) for x in parts]
            )

        def shifted(parts: list[np.ndarray]) -> torch.Tensor:
            return torch.from_numpy(pad(parts, 7.0)).to(dtype)[:, :-1]

        self.logits = shifted([s.router_logits for s in samples])
        self.weights = shifted([s.weights for s in samples])
        self.labels = torch.from_numpy(pad([s.labels for s in samples], reference.IGNORE))[:, 1:]
        cut = [[z[:, : self.V] for z in s.expert_logits] for s in samples]
        self.argmax = torch.from_numpy(pad([np.stack([z.argmax(1) for z in c], axis=1) for c in cut], 0))[:, :-1]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        logprobs = [np.stack([gathered(z, s.labels) for z in c], axis=1) for c, s in zip(cut, samples, strict=True)]
        self.expert_logprobs = torch.from_numpy(pad(logprobs, 0.0)).to(wide)[:, :-1]


def gathered(z: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """log softmax(z)[t][labels[t + 1]], 0 without a label."""
    out = np.zeros(len(labels))
    for t, y in reference.predictions(labels):
        out[t] = reference.log_softmax(z[t])[y]
    return out


def informative(batch: Padded) -> torch.Tensor:
    """S as the collator finds it, [B, T - 1]."""
    return torch.from_numpy(informative_positions(batch.argmax.numpy(), batch.labels.numpy()))


def routing(batch: Padded, samples: list[reference.Sample], reading: str, chunk: int | None = None) -> torch.Tensor:
    """[B]: L_expert of every sample, by the torch losses at the informative positions alone."""
    mask = informative(batch)
    weights = batch.weights[mask]
    if reading == "softmax":
        values = losses.routing_loss_softmax(weights, batch.expert_logprobs[mask])
    else:
        V = batch.V
        # Rows may have experts of different widths, which the trainers never see: cut here to the widest common one.
        dtype = batch.weights.dtype
        logits = []
        for i in range(weights.shape[1]):
            width = min(s.expert_logits[i].shape[1] for s in samples)
            parts = [torch.from_numpy(s.expert_logits[i][:, :width])[:-1] for s in samples]
            logits.append(torch.cat([p[m[: len(p)]] for p, m in zip(parts, mask, strict=True)]).to(dtype))
        values = losses.routing_loss_normalized(weights, logits, batch.labels[mask], vocab_size=V, chunk=chunk)
    rows = mask.nonzero()[:, 0]
    return torch.zeros(len(samples), dtype=values.dtype).index_add(0, rows, values)


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[reference.Sample], torch.dtype]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dtype = draw(st.sampled_from(DTYPES))
    V, n = draw(st.integers(2, 9)), draw(st.integers(1, 4))
    labelled = draw(st.sampled_from([0.0, 0.5, 1.0]))
    scale = draw(st.sampled_from([0.0, 1.0, 8.0]))
    lengths = draw(st.lists(st.integers(2, 7), min_size=1, max_size=4))
    return [sample(rng, length, V, n, dtype, labelled, scale) for length in lengths], dtype


@given(batches(), st.sampled_from([None, 1, 3]))
def test_every_term_equals_the_twin(case: tuple[list[reference.Sample], torch.dtype], chunk: int | None) -> None:
    samples, dtype = case
    batch = Padded(samples, dtype)
    tolerance = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}

    token = losses.label_logprobs(batch.logits, batch.labels)
    assert token.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    np.testing.assert_allclose(-token.sum(1), [reference.lm_loss(s) for s in samples], **tolerance)

    selected = losses.selected_logprobs(batch.weights, batch.expert_logprobs).sum(1)
    np.testing.assert_allclose(selected, [reference.selected_logprob(s) for s in samples], **tolerance)

    for reading in READINGS:
        expected = [reference.routing_loss(s, reading) for s in samples]
        np.testing.assert_allclose(routing(batch, samples, reading, chunk), expected, **tolerance)


@given(batches())
def test_informative_positions_equal_brute_force_and_the_twin(
    case: tuple[list[reference.Sample], torch.dtype],
) -> None:
    samples, dtype = case
    batch = Padded(samples, dtype)
    mask = informative(batch)
    n = batch.argmax.shape[-1]
    for row in range(mask.shape[0]):
        for t in range(mask.shape[1]):
            pairs = combinations(range(n), 2)
            differ = any(bool(batch.argmax[row, t, i] != batch.argmax[row, t, j]) for i, j in pairs)
            assert bool(mask[row, t]) == (differ and int(batch.labels[row, t]) != -100)
    for row, s in enumerate(samples):
        assert mask[row].nonzero()[:, 0].tolist() == reference.informative(s)


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.05, 0.1, 1.0]), st.sampled_from([0.5, 1.0, 2.0]))
def test_cdpo_and_mix_equal_the_twin(seed: int, beta: float, alpha: float) -> None:
    rng = np.random.default_rng(seed)

    def draw() -> reference.Sample:
        return sample(rng, int(rng.integers(2, 7)), 6, 3, torch.float64, 0.7, 4.0)

    pairs = [reference.Pair(draw(), draw(), *(-5 * rng.random(2))) for _ in range(3)]
    chosen = Padded([p.chosen for p in pairs], torch.float64)
    rejected = Padded([p.rejected for p in pairs], torch.float64)

    def policy(side: Padded) -> torch.Tensor:
        return losses.label_logprobs(side.logits, side.labels).sum(1)

    def selected(side: Padded) -> torch.Tensor:
        return losses.selected_logprobs(side.weights, side.expert_logprobs).sum(1)

    refs = [torch.tensor([getattr(p, f"reference_{side}") for p in pairs]).double() for side in ("chosen", "rejected")]
    margin = losses.cdpo_margin(policy(chosen), policy(rejected), *refs, beta=beta)
    bias = losses.cdpo_bias(selected(chosen), selected(rejected), beta=beta, alpha=alpha)
    loss = losses.cdpo_loss(margin, bias)
    np.testing.assert_allclose(margin, [reference.margin(p, beta) for p in pairs], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(bias, [reference.bias(p, beta, alpha) for p in pairs], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(loss, [reference.cdpo_loss(p, beta, alpha) for p in pairs], rtol=1e-10, atol=1e-12)

    samples = [s for s in (draw() for _ in range(4)) if reference.predictions(s.labels)]
    if samples:
        batch = Padded(samples, torch.float64)
        lm = -losses.label_logprobs(batch.logits, batch.labels).sum(1)
        own = (lm + routing(batch, samples, "normalized") / 3) / (batch.labels != -100).sum(1)
        mixed = (own.sum() / 3 + loss.sum()) / (len(samples) + len(pairs))
        expected = reference.mix_loss(samples, pairs, "normalized", beta=beta, alpha=alpha)
        np.testing.assert_allclose(mixed, expected, rtol=1e-10)


def double(*shape: int, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).requires_grad_()


def test_gradients_equal_finite_differences() -> None:
    logits, weights = double(2, 5, 7), double(9, 3, seed=1)
    labels = torch.tensor([[0, -100, 6, 2, 1], [-100, -100, 3, 3, 0]])
    y = torch.tensor([0, 1, 2, 3, 4, 5, 6, 0, 1])
    experts = [double(9, 7 + i, seed=5 + i).detach() for i in range(3)]
    cached = double(9, 3, seed=9).detach()
    check = torch.autograd.gradcheck
    assert check(lambda z: losses.label_logprobs(z, labels), logits)
    assert check(lambda w: losses.routing_loss_softmax(w, cached), weights)
    for chunk in (None, 1, 4):
        assert check(lambda w, c=chunk: losses.routing_loss_normalized(w, experts, y, vocab_size=7, chunk=c), weights)
    policy = [double(4, seed=11, scale=9.0), double(4, seed=12, scale=9.0)]
    reference_sums, selected = [double(4, seed=s).detach() for s in (13, 14)], [double(4, seed=s) for s in (15, 16)]
    assert check(
        lambda c, r: losses.cdpo_loss(
            losses.cdpo_margin(c, r, *reference_sums, beta=0.7), losses.cdpo_bias(*selected, beta=0.7, alpha=1.5)
        ),
        policy,
    )


def test_no_gradient_to_experts_nor_through_the_selection() -> None:
    weights, experts, cached = double(4, 3), [double(4, 6, seed=i) for i in range(3)], double(4, 3, seed=7)
    y = torch.tensor([0, 1, 2, 3])
    losses.routing_loss_normalized(weights, experts, y, vocab_size=6).sum().backward()
    assert weights.grad is not None
    before = weights.grad.clone()
    assert all(expert.grad is None for expert in experts)
    selected = losses.selected_logprobs(weights, cached)
    assert not selected.requires_grad
    bias = losses.cdpo_bias(cached.sum(1), weights.sum(1), beta=0.1)
    assert not bias.requires_grad
    margin = double(4, seed=3)
    losses.cdpo_loss(margin, weights.sum(1)).sum().backward()
    assert margin.grad is not None
    assert torch.equal(weights.grad, before)


def test_the_normalized_loss_keeps_nothing_as_wide_as_the_vocabulary() -> None:
    weights = double(6, 2).float().detach().requires_grad_()
    experts = [double(6, 1000, seed=i).detach() for i in range(2)]
    kept: list[torch.Size] = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept.append(x.shape)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        losses.routing_loss_normalized(weights, experts, torch.zeros(6, dtype=torch.long), vocab_size=1000)
    assert kept == [torch.Size([6, 2])]


def test_unbounded_weights_stay_bounded_below() -> None:
    # The reason for the log-softmax: raw weights without it have no lower bound. Here a huge weight on the expert that
    # is right gives a loss of 0, not a negative one.
    experts = [torch.tensor([[5.0, 0.0, 0.0]]), torch.tensor([[0.0, 1.0, 0.0]])]
    weights = torch.tensor([[1e6, 0.0]], requires_grad=True)
    loss = losses.routing_loss_normalized(weights, experts, torch.tensor([0]), vocab_size=3)
    loss.sum().backward()
    assert loss.item() == 0.0
    assert torch.isfinite(weights.grad).all()


def test_wrong_shapes_are_named() -> None:
    good = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="there are 1 expert_logits"):
        losses.routing_loss_normalized(good, [torch.zeros(2, 5)], torch.zeros(2).long(), vocab_size=5)
    with pytest.raises(ValueError, match=r"expert_logits\[1\] has shape \(2, 4\).*vocab_size=5"):
        losses.routing_loss_normalized(
            good, [torch.zeros(2, 5), torch.zeros(2, 4), torch.zeros(2, 5)], torch.zeros(2).long(), vocab_size=5
        )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
def test_cdpo_with_a_fixed_selection_is_trls_dpo_with_shifted_references(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from fusionroute_tiny import tiny_model, tiny_tokenizer

    beta, alpha = 0.3, 1.5
    rng = np.random.default_rng(0)
    model = tiny_model("llama", seed=3, vocab_size=40, hidden_size=32, layers=1)
    ids = torch.from_numpy(rng.integers(3, 40, size=(6, 8)))  # three chosen, then three rejected
    completion = torch.ones_like(ids)
    completion[:, :3] = 0
    reference_sums = torch.from_numpy(-20 * rng.random((2, 3))).float()
    selected = torch.from_numpy(-9 * rng.random((2, 3))).float()

    args = trl.DPOConfig(
        str(tmp_path), beta=beta, precompute_ref_log_probs=True, use_cpu=True, bf16=False, report_to="none"
    )
    rows = {"prompt": ["w7 w8"] * 2, "chosen": [" w9"] * 2, "rejected": [" w10"] * 2}
    args.per_device_train_batch_size = 2
    trainer = trl.DPOTrainer(
        model, args=args, train_dataset=Dataset.from_dict(rows), processing_class=tiny_tokenizer(40)
    )
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": completion}
    shifted = reference_sums - alpha * selected
    inputs |= {"ref_chosen_logps": shifted[0], "ref_rejected_logps": shifted[1]}
    theirs = trainer._compute_loss(trainer.model, inputs, return_outputs=False)
    expected = torch.autograd.grad(theirs, list(trainer.model.parameters()))

    labels = ids.masked_fill(completion == 0, -100)
    logits = trainer.model(input_ids=ids).logits
    chosen, rejected = losses.label_logprobs(logits[:, :-1], labels[:, 1:]).sum(1).chunk(2)
    margin = losses.cdpo_margin(chosen, rejected, *reference_sums, beta=beta)
    ours = losses.cdpo_loss(margin, losses.cdpo_bias(*selected, beta=beta, alpha=alpha)).mean()
    got = torch.autograd.grad(ours, list(trainer.model.parameters()))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert max(float(g.abs().max()) for g in expected) > 1e-3
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
