"""The guard of the extra ids and its counts, driven as vLLM drives logits processors, and the counters' files."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import prometheus_client
import pytest
import torch
from prometheus_client import CollectorRegistry, multiprocess
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality, _load_logitsprocs_by_fqcns
from vllm.v1.worker.gpu.sample.logits_processor.loader import (
    _load_v2_logitsprocs_by_fqcns,
    build_custom_logits_processors_params_validator,
)

from ebpo_core.fusionroute.vllm import counters, first_runner, guard, second_runner
from ebpo_core.fusionroute.vllm.counters import FOLDER, Collector, open_counts, publish

V, NAMES = 50, ["math", "code"]
EXTRA = len(NAMES) + 2


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    monkeypatch.setattr(guard, "get_tensor_model_parallel_rank", lambda: 0)
    return tmp_path


def engine(*, second: bool = False, vocab_size: int = V, compiled: bool = False) -> Any:
    """What the guard reads of an engine's configuration."""
    experts = [{"name": name} for name in NAMES]
    config = SimpleNamespace(experts=experts, vocab_size=vocab_size, compiled={"rank": 4} if compiled else None)
    return SimpleNamespace(model_config=SimpleNamespace(hf_config=config), use_v2_model_runner=second)


def guard_of(config: Any) -> Any:
    """The guard's class, found as the engine's runner finds it: by its name."""
    load = _load_v2_logitsprocs_by_fqcns if config.use_v2_model_runner else _load_logitsprocs_by_fqcns
    (found,) = load([guard.processor_name(config)])
    return found


@pytest.fixture(params=[False, True], ids=["first runner", "second runner"])
def second(request: pytest.FixtureRequest) -> bool:
    known: bool = request.param
    return known


@pytest.fixture
def processor(folder: Path) -> Any:
    return guard_of(engine())(engine(), torch.device("cpu"), False)


def sums(folder: Path) -> list[list[int]]:
    return Collector(folder, NAMES, V).sums().tolist()


def update(processor: Any, size: int, added: Any = (), removed: Any = (), moved: Any = ()) -> None:
    new = [(index, SamplingParams(), [1], tokens) for index, tokens in added]
    processor.update_state(BatchUpdate(size, removed, new, moved))


def step(processor: Any, experts: list[int], own: list[int]) -> torch.Tensor:
    """One step of the model and the sampler's call: what is selected, then masked."""
    guard.STEP.record(torch.tensor(experts), torch.tensor(own))
    logits = torch.zeros(len(experts), V + EXTRA)
    masked: torch.Tensor = processor.apply(logits)
    return masked


def test_extra_columns_are_masked_and_greedy_decoding_asks_for_it(processor: Any) -> None:
    update(processor, 1, added=[(0, [])])
    logits = step(processor, [0], [3])
    assert torch.isinf(logits[:, V:]).all()
    assert not logits[:, :V].any()
    assert processor.is_argmax_invariant() is False


def test_tokens_are_counted_when_they_are_kept(processor: Any, folder: Path) -> None:
    first: list[int] = []
    second: list[int] = [9, 9]  # came back after a preemption, with its tokens
    update(processor, 2, added=[(0, first), (1, second)])
    step(processor, [0, 1], [3, 4])
    second.append(4)  # the first one's prompt goes on: its token is thrown away
    step(processor, [1, 1], [5, 6])
    assert sums(folder) == [[0, 0], [1, 0]]
    first.append(7)
    second.append(6)
    processor.update_state(None)
    update(processor, 0, removed=[0, 1])
    assert sums(folder) == [[0, 0], [3, 1]]


def test_rows_that_move_keep_their_counts(processor: Any, folder: Path) -> None:
    tokens: list[list[int]] = [[], [], []]
    update(processor, 3, added=list(enumerate(tokens)))
    step(processor, [0, 1, 0], [1, 2, 3])
    for row, token in zip(tokens, (1, 9, 3), strict=True):
        row.append(token)
    # The first leaves, the last takes its place, the two that remain swap.
    update(
        processor,
        2,
        removed=[0],
        moved=[(2, 0, MoveDirectionality.UNIDIRECTIONAL), (0, 1, MoveDirectionality.SWAP)],
    )
    step(processor, [1, 0], [4, 5])  # of the request that was second, and of the one that was last
    assert sums(folder) == [[2, 0], [1, 1]]
    tokens[1].append(4)
    tokens[2].append(8)
    update(processor, 0, removed=[0, 1])
    assert sums(folder) == [[3, 1], [2, 1]]


