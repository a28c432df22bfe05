"""Orders of training: permutations on any number of ranks, coherent batches, and a resume that loses nothing."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebpo_core.curriculum.samplers import CurriculumSampler, topic_batches

ORDERS = ("shuffled", "easy_to_hard", "topic", "topic_blocks")


def sampler(size: int, order: str = "shuffled", **options: Any) -> CurriculumSampler:
    rng = np.random.default_rng(size)
    columns = {
        "pass_rates": (rng.integers(0, 5, size) / 4).tolist(),
        "topics": rng.choice(["algebra", "geometry", "calculus"], size, p=[0.6, 0.3, 0.1]).tolist(),
    }
    return CurriculumSampler(size, order, **{**columns, **options})  # type: ignore[arg-type]


case = given(
    size=st.integers(1, 60),
    order=st.sampled_from(ORDERS),
    batch_size=st.integers(1, 9),
    world_size=st.integers(1, 5),
    drop_last=st.booleans(),
    data=st.data(),
)


@case
def test_every_index_once_over_all_ranks_in_one_shared_order(size, order, batch_size, world_size, drop_last, data):
    options = {"batch_size": batch_size, "world_size": world_size, "drop_last": drop_last, "seed": 3}
    ranks = [sampler(size, order, rank=rank, **options) for rank in range(world_size)]
    plan = ranks[0].plan().tolist()
    parts = [list(rank) for rank in ranks]
    assert [len(part) for part in parts] == [len(rank) for rank in ranks]
    woven = [index for row in itertools.zip_longest(*parts) for index in row if index is not None]
    assert woven == plan
    assert len(set(woven)) == len(woven) == (size - size % batch_size if drop_last else size)
    assert set(woven) <= set(range(size))


@case
def test_a_resumed_run_goes_on_at_the_next_index(size, order, batch_size, world_size, drop_last, data):
    """Also on another number of ranks, and in a later epoch."""
    options = {"batch_size": batch_size, "drop_last": drop_last, "seed": 5}
    ranks = [sampler(size, order, rank=rank, world_size=world_size, **options) for rank in range(world_size)]
    epoch = data.draw(st.integers(0, 3))
    for rank in ranks:
        rank.set_epoch(epoch)
    steps = data.draw(st.integers(0, min(len(rank) for rank in ranks)))
    seen = [list(itertools.islice(iter(rank), steps)) for rank in ranks]
    states = [rank.state_dict() for rank in ranks]
    assert all(state == states[0] for state in states)
    state = json.loads(json.dumps(states[0]))
    others = data.draw(st.integers(1, 5))
    rest = []
    for rank in range(others):
        again = sampler(size, order, rank=rank, world_size=others, **options)
        again.load_state_dict(state)
        assert again.state_dict() == state
        again.set_epoch(epoch)  # as a trainer does at the start of the epoch it resumes
        rest.append(list(again))
        following = list(again)
        assert following == sampler(size, order, **options).plan(epoch + 1).tolist()[rank::others]
    done = [index for part in seen for index in part]
    left = [index for part in rest for index in part]
    assert sorted(done + left) == sorted(ranks[0].plan(epoch).tolist())


@given(st.integers(1, 60), st.sampled_from(ORDERS), st.integers(0, 2**40), st.integers(0, 5))
def test_the_same_seed_and_epoch_give_the_same_order(size: int, order: str, seed: int, epoch: int) -> None:
    one, other = sampler(size, order, seed=seed), sampler(size, order, seed=seed)
    for _ in range(epoch):
        list(one)
    other.set_epoch(epoch)
    assert list(one) == list(other)


def test_epochs_and_seeds_differ() -> None:
    for order in ORDERS:
        first = sampler(200, order)
        assert len({tuple(first.plan(epoch)) for epoch in range(4)}) == 4
        assert len({tuple(sampler(200, order, seed=seed).plan(0)) for seed in range(4)}) == 4


def test_easy_to_hard_is_sorted_and_ties_are_shuffled() -> None:
    first = sampler(300, "easy_to_hard")
    assert first.pass_rates is not None
    order = list(first)
    rates = [first.pass_rates[index] for index in order]
    assert rates == sorted(rates, reverse=True)
    ties = [index for index in order if first.pass_rates[index] == 1.0]
    assert ties != sorted(ties)


@given(
    topics=st.lists(st.sampled_from("abcd"), min_size=1, max_size=60),
    batch_size=st.integers(1, 8),
    blocks=st.booleans(),
    seed=st.integers(0, 99),
)
def test_topic_batches_are_as_coherent_as_can_be(topics, batch_size, blocks, seed):
    order = topic_batches(topics, batch_size, np.random.default_rng(seed), blocks=blocks)
    assert sorted(order) == list(range(len(topics)))
    batches = [[topics[i] for i in order[start : start + batch_size]] for start in range(0, len(order), batch_size)]
    possible = sum(count // batch_size for count in Counter(topics).values())
    coherent = [batch[0] for batch in batches[:possible] if len(set(batch)) == 1 and len(batch) == batch_size]
    assert len(coherent) == possible
    if blocks:
        assert len(list(itertools.groupby(coherent))) == len(set(coherent))
    # What is left is topic by topic too.
    rest = [topics[i] for i in order[possible * batch_size :]]
    assert len(list(itertools.groupby(rest))) == len(set(rest))


def test_batches_of_several_ranks_are_coherent_together() -> None:
    topics = ["a"] * 64 + ["b"] * 64
    ranks = [
        iter(CurriculumSampler(128, "topic", topics=topics, batch_size=16, rank=rank, world_size=4))
        for rank in range(4)
    ]
    for _ in range(8):
        batch = [next(rank) for rank in ranks for _ in range(4)]
        assert len({topics[index] for index in batch}) == 1


def test_topics_interleave_unless_in_blocks() -> None:
    topics = ["a", "b"] * 200
    plain = [topics[i] for i in CurriculumSampler(400, "topic", topics=topics, batch_size=4)]
    blocks = [topics[i] for i in CurriculumSampler(400, "topic_blocks", topics=topics, batch_size=4)]
    assert len(list(itertools.groupby(plain))) > 20
    assert len(list(itertools.groupby(blocks))) == 2


def test_an_abandoned_iteration_does_not_shorten_the_next() -> None:
    first = sampler(20)
    list(itertools.islice(iter(first), 7))
    assert len(list(first)) == 20
    assert first.epoch == 1


def test_state_of_another_curriculum_is_refused_and_changes_nothing() -> None:
    first = sampler(30, "topic", batch_size=4)
    list(itertools.islice(iter(first), 9))
    state = first.state_dict()
    others = [
        sampler(30, "topic", batch_size=4, seed=1),
        sampler(30, "topic", batch_size=5),
        sampler(30, "topic_blocks", batch_size=4),
        sampler(30, "shuffled", batch_size=4),
        sampler(31, "topic", batch_size=4),
        sampler(30, "topic", batch_size=4, topics=["a"] * 30),
        sampler(30, "topic", batch_size=4, drop_last=True),
    ]
    for other in others:
        before = other.state_dict()
        with pytest.raises(ValueError, match="another order"):
            other.load_state_dict(state)
        assert other.state_dict() == before
    for wrong in ({}, {**state, "version": 2}, {**state, "drawn": "9"}):
        with pytest.raises(ValueError, match="state_dict"):
            first.load_state_dict(wrong)
    for wrong in ({**state, "drawn": 31}, {**state, "drawn": -1}, {**state, "epoch": -1}):
        with pytest.raises(ValueError, match="this curriculum has 30"):
            first.load_state_dict(wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "hard"}, "order='hard'"),
        ({"size": 0}, "size=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"world_size": 0}, "world_size=0"),
        ({"rank": 2, "world_size": 2}, "rank=2"),
        ({"seed": -1}, "seed=-1"),
        ({"order": "easy_to_hard"}, "pass_rates"),
        ({"order": "easy_to_hard", "pass_rates": [0.5]}, "got 1"),
        ({"order": "easy_to_hard", "pass_rates": [0.5, 1.5, 0.1]}, r"pass_rates\[1\]"),
        ({"order": "easy_to_hard", "pass_rates": [0.5, 0.5, float("nan")]}, r"pass_rates\[2\]"),
        ({"order": "topic_blocks"}, "topics"),
        ({"order": "topic", "topics": ["a"]}, "got 1"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CurriculumSampler(**{"size": 3, **options})


def test_in_a_loader_of_torch() -> None:
    torch = pytest.importorskip("torch")
    rows = torch.arange(40)
    ranks = [sampler(40, "topic", batch_size=8, rank=rank, world_size=2) for rank in range(2)]
    loaders = [torch.utils.data.DataLoader(rows, batch_size=4, sampler=rank) for rank in ranks]
    assert all(len(loader) == 5 for loader in loaders)
    batches = [torch.cat(pair).tolist() for pair in zip(*loaders, strict=True)]
    assert [sorted(batch) for batch in batches] == [
        sorted(ranks[0].plan(0)[start : start + 8].tolist()) for start in range(0, 40, 8)
    ]
