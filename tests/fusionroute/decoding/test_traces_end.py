"""A trace ends where its row ends: by whatever criterion, on the kernels' loop and on that of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fusionroute_ends import After, at_string
from fusionroute_oracle import fusionroute, padded_prompts
from transformers import StoppingCriteriaList

from ebpo_core.fusionroute import FusionRouteForCausalLM

NEW = 12
EOS = 2
LOOPS: dict[str, dict[str, Any]] = {
    "kernels": {},
    "sampling": {"do_sample": True, "top_k": 5},
    "transformers": {"output_scores": True, "return_dict_in_generate": True},
    "no cache": {"use_cache": False},
    "routing only": {"complementary": False},
    "chunks": {"prefill_chunk_size": 2},
}


@pytest.fixture(scope="module")
def model() -> FusionRouteForCausalLM:
    return fusionroute(["llama", "qwen2"])


@pytest.fixture(scope="module")
def prompts() -> dict[str, Any]:
    ids, mask = padded_prompts([4, 9, 6], seed=1)
    return {"input_ids": ids, "attention_mask": mask, "max_new_tokens": NEW, "eos_token_id": EOS, "pad_token_id": 0}


def check(out: Any, prompt: int, counts: list[int]) -> None:
    for sequence, trace, count in zip(out.sequences, out.routing, counts, strict=True):
        assert [token.id for token in trace.tokens] == sequence[prompt : prompt + count].tolist()
        assert sum(trace.shares.values()) == pytest.approx(1)
        assert sequence[prompt + count :].eq(0).all()


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("counts", [[1, 5, 3], [4, 4, 4], [NEW, 2, NEW]])
def test_rows_that_a_criterion_ends_one_by_one(model: Any, prompts: Any, loop: str, counts: list[int]) -> None:
    prompt = prompts["input_ids"].shape[1]
    out = model.generate(
        **prompts, **LOOPS[loop], output_routing=True, stopping_criteria=StoppingCriteriaList([After(prompt, counts)])
    )
    new = out.sequences[:, prompt:].tolist()
    check(out, prompt, [min(n, row.index(EOS) + 1 if EOS in row else n) for n, row in zip(counts, new, strict=True)])


@pytest.mark.parametrize("loop", LOOPS)
def test_rows_that_end_with_a_string(model: Any, prompts: Any, loop: str) -> None:
    prompt = prompts["input_ids"].shape[1]
    options = {key: value for key, value in LOOPS[loop].items() if key not in ("do_sample", "top_k")}
    plain = model.generate(**prompts, **{**options, "return_dict_in_generate": False})
    stop = int(plain[1, prompt + 3])
    new = plain[:, prompt:].tolist()
    counts = [min([row.index(token) + 1 for token in (stop, EOS) if token in row] or [NEW]) for row in new]
    out = model.generate(**prompts, **options, output_routing=True, **at_string(stop))
    length = out.sequences.shape[1] - prompt
    check(out, prompt, [min(count, length) for count in counts])
    assert min(counts) < NEW


@pytest.mark.parametrize("mode", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_beams_that_end_with_a_string(model: Any, prompts: Any, mode: dict[str, int]) -> None:
    prompt = prompts["input_ids"].shape[1]
    stop = int(model.generate(**prompts, **mode)[0, prompt + 3])
    out = model.generate(**prompts, **mode, output_routing=True, **at_string(stop))
    for sequence, trace in zip(out.sequences, out.routing, strict=True):
        tokens = [token.id for token in trace.tokens]
        assert sequence[prompt:].tolist() == tokens + [0] * (out.sequences.shape[1] - prompt - len(tokens))


def test_drafts_that_a_criterion_ends(model: Any, prompts: Any) -> None:
    one = {**prompts, "input_ids": prompts["input_ids"][1:2], "attention_mask": prompts["attention_mask"][1:2]}
    prompt = one["input_ids"].shape[1]
    stop = int(model.generate(**one)[0, prompt + 5])
    out = model.generate(
        **one,
        prompt_lookup_num_tokens=3,
        output_routing=True,
        **at_string(stop),
    )
    assert [token.id for token in out.routing[0].tokens] == out.sequences[0, prompt:].tolist()
    assert len(out.routing[0].tokens) < NEW


def test_a_trace_needs_a_prompt_that_ends_in_a_token(model: Any) -> None:
    """No expert is selected at padding, and the first token would be written there."""
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    for given in ({"attention_mask": (ids != 0).long()}, {}):
        with pytest.raises(ValueError, match=r"row 1 ends in padding.*padding_side='left'"):
            model.generate(ids, **given, max_new_tokens=3, pad_token_id=0, output_routing=True)