def test_a_token_that_an_asynchronous_engine_did_not_bring_back_is_not_counted(processor: Any, folder: Path) -> None:
    tokens: list[int] = []
    update(processor, 1, added=[(0, tokens)])
    step(processor, [0], [1])
    tokens.append(-1)
    update(processor, 0, removed=[0])
    assert sums(folder) == [[0, 0], [0, 0]]


class _Slots:
    """The second runner's requests and its calls of a processor, in its order: requests leave unannounced, others get
    their slots, and a step's tokens are written after it."""

    def __init__(self, slots: int = 3, length: int = 16) -> None:
        self.device, self.max_num_reqs, self.vocab_size = torch.device("cpu"), slots, V + EXTRA
        self.all_token_ids = SimpleNamespace(gpu=torch.full((slots, length), -7, dtype=torch.int32))
        self.prefill_len = SimpleNamespace(np=np.zeros(slots, dtype=np.int32))
        self.processor: Any = None

    def step(self, rows: list[tuple[int, int, int, int, int]], added: dict[int, list[int]] | None = None) -> Any:
        """One step; ``added`` are tokens by slot, a row is its slot, length, expert, own token, emitted token."""
        for slot, tokens in (added or {}).items():
            self.prefill_len.np[slot] = len(tokens)
            assert self.processor.add_request(slot, SamplingParams()) is True
        for slot, tokens in (added or {}).items():
            self.all_token_ids.gpu[slot, : len(tokens)] = torch.tensor(tokens)
        self.processor.apply_staged_writes()
        if not rows:
            return None
        slots, lengths, experts, own, emitted = map(list, zip(*rows, strict=True))
        guard.STEP.record(torch.tensor(experts), torch.tensor(own))
        context = SimpleNamespace(
            idx_mapping_np=np.array(slots, dtype=np.int32),
            seq_lens_upper_bound_np=np.array([*lengths, 0], dtype=np.int32),  # padded
        )
        logits = self.processor.apply(torch.zeros(len(rows), V + EXTRA), context)
        for slot, length, token in zip(slots, lengths, emitted, strict=True):
            if length >= self.prefill_len.np[slot]:
                self.all_token_ids.gpu[slot, length] = token
        return logits


@pytest.fixture
def slots(folder: Path) -> _Slots:
    found = _Slots()
    found.processor = guard_of(engine(second=True))(engine(second=True), found)
    return found


def test_the_second_runner_masks_and_counts_what_is_kept(slots: _Slots, folder: Path) -> None:
    # The first request's prompt is read in two chunks: the token of the first chunk is thrown away.
    logits = slots.step([(2, 3, 0, 4, 9), (0, 2, 1, 5, 5)], added={2: [8] * 5, 0: [8, 8]})
    assert torch.isinf(logits[:, V:]).all()
    assert not logits[:, :V].any()
    assert sums(folder) == [[0, 0], [0, 0]]
    slots.step([(0, 3, 0, 6, 7), (2, 5, 1, 4, 4)])
    assert sums(folder) == [[0, 0], [1, 0]]
    slots.step([])  # a step without requests, after the last one's end
    assert sums(folder) == [[1, 1], [2, 0]]
    slots.step([])
    assert sums(folder) == [[1, 1], [2, 0]]


def test_the_second_runner_gives_a_slot_away_without_a_word(slots: _Slots, folder: Path) -> None:
    slots.step([(1, 2, 0, 3, 3), (2, 4, 1, 6, 2)], added={1: [8, 8], 2: [8] * 4})
    # Slot 1 is another request's now, whose prompt is where the last token was; it came back with tokens of its own.
    slots.step([(1, 6, 1, 5, 5), (2, 5, 0, 1, 1)], added={1: [9] * 6})
    assert sums(folder) == [[1, 0], [1, 1]]
    slots.step([])
    assert sums(folder) == [[2, 0], [2, 1]]


@pytest.mark.parametrize(
    "parameters",
    [{"logit_bias": {V: 1.0}}, {"allowed_token_ids": [1, V + EXTRA - 1]}, {"stop_token_ids": [V]}],
)
def test_requests_that_name_extra_ids_are_refused(parameters: dict[str, Any], second: bool) -> None:
    found = guard_of(engine(second=second))
    with pytest.raises(VLLMValidationError, match="carry the routing"):
        found.validate_params(SamplingParams(**parameters))
    found.validate_params(
        SamplingParams(logit_bias={V - 1: 1.0}, logprobs=EXTRA, logprob_token_ids=[V, V + 1, V + 2, V + 3])
    )
    # Another model's guard has another vocabulary.
    guard_of(engine(second=second, vocab_size=2 * V)).validate_params(SamplingParams(**parameters))


