"""Expert cache: what it holds, that nothing is computed twice, and that nothing stale is read."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import fusionroute_worker as worker
import numpy as np
import pytest
import torch
from fusionroute_tiny import tiny_model, tiny_tokenizer

from ebpo_core.fusionroute.training import columns, reference
from ebpo_core.fusionroute.training.batches import informative_positions
from ebpo_core.fusionroute.training.expert_cache import ExpertSource, annotate, annotation, expert_columns
from ebpo_core.fusionroute.training.sequences import TokenSequences

V = worker.V


def test_every_number_is_what_the_expert_says_of_the_sequence_alone(tmp_path: Path) -> None:
    models, data = worker.experts(), worker.random_sequences()
    cache = worker.build_cache(tmp_path, models)
    assert len(cache) == len(data) == 23
    assert cache.column_names == ["argmax_0", "logprobs_0", "argmax_1", "logprobs_1"]
    for i in range(len(data)):
        ids, labels = data[i]
        alone = [m.model(torch.tensor(ids[None]).long()).logits[0, :, :V].detach().double().numpy() for m in models]
        sample = reference.Sample(alone[0], np.zeros((len(ids), 2)), alone, labels.astype(np.int64))
        positions = reference.predictions(sample.labels)
        argmax, logprobs = annotation(cache, i)
        assert (argmax.dtype, logprobs.dtype) == (np.int32, np.float32)
        assert argmax.shape == logprobs.shape == (len(positions), 2)
        for row, (t, y) in enumerate(positions):
            expected = reference.expert_logprobs(sample, t)
            assert argmax[row].tolist() == [int(p.argmax()) for p in expected]
            np.testing.assert_allclose(logprobs[row], [p[y] for p in expected], rtol=1e-4, atol=1e-4)
        mask = informative_positions(argmax, np.zeros(len(positions), dtype=np.int64))
        assert [t for (t, _), own in zip(positions, mask.tolist(), strict=True) if own] == reference.informative(sample)
    with pytest.raises(IndexError):
        annotation(cache, 23)


def test_ids_of_padding_beyond_v_never_win(tmp_path: Path) -> None:
    model = tiny_model("llama", vocab_size=V + 8, hidden_size=32, layers=1)
    with torch.no_grad():
        model.lm_head.weight[V:] *= 100  # the widest logits are of ids that are no tokens
    argmax, logprobs = annotation(worker.build_cache(tmp_path, [worker.Counted(model)]), 0)
    assert argmax.max() < V
    ids, labels = worker.random_sequences()[0]
    logits = model(torch.tensor(ids[None]).long()).logits[0, :-1]
    assert (logits.argmax(-1) >= V).any()
    own = torch.tensor(labels[1:]).long() != -100
    expected = logits[own, :V].log_softmax(-1).gather(1, torch.tensor(labels[1:]).long()[own][:, None])[:, 0]
    np.testing.assert_allclose(logprobs[:, 0], expected.detach(), rtol=1e-5, atol=1e-5)


def test_batches_are_by_length_and_bounded() -> None:
    seen: list[tuple[int, int]] = []
    model = worker.Counted(tiny_model("llama", vocab_size=V, hidden_size=32, layers=1))

    def watch(**inputs: Any) -> Any:
        seen.append(tuple(inputs["input_ids"].shape))
        assert not torch.is_grad_enabled()
        return worker.Counted.__call__(model, **inputs)

    options: dict[str, Any] = {"name": "it", "device": "cpu", "vocab_size": V, "batch_tokens": 24}
    data = worker.random_sequences()
    found = annotate(watch, data, [5, 0, 7], **options)
    assert [len(one.argmax) for one in found] == [data.label_counts[i] for i in (5, 0, 7)]
    seen.clear()
    annotate(watch, data, range(23), **options)
    assert sum(rows for rows, _ in seen) == 23
    assert all(rows * width <= 24 for rows, width in seen)
    assert [width for _, width in seen] == sorted((width for _, width in seen), reverse=True)


def test_nothing_is_computed_twice_and_no_expert_is_loaded_for_it(tmp_path: Path) -> None:
    first = worker.build_cache(tmp_path)

    def never() -> Any:
        pytest.fail("an expert was loaded")

    again = worker.build_cache(
        tmp_path, experts=[ExpertSource(f"e{i}", f"hash{i}", never) for i in range(2)], shard_rows=100
    )
    assert worker.content(again) == worker.content(first)
    names = sorted(file.name for file in tmp_path.iterdir())  # a file per expert, and nothing else
    assert [name[:9] for name in names] == ["expert-00", "expert-01"]
    assert all(name.endswith(".arrow") for name in names)


def test_an_expert_that_comes_in_addition_leaves_the_others_as_they_are(tmp_path: Path) -> None:
    first, models = worker.build_cache(tmp_path), worker.experts()
    more = [*models, worker.Counted(tiny_model("llama", 3, vocab_size=V, hidden_size=32, layers=1))]
    second = worker.build_cache(tmp_path, more)
    assert [model.calls > 0 for model in more] == [False, False, True]
    assert annotation(second, 4).argmax[:, :2].tolist() == annotation(first, 4).argmax.tolist()
    assert annotation(second, 4).argmax.shape[1] == 3


def test_experts_take_turns_in_memory(tmp_path: Path) -> None:
    import gc
    import weakref

    alive: list[weakref.ref[Any]] = []

    def load(seed: int) -> Any:
        gc.collect()
        assert all(ref() is None for ref in alive), "the expert before is still in memory"
        model = worker.Counted(tiny_model("llama", seed, vocab_size=V, hidden_size=32, layers=1))
        alive.append(weakref.ref(model))
        return model

    worker.build_cache(tmp_path, experts=[ExpertSource(f"e{i}", str(i), lambda i=i: load(i)) for i in range(3)])
    assert len(alive) == 3


def test_a_pickled_cache_reads_the_same(tmp_path: Path) -> None:
    cache = worker.build_cache(tmp_path)
    expected = annotation(cache, 9)
    copy = pickle.loads(pickle.dumps(cache))
    assert len(pickle.dumps(cache)) < 10_000  # the files' names, not what is in them
    assert (annotation(copy, 9).argmax == expected.argmax).all()


def test_what_changed_is_named_and_rebuilt_on_demand(tmp_path: Path) -> None:
    cache = worker.build_cache(tmp_path, tokenizer=tiny_tokenizer(V))
    experts = worker.sources(worker.experts())
    changes: list[tuple[dict[str, Any], str]] = [
        ({"experts": [experts[0], experts[1]._replace(identity="other")]}, r"expert 1 'e1' \(its weights"),
        ({"experts": experts[:1]}, r"the number of experts \(2, now 1\)"),
        ({"data": worker.random_sequences(seed=1)}, r"the data \(token ids or labels\)"),
        ({"tokenizer": tiny_tokenizer(V - 1)}, "changed since: the tokenizer"),
        ({"vocab_size": V + 1}, r"vocab_size \(40, now 41\)"),
    ]
    for change, message in changes:
        options = {"tokenizer": tiny_tokenizer(V), **change}
        with pytest.raises(ValueError, match=message):
            worker.build_cache(tmp_path, **options)
    with pytest.raises(ValueError, match="changed since: the tokenizer, the data"):
        worker.build_cache(tmp_path, data=worker.random_sequences(seed=1))
    expected = worker.content(cache)
    assert worker.content(worker.build_cache(tmp_path, tokenizer=tiny_tokenizer(V))) == expected  # as it was

    # One expert has changed: the other's columns stay.
    models = worker.experts()
    changed = [
        source._replace(identity=f"other{i}") if i else source for i, source in enumerate(worker.sources(models))
    ]
    options = {"tokenizer": tiny_tokenizer(V), "on_change": "rebuild"}
    worker.build_cache(tmp_path, experts=changed, **options)
    assert [model.calls > 0 for model in models] == [False, True]

    copy = pickle.dumps(cache)
    rebuilt = worker.build_cache(tmp_path, data=worker.random_sequences(9, seed=1), on_change="rebuild")
    assert len(rebuilt) == 9
    assert len(list(tmp_path.iterdir())) == 2
    assert worker.content(cache) == expected  # opened before: it keeps what it has
    with pytest.raises(FileNotFoundError):
        pickle.loads(copy)  # and who opens it anew is not given another cache


def test_what_changed_is_noticed_before_anything_is_computed(tmp_path: Path) -> None:
    worker.build_cache(tmp_path)
    next(tmp_path.glob("expert-00-*")).unlink()
    models = worker.experts()
    changed = [
        source._replace(identity=f"other{i}") if i else source for i, source in enumerate(worker.sources(models))
    ]
    with pytest.raises(ValueError, match=r"expert 1 'e1' \(its weights"):
        worker.build_cache(tmp_path, experts=changed)
    assert [model.calls for model in models] == [0, 0]


def test_a_build_that_was_cut_short_is_of_its_data_alone(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError):
        worker.build_cache(tmp_path, worker.experts(fail_at=4))
    assert list(tmp_path.glob("expert-01-*.arrow.shards/*.arrow"))
    data = worker.random_sequences(seed=1)
    next(tmp_path.glob("expert-00-*")).unlink()
    with pytest.raises(ValueError, match="changed since: the data"):
        worker.build_cache(tmp_path, data=data)
    cache = worker.build_cache(tmp_path, data=data, on_change="rebuild")
    assert [len(row[0]) for row in worker.content(cache)] == data.label_counts.tolist()
    assert len(list(tmp_path.iterdir())) == 2


def test_errors(tmp_path: Path) -> None:
    worker.build_cache(tmp_path)
    with pytest.raises(ValueError, match="on_change='never'"):
        worker.build_cache(tmp_path, on_change="never")
    with pytest.raises(ValueError, match="experts is empty"):
        expert_columns(tmp_path, worker.random_sequences(), [], vocab_size=V)
    with pytest.raises(ValueError, match=r"sequence \d+: input id \d+ .* vocab_size=20"):
        worker.build_cache(tmp_path, vocab_size=20)
    with pytest.raises(ValueError, match="shard_rows=0"):
        worker.build_cache(tmp_path / "other", shard_rows=0)
    with pytest.raises(FloatingPointError, match=r"expert 'e1', sequence \d+: a label has log-probability nan"):
        worker.build_cache(tmp_path / "nan", worker.experts(fail_at=2))
    file = next(tmp_path.glob("expert-00-*"))
    for content in (b"", b"{", file.read_bytes()[:-1000]):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"expert-00-.* is damaged, remove it"):
            worker.build_cache(tmp_path)


def test_progress_in_plain_lines(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    worker.build_cache(tmp_path, progress=True)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 10
    assert lines[-1] == "expert cache 46/46  e1"


def test_no_sequences(tmp_path: Path) -> None:
    assert len(worker.build_cache(tmp_path, data=TokenSequences.of([]))) == 0


def test_ranks_that_do_not_share_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "_SHARED_SECONDS", 0.0)
    with pytest.raises(ValueError, match="does not see 'expert-00.arrow', which rank 0 wrote there"):
        columns.wait_for(tmp_path / "expert-00.arrow")
    worker.build_cache(tmp_path)
    columns.wait_for(next(tmp_path.glob("expert-00-*")))
