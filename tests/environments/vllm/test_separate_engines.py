"""The prototype of separate engines (``benches/serving/separate.py``): ``generate``'s tokens, and none read twice."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from checkpoints import load, prompts, reference, save_checkpoint

sys.path.append(str(Path(__file__).parents[3] / "benches"))
from serving.separate import SeparateEngines

EXPERTS = {"deep": ("llama", {"layers": 3, "num_key_value_heads": 4}), "qwen": ("qwen2", {})}
LENGTHS, NEW = (5, 40, 70), 24
SETTINGS = {"max_model_len": 400, "max_num_batched_tokens": 64, "kv_cache_memory_bytes": 2**28}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("experts"), "llama", EXPERTS, alpha=0.7)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("sessions", [True, False], ids=["sessions", "calls"])
def test_tokens_are_those_of_generate_and_experts_read_what_they_missed(
    checkpoint: Path, tmp_path: Path, sessions: bool
) -> None:
    asked = prompts(LENGTHS)
    options = {"sessions": sessions, "together": sessions, "block_size": 32}
    with SeparateEngines(checkpoint, tmp_path, len(asked), **SETTINGS, **options) as engines:
        engines.generate(asked[::-1], 3)  # what other requests leave in rows and caches must not matter
        got = engines.generate(asked, NEW)
        forced = [[0] * NEW, [1] * NEW, [0, 1] * (NEW // 2)]
        planned = engines.generate(asked, NEW, plan=forced)
    model, sure = load(checkpoint), 0
    for prompt, tokens, experts in zip(asked, got.tokens, got.experts, strict=True):
        expected = reference(model, prompt, NEW)
        expected.check(tokens)
        assert experts[: expected.sure] == [token.expert for token in expected.routing[: expected.sure]]
        sure += expected.sure
    assert sure > NEW * len(asked) // 2
    assert planned.experts == forced
    computed = [work.computed for work in planned.work]
    if sessions:
        texts = [length + NEW - 1 for length in LENGTHS]
        assert computed == [sum(texts), texts[0] + texts[2] - 1, texts[1] + texts[2]]
    else:
        assert computed[0] > 5 * sum(LENGTHS)  # the part of a block behind the last whole one, at every token