def test_the_second_runners_server_refuses_by_the_guards_name_alone() -> None:
    validate = build_custom_logits_processors_params_validator((guard.processor_name(engine(second=True)),))
    with pytest.raises(VLLMValidationError, match="carry the routing"):
        validate(SamplingParams(stop_token_ids=[V]))
    validate(SamplingParams(stop_token_ids=[V - 1]))


def test_log_probabilities_of_prompts_are_refused_where_the_checkpoint_is_compiled(second: bool) -> None:
    compiled, plain = (guard_of(engine(second=second, compiled=one)) for one in (True, False))
    with pytest.raises(VLLMValidationError, match="prompt_logprobs is 0: a compiled checkpoint"):
        compiled.validate_params(SamplingParams(prompt_logprobs=0))
    compiled.validate_params(SamplingParams(logprobs=1))
    plain.validate_params(SamplingParams(prompt_logprobs=0))
    with pytest.raises(VLLMValidationError, match="carry the routing"):
        compiled.validate_params(SamplingParams(stop_token_ids=[V]))
    assert pickle.loads(pickle.dumps(compiled)) is compiled


def test_the_guards_class_is_found_by_its_name_alone(second: bool) -> None:
    found = guard_of(engine(second=second))
    assert found is guard_of(engine(second=second))
    assert pickle.loads(pickle.dumps(found)) is found
    for wrong in ("Vocabulary", "Vocabulary-1", "Vocabularyx"):
        for module in (first_runner, second_runner):
            with pytest.raises(AttributeError):
                getattr(module, wrong)


def test_the_servers_metrics_are_the_sum_over_engines(folder: Path) -> None:
    script = (
        "import sys; from ebpo_core.fusionroute.vllm.counters import open_counts\n"
        "counts = open_counts(['math', 'code'], 50)\n"
        "for _ in range(int(sys.argv[1])): counts.add(1, overruled=True)\n"
        "counts.add(0, overruled=False)"
    )
    for times in ("3", "4"):
        subprocess.run([sys.executable, "-c", script, times], check=True, env=os.environ | {FOLDER: str(folder)})
    (folder / "other.json").write_text(json.dumps(["another", "model"]))  # of an engine of other experts
    publish(NAMES, V)
    publish(NAMES, V)  # another engine in this process
    text = prometheus_client.generate_latest().decode()
    assert 'fusionroute_tokens_total{expert="math",index="0"} 2.0' in text
    assert 'fusionroute_tokens_total{expert="code",index="1"} 7.0' in text
    assert 'fusionroute_overruled_tokens_total{expert="code",index="1"} 7.0' in text
    assert 'fusionroute_token_share{expert="math",index="0"} 0.222' in text
    assert f"fusionroute_vocab_size {V}.0" in text
    assert text.count("# TYPE fusionroute_tokens_total") == 1


def test_several_servers_of_one_engine_read_prometheus_own_files(tmp_path: Path) -> None:
    script = (
        "from ebpo_core.fusionroute.vllm.counters import open_counts\n"
        "counts = open_counts(['math', 'code'], 50)\n"
        "counts.add(1, overruled=True); counts.add(1, overruled=False)"
    )
    environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path), FOLDER: ""}
    for _ in range(2):
        subprocess.run([sys.executable, "-c", script], check=True, env=environment)
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry, path=str(tmp_path))
    text = prometheus_client.generate_latest(registry).decode()
    assert 'fusionroute_tokens_total{expert="code",index="1"} 4.0' in text
    assert 'fusionroute_overruled_tokens_total{expert="code",index="1"} 2.0' in text
    assert 'fusionroute_tokens_total{expert="math",index="0"} 0.0' in text
    assert f"fusionroute_vocab_size {V}.0" in text


def test_nobody_counts_where_nobody_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (FOLDER, "PROMETHEUS_MULTIPROC_DIR"):
        monkeypatch.delenv(name, raising=False)
    assert open_counts(NAMES, V) is None
    monkeypatch.setenv(FOLDER, "/gone")
    assert open_counts(NAMES, V) is None
    assert counters.FOLDER == "EBPO_FUSIONROUTE_COUNTERS"
