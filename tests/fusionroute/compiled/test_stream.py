"""The adapted stream is what the definition says, in one pass, in chunks and step by step, in six families."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fusionroute_compiled import definition, load_compiled, reference_logits, save_compiled
from fusionroute_oracle import fusionroute, padded_prompts, softmax_in_the_models_dtype
from fusionroute_tiny import FAMILIES, tiny_model
from torch import Tensor

from ebpo_core.fusionroute import FusionRouteForCausalLM
from ebpo_core.fusionroute.compat import CACHE
from ebpo_core.fusionroute.compiled.lowrank import LowRank
from ebpo_core.fusionroute.compiled.targets import target_modules

TOKENS = 30  # of windows of 8
EXACT = 1e-9


@pytest.fixture(autouse=True)
def exact_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    softmax_in_the_models_dtype(monkeypatch)


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_compiled(tmp_path_factory.mktemp("compiled") / request.param, request.param)


def tokens(count: int = TOKENS, seed: int = 1) -> list[int]:
    return padded_prompts([count], seed)[0][0].tolist()


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= EXACT * expected.abs().max())


@torch.no_grad()
def in_chunks(model: FusionRouteForCausalLM, ids: Tensor, ends: list[int], mask: Tensor | None = None) -> Tensor:
    """Fused logits of all columns, read in chunks up to ``ends`` through one cache."""
    cache, logits, start = None, [], 0
    for end in ends:
        seen = None if mask is None else mask[:, :end]
        out = model(input_ids=ids[:, start:end], attention_mask=seen, use_cache=True, **{CACHE: cache})
        cache, start = out[CACHE], end
        logits.append(out.logits)
    return torch.cat(logits, dim=1)


def test_one_pass_chunks_and_single_steps_are_the_definition(checkpoint: Path) -> None:
    model = load_compiled(checkpoint, torch.float64)
    text = tokens()
    expected, routes = definition(model, checkpoint, text)
    assert len(set(routes.tolist())) == 3  # all experts, in one text
    ids = torch.tensor([text])
    with torch.no_grad():
        assert close(model(input_ids=ids, use_cache=False).logits[0], expected)
        assert close(model(input_ids=ids, use_cache=True, logits_to_keep=3).logits[0], expected[-3:])
        for some in (torch.tensor([4, 17]), torch.tensor([-1, 3]), torch.arange(TOKENS) % 7 == 0):
            assert close(model(input_ids=ids, use_cache=False, logits_to_keep=some).logits[0], expected[some])
    assert close(in_chunks(model, ids, [11, 12, 13, 20, 21, TOKENS])[0], expected)
    assert close(in_chunks(model, ids, list(range(1, TOKENS + 1)))[0], expected)
    # And the adapters matter: the terms are not zero.
    router = model(input_ids=ids, router_only=True, use_cache=False).logits[0]
    assert (expected - 2 * router).abs().max() > 0.1


def test_left_padding_changes_nothing(checkpoint: Path) -> None:
    if checkpoint.name == "gemma2":
        pytest.skip("transformers' eager attention gives NaN for padded rows of Gemma 2, with or without experts")
    model = load_compiled(checkpoint, torch.float64)
    lengths = [5, 19, 12]
    ids, mask = padded_prompts(lengths, seed=3)
    padded = in_chunks(model, ids, [14, 15, 19], mask)
    for row, length in enumerate(lengths):
        expected, _ = definition(model, checkpoint, ids[row, -length:].tolist())
        assert close(padded[row, -length:], expected)


def test_an_expert_alone_reads_the_routers_keys(checkpoint: Path) -> None:
    model = load_compiled(checkpoint, torch.float64)
    text = tokens(seed=5)
    expected = reference_logits(model, checkpoint, text, 1)
    out = model.experts[1](input_ids=torch.tensor([text]), logits_to_keep=7, use_cache=False)
    assert close(out.logits[0], expected[-7:])
    with pytest.raises(TypeError, match="a compiled expert alone takes no use_cache: use the whole model"):
        model.experts[1](input_ids=torch.tensor([text]), use_cache=True)


def test_many_rows_and_few_take_different_products_and_agree(tmp_path: Path) -> None:
    """One row gathers its expert's matrices, three and more multiply by all of them and leave the others out."""
    model = load_compiled(save_compiled(tmp_path, "llama"), torch.float64)
    ids, _ = padded_prompts([9] * 5, seed=2)
    together = in_chunks(model, ids, [8, 9])
    for row in range(5):
        assert close(together[row], in_chunks(model, ids[row : row + 1], [8, 9])[0])


