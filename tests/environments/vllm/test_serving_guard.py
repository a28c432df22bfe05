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

import prometheus_client
import pytest
import torch
from prometheus_client import CollectorRegistry, multiprocess
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality
from vllm.v1.sample.logits_processor import _load_logitsprocs_by_fqcns as by_name

from ebpo_core.fusionroute.vllm import counters, guard
from ebpo_core.fusionroute.vllm.counters import FOLDER, Collector, open_counts, publish

V, NAMES = 50, ["math", "code"]
EXTRA = len(NAMES) + 2


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    monkeypatch.setattr(guard, "get_tensor_model_parallel_rank", lambda: 0)
    return tmp_path


@pytest.fixture
def processor(folder: Path) -> Any:
    (found,) = by_name([guard.processor_name(V)])
    config = SimpleNamespace(experts=[{"name": name} for name in NAMES])
    return found(SimpleNamespace(model_config=SimpleNamespace(hf_config=config)), torch.device("cpu"), False)


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


@pytest.mark.parametrize(
    "parameters",
    [{"logit_bias": {V: 1.0}}, {"allowed_token_ids": [1, V + EXTRA - 1]}, {"stop_token_ids": [V]}],
)
def test_requests_that_name_extra_ids_are_refused(parameters: dict[str, Any]) -> None:
    (found,) = by_name([guard.processor_name(V)])
    with pytest.raises(VLLMValidationError, match="carry the routing"):
        found.validate_params(SamplingParams(**parameters))
    found.validate_params(
        SamplingParams(logit_bias={V - 1: 1.0}, logprobs=EXTRA, logprob_token_ids=[V, V + 1, V + 2, V + 3])
    )
    # Another model's guard has another vocabulary.
    (wider,) = by_name([guard.processor_name(2 * V)])
    wider.validate_params(SamplingParams(**parameters))


def test_log_probabilities_of_prompts_are_refused_where_the_checkpoint_is_compiled() -> None:
    compiled, plain = by_name([guard.processor_name(V, compiled=True), guard.processor_name(V)])
    with pytest.raises(VLLMValidationError, match="prompt_logprobs is 0: a compiled checkpoint"):
        compiled.validate_params(SamplingParams(prompt_logprobs=0))
    compiled.validate_params(SamplingParams(logprobs=1))
    plain.validate_params(SamplingParams(prompt_logprobs=0))
    with pytest.raises(VLLMValidationError, match="carry the routing"):
        compiled.validate_params(SamplingParams(stop_token_ids=[V]))
    assert pickle.loads(pickle.dumps(compiled)) is compiled


def test_the_guards_class_is_found_by_its_name_alone() -> None:
    (found,) = by_name([guard.processor_name(V)])
    assert found is by_name([guard.processor_name(V)])[0]
    assert pickle.loads(pickle.dumps(found)) is found
    for wrong in ("Vocabulary", "Vocabulary-1", "Vocabularyx"):
        with pytest.raises(AttributeError):
            getattr(guard, wrong)


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
