"""docs/serving.md as a reader follows it: its code and commands in order, with the real SmolLM2, on the CPU build."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from server import Server, free_port, serving_command
from transformers import AutoTokenizer

from ebpo_core.fusionroute import FusionRouteForCausalLM
from ebpo_core.fusionroute.traces.trace import load as load_trace

pytestmark = pytest.mark.timeout(1200)  # engines start slowly on a busy machine

PAGE = (Path(__file__).parents[3] / "docs" / "serving.md").read_text(encoding="utf-8")
BIN = Path(sys.executable).parent


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


CONVERT, START, MOVED, SHOW, METRICS = (block.removeprefix("$ ").rstrip() for block in blocks("console"))
MAKE, ASK, STREAM = blocks("python")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the reader works: with the checkpoint made and converted as the page says."""
    folder = tmp_path_factory.mktemp("guide")
    run([sys.executable, "-c", MAKE], folder)
    run(words(CONVERT), folder)
    return folder


@pytest.fixture(scope="module")
def port() -> int:
    """A free one in place of the page's 8000."""
    return free_port()


@pytest.fixture(scope="module")
def server(folder: Path, port: int) -> Iterator[Server]:
    with serving_command(here(words(START), port), f"http://127.0.0.1:{port}", folder) as one:
        yield one


@pytest.fixture(scope="module")
def model(folder: Path) -> FusionRouteForCausalLM:
    return FusionRouteForCausalLM.from_pretrained(folder / "served")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder / "served")


def words(command: str) -> list[str]:
    """A command of the page, its programs from this environment."""
    program, *rest = shlex.split(command)
    return [{"python": sys.executable, "fusionroute": str(BIN / "fusionroute")}.get(program, program), *rest]


def here(command: list[str], port: int) -> list[str]:
    return [word.replace("localhost:8000", f"127.0.0.1:{port}").replace("8000", str(port)) for word in command]


def run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, (command, done.stderr[-4000:])
    return done.stdout


def test_the_page_works_as_written(server: Server, folder: Path, port: int, model: Any, tokenizer: Any) -> None:
    (asked,) = here([ASK], port)
    said = run([sys.executable, "-c", asked], folder)
    assert re.search(r"capital of France is Paris", said)

    (streamed,) = here([f"{ASK}\n{STREAM}"], port)
    lines = run([sys.executable, "-c", streamed], folder).splitlines()[1:]
    pattern = re.compile(r"(left|right) (0\.\d+|1\.0) (True|False) (.*)")
    found = [pattern.fullmatch(line) for line in lines]
    assert all(found)
    assert "".join(eval_text(match[4]) for match in found) == said.strip()

    show = [*here(words(SHOW), port), "--routing", "trace.json"]
    assert "Paris" in run(show, folder)
    assert "left" in (folder / "trace.html").read_text()
    (trace,) = load_trace(folder / "trace.json")

    # The same trace from our own `generate`, chat template and stop token included.
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    out = model.generate(ids, max_new_tokens=32, do_sample=False, output_routing=True)
    ours = out.routing[0].with_text(tokenizer)
    assert [token.id for token in trace.tokens] == [token.id for token in ours.tokens]
    assert trace.tokens[-1].id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert [token.text for token in trace.tokens] == [token.text for token in ours.tokens]
    assert trace.text == ours.text
    for served, own in zip(trace.tokens, ours.tokens, strict=True):
        assert served.expert == own.expert
        assert served.overruled == own.overruled
        assert served.weight == pytest.approx(own.weight, abs=1e-3)

    metrics = run(["/bin/bash", "-c", *here([METRICS], port)], folder)
    assert "fusionroute_vocab_size 49152.0" in metrics
    assert re.search(r'fusionroute_tokens_total{expert="(left|right)",index="\d"} [1-9]', metrics)
    for name in re.findall(r"^\| `(fusionroute_\w+)", PAGE, re.MULTILINE):
        assert name in metrics


def test_grammars_act_on_the_fused_logits(server: Server, model: Any, tokenizer: Any) -> None:
    client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)
    for question in ("Is the sky blue? Answer yes or no.", "Is fire cold? Answer yes or no.", "2 + 2 = 5, yes or no?"):
        messages: Any = [{"role": "user", "content": question}]
        choices = ["yes", "no"]
        answer = client.chat.completions.create(
            model="fused",
            messages=messages,
            temperature=0,
            max_tokens=4,
            extra_body={"structured_outputs": {"choice": choices}},
        )
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1]
        # The grammar leaves the first tokens of "yes" and "no", whole words or parts of them.
        first = {text: [one for one in tokenizer.get_vocab().items() if text.startswith(one[0])] for text in choices}
        best = {text: max(logits[index].item() for _, index in starts) for text, starts in first.items()}
        assert answer.choices[0].message.content == max(best, key=best.__getitem__)
        assert answer.choices[0].finish_reason == "stop"
    number = client.completions.create(
        model="fused",
        prompt="My phone number is",
        max_tokens=20,
        temperature=1.0,
        extra_body={"structured_outputs": {"regex": r"\d{3}-\d{4}"}},
    )
    assert re.fullmatch(r"\d{3}-\d{4}", number.choices[0].text)


def test_experts_that_moved(folder: Path) -> None:
    """The page's other start: the configuration that it gives vLLM, without the engine."""
    arguments = words(MOVED)
    assert arguments[:3] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    moved = folder / "moved"
    if not moved.exists():
        (folder / "served" / "experts" / "left").rename(moved)
    overrides = arguments[-1].replace("/models/left", str(moved))
    script = (
        "import sys; from vllm.engine.arg_utils import EngineArgs; import json;"
        "config = EngineArgs(model='served', hf_overrides=json.loads(sys.argv[1])).create_engine_config();"
        "print(config.model_config.hf_config.experts[0]['path'])"
    )
    try:
        assert run([sys.executable, "-c", script, overrides], folder).splitlines()[-1] == str(moved)
    finally:
        moved.rename(folder / "served" / "experts" / "left")


def eval_text(literal: str) -> str:
    """What ``repr`` made of a text."""
    import ast

    text: str = ast.literal_eval(literal)
    return text


@pytest.fixture(autouse=True)
def _caches(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1"}.items():
        monkeypatch.setitem(os.environ, name, value)