def test_alpha_complementary_and_forced_routes(tmp_path: Path) -> None:
    model = load_compiled(save_compiled(tmp_path, "qwen3"), torch.float64)
    text = tokens(12)
    ids = torch.tensor([text])
    router = model(input_ids=ids, router_only=True, use_cache=False).logits[0]
    expert = reference_logits(model, tmp_path, text, 2)
    with torch.no_grad():
        fused = model(input_ids=ids, forced_expert=2, alpha=0.5).logits[0]
        alone = model(input_ids=ids, forced_expert="llama2", complementary=False).logits[0]
        allowed = model(input_ids=ids, allowed_experts=[0, 1]).expert_ids
    assert close(fused, router + 0.5 * expert)
    assert close(alone, expert)
    assert set(allowed.flatten().tolist()) <= {0, 1}


def test_the_loss_and_finished_rows(tmp_path: Path) -> None:
    model = load_compiled(save_compiled(tmp_path, "llama"), torch.float64)
    ids, _ = padded_prompts([7, 7], seed=4)
    with torch.no_grad():
        out = model(input_ids=ids, labels=ids)
        resting = model(input_ids=ids, active_rows=torch.tensor([True, False]))
        router = model(input_ids=ids, router_only=True, use_cache=False)
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert abs(float(out.loss) - float(expected)) < 1e-5  # transformers' loss is float32
    assert torch.equal(resting.logits[1], router.logits[1])
    assert torch.equal(resting.expert_ids[1], torch.full((7,), -1))


@pytest.mark.parametrize("kind", ["gpt2", "phi3", "mixtral"])
def test_families_without_such_modules_are_refused_by_name(kind: str) -> None:
    from fusionroute_families import tiny_family_config
    from transformers import AutoModelForCausalLM

    router = AutoModelForCausalLM.from_config(tiny_family_config(kind))
    with pytest.raises(ValueError, match=f"the router is a '{kind}'.*Llama, Qwen2"):
        target_modules(router)


def test_recurrent_routers_are_refused() -> None:
    from fusionroute_families import tiny_family_config
    from transformers import AutoModelForCausalLM

    router = AutoModelForCausalLM.from_config(tiny_family_config("qwen3_next"))
    with pytest.raises(ValueError, match="keep more than keys and values"):
        target_modules(router)


def test_autocast_is_the_routers(tmp_path: Path) -> None:
    model = load_compiled(save_compiled(tmp_path, "llama"))
    ids = torch.tensor([tokens(10)])
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = model(input_ids=ids).logits
    assert (found - expected).abs().max() < 0.1 * expected.abs().max()


def test_hooks_leave_the_routers_own_forward_alone(tmp_path: Path) -> None:
    model = load_compiled(save_compiled(tmp_path, "llama"), torch.float64)
    ids = torch.tensor([tokens(10)])
    with torch.no_grad():
        before = model.router(input_ids=ids).logits
        model(input_ids=ids)
        assert torch.equal(model.router(input_ids=ids).logits, before)


def test_no_thread_sees_adapters_half_converted() -> None:
    """After a cast of the model, the first calls of several threads find the adapters in the dtype before."""
    adapters = LowRank({"q": torch.ones(1, 2, 3)}, {"q": torch.ones(1, 2, 4)})
    seen = []

    class Slow:
        def to(self, device: torch.device, dtype: torch.dtype) -> Tensor:
            seen.append(adapters.down["q"].dtype)
            return torch.ones(1, 2, 4).to(device, dtype)

    adapters.up["q"] = Slow()  # type: ignore[assignment]
    adapters.to(torch.device("cpu"), torch.float64)
    assert seen == [torch.float32]
    assert adapters.down["q"].dtype == adapters.up["q"].dtype == torch.float64


def test_target_modules_are_those_of_the_format() -> None:
    names = list(target_modules(tiny_model("llama")))
    assert names[:5] == [
        f"model.layers.0.{part}"
        for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    ]
    assert names[-1] == "lm_head"
    assert len(names) == 11
    assert not any("k_proj" in name or "v_proj" in name for name in names)


def test_uncompiled_models_are_not(tmp_path: Path) -> None:
    assert fusionroute(["llama"]).compiled is None
