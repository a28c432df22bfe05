"""`ebpo eval` and topic labels against vLLM's real OpenAI-compatible server, on a tiny Llama made from its config."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from server import NAME, serving
from transformers import LlamaConfig, LlamaForCausalLM

from ebpo_core.cli import main
from ebpo_core.data.rows import read_rows, write_rows
from ebpo_core.evaluation.journal import read_journal
from ebpo_core.evaluation.sampling import SamplingOptions
from ebpo_core.evaluation.server import Server, ServerError, ServerModel
from ebpo_core.tasks.tiny_model import build_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of random weights whose own generation config would change samples, if it were followed."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = 512
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    own = {"do_sample": True, "top_k": 1, "repetition_penalty": 2.0, "eos_token_id": tokenizer.eos_token_id}
    (folder / "generation_config.json").write_text(json.dumps(own))
    return folder


@pytest.fixture(scope="module")
def url(model: Path) -> Iterator[str]:
    """vLLM's server, until the tests of this file are over."""
    with serving(
        model, "--dtype", "float32", "--max-model-len", "512", "--enforce-eager", "--max-num-seqs", "16"
    ) as one:
        yield one.url


def flags(url: str, output: Path, *more: str) -> list[str]:
    return ["eval", "--server", url, "--output", str(output), "--size=12", "--samples=4", "--max-new-tokens=8", *more]


def texts(folder: Path) -> dict[tuple[str, int], str]:
    return {
        (row["problem"], row["sample"]): row["text"] for row in read_journal(folder / "samples.jsonl", "samples")[1]
    }


def test_an_evaluation_through_vllm_is_seeded_and_explicit(url: str, tmp_path: Path) -> None:
    assert main(flags(url, tmp_path / "one", "--no-plot")) == 0
    settings, rows = read_journal(tmp_path / "one" / "samples.jsonl", "samples")
    assert settings["backend"] == {
        "kind": "server",
        "model": NAME,
        "extra_body": {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0},
    }
    assert {row["finish_reason"] for row in rows} <= {"stop", "length"}
    assert all(row["tokens"] >= 1 for row in rows)
    first = texts(tmp_path / "one")
    # With the model's own top_k of 1 every sample of a problem would be the same.
    assert len(set(first.values())) > 30
    assert main(flags(url, tmp_path / "two", "--no-plot", "--concurrency=3")) == 0
    assert texts(tmp_path / "two") == first
    assert main(flags(url, tmp_path / "three", "--no-plot", "--seed=1")) == 0
    assert texts(tmp_path / "three") != first


def test_chats_and_greedy_decoding(url: str, tmp_path: Path) -> None:
    assert main(flags(url, tmp_path / "run", "--no-plot", "--chat", "--temperature=0")) == 0
    found = texts(tmp_path / "run")
    assert all(found[problem, sample] == found[problem, 0] for problem, sample in found)


def test_a_refusal_is_told_in_vllms_words(url: str) -> None:
    model = ServerModel(Server(url), None, SamplingOptions(max_new_tokens=8))
    with pytest.raises(ServerError, match="status 400"):
        model.complete(" ".join(["1"] * 600), 0)
    with pytest.raises(ValueError, match="the server offers"):
        ServerModel(Server(url), "other", SamplingOptions())


def test_pass_rates_and_labels_from_one_server(url: str, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": f"{n} + {n} =", "answer": str(2 * n)} for n in range(6)]
    data = write_rows(tmp_path / "data.jsonl", rows)
    output = tmp_path / "out.parquet"
    command = ["curriculum", "--server", url, "--task", str(data), "--scorer=integer", "--output", str(output)]
    assert main([*command, "--rollouts=4", "--max-new-tokens=4", "--label-server", url, "--order=topic"]) == 0
    found = list(read_rows(output))
    assert len(found) == 6
    assert {row["topic"] for row in found} == {"unlabelled"}
    assert {row["rollouts"] for row in found} == {4}
