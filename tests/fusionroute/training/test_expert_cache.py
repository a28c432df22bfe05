"""``ExpertCache``: what it holds, that nothing is computed twice, and that nothing stale is read."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import fusionroute_worker as worker
import numpy as np
import pytest
import torch
from fusionroute_tiny import tiny_model, tiny_tokenizer

from ebpo_core.fusionroute.training import cache_build, reference
from ebpo_core.fusionroute.training.annotation import ExpertSource, annotate
from ebpo_core.fusionroute.training.cache_key import CacheKey, tokenizer_fingerprint
from ebpo_core.fusionroute.training.expert_cache import ExpertCache
from ebpo_core.fusionroute.training.losses import informative_mask
from ebpo_core.fusionroute.training.sequences import TokenSequences

V = worker.V


def test_every_number_is_what_the_expert_says_of_the_sequence_alone(tmp_path: Path) -> None:
    models, data = worker.experts(), worker.random_sequences()
    cache = worker.build_cache(tmp_path, models)
    assert len(cache) == len(data) == 23
    assert cache.names == ["e0", "e1"]
    for i in range(len(data)):
        ids, labels = data[i]
        alone = [m.model(torch.tensor(ids[None]).long()).logits[0, :, :V].detach().double().numpy() for m in models]
        sample = reference.Sample(alone[0], np.zeros((len(ids), 2)), alone, labels.astype(np.int64))
        positions = reference.predictions(sample.labels)
        argmax, logprobs = cache[i]
        assert (argmax.dtype, logprobs.dtype) == (np.int32, np.float32)
        assert argmax.shape == logprobs.shape == (len(positions), 2)
        for row, (t, y) in enumerate(positions):
            expected = reference.expert_logprobs(sample, t)
            assert argmax[row].tolist() == [int(p.argmax()) for p in expected]
            np.testing.assert_allclose(logprobs[row], [p[y] for p in expected], rtol=1e-4, atol=1e-4)
        mask = informative_mask(torch.tensor(argmax), torch.zeros(len(positions)))
        assert [t for (t, _), own in zip(positions, mask.tolist(), strict=True) if own] == reference.informative(sample)
    with pytest.raises(IndexError):
        cache[23]


def test_ids_of_padding_beyond_v_never_win(tmp_path: Path) -> None:
    model = tiny_model("llama", vocab_size=V + 8, hidden_size=32, layers=1)
    with torch.no_grad():
        model.lm_head.weight[V:] *= 100  # the widest logits are of ids that are no tokens
    argmax, logprobs = worker.build_cache(tmp_path, [worker.Counted(model)])[0]
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

    watch.device = "cpu"
    data = worker.random_sequences()
    found = annotate(watch, data, [5, 0, 7], vocab_size=V, batch_tokens=24)
    assert [len(one.argmax) for one in found] == [data.label_counts[i] for i in (5, 0, 7)]
    seen.clear()
    annotate(watch, data, range(23), vocab_size=V, batch_tokens=24)
    assert sum(rows for rows, _ in seen) == 23
    assert all(rows * width <= 24 for rows, width in seen)
    assert [width for _, width in seen] == sorted((width for _, width in seen), reverse=True)


def test_nothing_is_computed_twice_and_no_expert_is_loaded_for_it(tmp_path: Path) -> None:
    first = worker.build_cache(tmp_path)

    def never() -> Any:
        pytest.fail("an expert was loaded")

    again = worker.build_cache(
        tmp_path, experts=[ExpertSource(f"e{i}", f"hash{i}", never) for i in range(2)], shard_size=100
    )
    assert again.key == first.key
    assert all((a.logprobs == b.logprobs).all() for a, b in zip(map(first.__getitem__, range(23)), again, strict=False))
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "manifest.json",
        *[f"shard-{i:05d}.safetensors" for i in range(6)],
    ]


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
    expected = cache[9]  # a file is open
    copy = pickle.loads(pickle.dumps(cache))
    assert (copy[9].argmax == expected.argmax).all()


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
    assert ExpertCache.open(tmp_path).key == cache.key  # as it was
    assert ExpertCache.open(tmp_path, key=cache.key)[0].argmax.shape == cache[0].argmax.shape
    other = CacheKey(cache.key.experts, "other", "other", V)
    with pytest.raises(ValueError, match="changed since: the tokenizer, the data"):
        ExpertCache.open(tmp_path, key=other)

    rebuilt = worker.build_cache(tmp_path, data=worker.random_sequences(9, seed=1), on_change="rebuild")
    assert len(rebuilt) == 9
    assert len(list(tmp_path.glob("shard-*"))) == 3
    with pytest.raises(ValueError, match="belongs to another cache"):
        _ = cache[10]  # opened before; its files are another cache's now


def test_a_rebuild_that_was_cut_short_leaves_nothing_to_mix_up(tmp_path: Path) -> None:
    worker.build_cache(tmp_path)
    old = (tmp_path / "shard-00000.safetensors").read_bytes()
    (tmp_path / "manifest.json").unlink()  # where a rebuild stands after its first step
    data = worker.random_sequences(seed=1)
    cache = worker.build_cache(tmp_path, data=data)
    assert cache[0].argmax.shape[0] == data.label_counts[0]
    assert (tmp_path / "shard-00000.safetensors").read_bytes() != old


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no expert cache at"):
        ExpertCache.open(tmp_path / "nothing")
    cache = worker.build_cache(tmp_path)
    (tmp_path / "shard-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="not finished, 1 of its 6 shards are missing"):
        ExpertCache.open(tmp_path)
    with pytest.raises(ValueError, match="on_change='never'"):
        worker.build_cache(tmp_path, on_change="never")
    with pytest.raises(ValueError, match=r"sequence \d+: input id \d+ .* vocab_size=20"):
        worker.build_cache(tmp_path, vocab_size=20)
    with pytest.raises(ValueError, match="shard_size=0"):
        worker.build_cache(tmp_path / "other", shard_size=0)
    with pytest.raises(FloatingPointError, match=r"expert 'e1', sequence \d+: a label has log-probability nan"):
        worker.build_cache(tmp_path / "nan", worker.experts(fail_at=2))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    for content, message in [
        ("{", "is not JSON"),
        ('{"format": "x"}', "is no expert cache"),
        (json.dumps(manifest | {"version": 2}), "has version 2 and this ebpo_core reads 1"),
    ]:
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            ExpertCache.open(tmp_path)
    assert len(cache) == 23


def test_progress_in_plain_lines(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    worker.build_cache(tmp_path, progress=True)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 10
    assert lines[-1] == "expert cache 46/46  e1"


def test_fingerprints() -> None:
    assert tokenizer_fingerprint(None) == "none"
    assert tokenizer_fingerprint(tiny_tokenizer(V)) == tokenizer_fingerprint(tiny_tokenizer(V))
    assert tokenizer_fingerprint(tiny_tokenizer(V)) != tokenizer_fingerprint(tiny_tokenizer(V + 1))


def test_no_sequences(tmp_path: Path) -> None:
    assert len(worker.build_cache(tmp_path, data=TokenSequences.of([]))) == 0


def test_ranks_that_do_not_share_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_build, "_SHARED_SECONDS", 0.0)
    with pytest.raises(ValueError, match="does not see what rank 0 wrote there"):
        cache_build.see(tmp_path)
    worker.build_cache(tmp_path)
    cache_build.see(tmp_path)
