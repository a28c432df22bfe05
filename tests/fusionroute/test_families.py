"""Every causal language model of the installed transformers, as router and as expert: saved, loaded, decoded."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fusionroute_families import KINDS, LARGEST, tiny_family_config
from fusionroute_tiny import tiny_model
from transformers import AutoModelForCausalLM, OPTConfig

from ebpo_core.fusionroute import FusionRouteForCausalLM
from ebpo_core.fusionroute.context import context_length, position_limit

IDS = torch.tensor([[5, 9, 30, 77, 150, 8, 199, 44, 23, 12], [7, 19, 3, 9, 11, 14, 15, 16, 17, 101]])
NEW = 8
PLAIN = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "forced_eos_token_id": None}

MIXTURES = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "olmoe", "qwen3_next", "gemma4_text")
RECURRENT = ("falcon_h1", "rwkv", "recurrent_gemma", "mamba", "minimax")
POSITIONS = ("gpt2", "opt", "gptj", "mpt", "xglm")
# Everything else equals stock models in both roles. What does not, by the role and a part of the message:
# "alone" is a tiny model that transformers itself cannot make or run, "loaded" one that it does not load as saved.
_POSITIONS = dict.fromkeys(("router", "expert"), "counts its positions from another number than 0")
_NO_CACHE = dict.fromkeys(("router", "expert"), "takes no key/value cache of transformers")
_ONE_TOKEN = {"expert": "cannot catch up on several tokens at once"}
EXCEPTIONS: dict[str, dict[str, str]] = {
    # Refused when a model is built.
    **dict.fromkeys(("camembert", "data2vec-text", "roberta", "roberta-prelayernorm"), _POSITIONS),
    **dict.fromkeys(("xlm-roberta", "xlm-roberta-xl"), _POSITIONS),
    "cpmant": dict.fromkeys(("router", "expert"), "puts a prompt of its own in front"),
    "reformer": dict.fromkeys(("router", "expert"), "caches hashed buckets"),
    "xlm": dict.fromkeys(("router", "expert"), "cuts its input by its cache"),
    # Refused where a cache is needed; right with use_cache=False.
    **dict.fromkeys(("openai-gpt", "rwkv", "minimax"), _NO_CACHE),
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba", "recurrent_gemma"), _ONE_TOKEN),
    # Alone, too, its cached forward drops keys that its other forward still looks at.
    "moshi": {"router": "other tokens with a cache than without"},
    # Configs inside of others that AutoModelForCausalLM has no class for.
    "emu3": {"loaded": "Unrecognized configuration class"},
    "mllama": {"loaded": "Unrecognized configuration class"},
    "youtu": {"loaded": "not close"},  # one logit
    # Default configs that are none of a language model, or sizes that only fit together as they are.
    **{kind: {"alone": "has no attribute"} for kind in ("blt", "dbrx", "musicgen", "musicgen_melody")},
    **{kind: {"alone": "unsupported operand"} for kind in ("qwen4_exp", "qwen4_exp_text")},
    "cohere_compass_text": {"alone": "full_attention"},
    "dory": {"alone": "must match the size"},
    "dots3_note": {"alone": "per_layer_config"},
    "dots3_note_text": {"alone": "too large for a test"},
    "gemma3n": {"alone": "timm"},
    "gemma4_assistant": {"alone": "must be 0"},
    "gemma4_unified_assistant": {"alone": "cannot be None"},
    "prophetnet": {"alone": "does not support the setting"},
    "xlnet": {"alone": "no sequence length limit"},
    "xlstm": {"alone": "wrong shape"},
    "xmod": {"alone": "Input language unknown"},
}


@pytest.fixture
def uninitialised_memory_shows() -> Iterator[None]:
    """Memory that torch.empty leaves as it was is filled with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def stock_model(kind: str) -> Any:
    config = tiny_family_config(kind)
    with torch.device("meta"):
        parameters = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
    assert parameters < LARGEST, "too large for a test"
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.add_(torch.randn_like(weight) * 0.05)
    return model


@torch.no_grad()
def same_in_every_way(model: FusionRouteForCausalLM, folder: Path) -> None:
    """Logits after a round trip, and the tokens of ``generate``, are those of one forward without a cache."""
    mask = torch.ones_like(IDS)
    logits = model(input_ids=IDS, attention_mask=mask, use_cache=False).logits
    model.save_pretrained(folder / "fused")
    loaded = FusionRouteForCausalLM.from_pretrained(folder / "fused")
    again = loaded(input_ids=IDS, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(again, logits, rtol=0, atol=1e-5)
    sequences = loaded.generate(IDS, attention_mask=mask, max_new_tokens=NEW, **PLAIN)
    assert sequences.shape == (2, IDS.shape[1] + NEW)
    scores = loaded(input_ids=sequences, attention_mask=torch.ones_like(sequences), use_cache=False).logits
    scores, tokens = scores[:, IDS.shape[1] - 1 : -1], sequences[:, IDS.shape[1] :]
    behind = scores.amax(-1) - scores.gather(-1, tokens[..., None])[..., 0]
    assert float(behind.max()) <= 1e-3 * float(scores.abs().max()), "other tokens with a cache than without"


def composed(router: Any, experts: dict[str, Any]) -> FusionRouteForCausalLM:
    model = FusionRouteForCausalLM.from_experts(router, experts)
    with torch.no_grad():
        model.route_head.weight.normal_(std=1.0, generator=torch.Generator().manual_seed(0))
    return model


def check(kind: str, folder: Path) -> dict[str, str]:
    """Problems by role; "alone" where transformers itself cannot run the kind."""
    try:
        model = stock_model(kind)
        with torch.no_grad():
            logits = model(input_ids=IDS).logits
        assert bool(logits.isfinite().all()), "logits are not finite"
    except Exception as error:
        return {"alone": _told(error)}
    try:
        model.save_pretrained(folder / "stock")
        with torch.no_grad():
            alone = AutoModelForCausalLM.from_pretrained(folder / "stock").eval()(input_ids=IDS).logits
        torch.testing.assert_close(alone, logits, rtol=0, atol=1e-5)
    except Exception as error:
        return {"loaded": _told(error)}
    context = context_length(model.config)
    if context is not None and context < 1000 and kind != "reformer":  # which pads to a length of its own
        try:
            with torch.no_grad():
                model(input_ids=torch.full((1, context + 1), 7))
            limit = None
        except (IndexError, RuntimeError):
            limit = context
        if position_limit(model) != limit:
            return {"positions": f"{position_limit(model)} of {limit}"}
    for name, seed in (("llama", 9), ("other", 10)):
        tiny_model("llama", seed).save_pretrained(folder / name)
    problems = {}
    for role in ("router", "expert"):
        try:
            if role == "router":
                fused = composed(
                    AutoModelForCausalLM.from_pretrained(folder / "stock"),
                    {"a": folder / "llama", "b": folder / "other"},
                )
                added = fused.experts["a"].model
            else:
                fused = composed(tiny_model("llama", 8), {"a": folder / "stock", "b": folder / "other"})
                added = fused.router
            with torch.no_grad():
                sums = fused(input_ids=IDS, forced_expert="a", use_cache=False).logits
                V = sums.shape[-1]
                expected = logits[..., :V].float() + added(input_ids=IDS).logits[..., :V]
            torch.testing.assert_close(sums, expected, rtol=0, atol=1e-4)
            same_in_every_way(fused, folder / role)
        except Exception as error:  # noqa: PERF203
            problems[role] = _told(error)
    return problems


def _told(error: Exception) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]} ({Path(place.filename).name}:{place.lineno})"


def agrees(kind: str, folder: Path) -> None:
    found, expected = check(kind, folder), EXCEPTIONS.get(kind, {})
    assert found.keys() == expected.keys(), found
    for role, message in found.items():
        assert expected[role] in message


@pytest.mark.parametrize("kind", [*MIXTURES, *RECURRENT, *POSITIONS])
@pytest.mark.usefixtures("uninitialised_memory_shows")
@pytest.mark.filterwarnings("ignore")
def test_mixtures_recurrent_models_and_tables_of_positions(kind: str, tmp_path: Path) -> None:
    agrees(kind, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in MIXTURES + RECURRENT + POSITIONS])
@pytest.mark.usefixtures("uninitialised_memory_shows")
@pytest.mark.filterwarnings("ignore")
def test_every_other_family(kind: str, tmp_path: Path) -> None:
    agrees(kind, tmp_path)


@pytest.mark.parametrize("kind", ["rwkv", "openai-gpt", "minimax", "mamba"])
@pytest.mark.parametrize("role", ["router", "expert"])
def test_without_a_cache_every_model_is_right(kind: str, role: str) -> None:
    other = tiny_model("llama", 9)
    router, expert = (stock_model(kind), other) if role == "router" else (other, stock_model(kind))
    model = composed(router, {"a": expert, "b": tiny_model("llama", 10)})
    ids = model.generate(IDS, max_new_tokens=NEW, use_cache=False, **PLAIN)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[:, IDS.shape[1] - 1 : -1]
    assert torch.equal(logits.argmax(-1), ids[:, IDS.shape[1] :])


def test_a_model_without_a_cache_is_refused_before_any_runs() -> None:
    model = composed(tiny_model("llama", 9), {"a": stock_model("rwkv")})

    def fail(*_: Any) -> None:
        raise AssertionError("a model ran")

    for each in (model.router, model.experts[0].model):
        each.register_forward_pre_hook(fail)
    for call in (
        lambda: model.generate(IDS, max_new_tokens=2),
        lambda: model.generate(IDS, max_new_tokens=2, num_beams=2),
        lambda: model(input_ids=IDS, use_cache=True),
    ):
        with pytest.raises(ValueError, match="expert 'a' is a RwkvForCausalLM.*pass use_cache=False"):
            call()


def test_the_experts_implementation_is_the_routers() -> None:
    model = composed(stock_model("mixtral"), {"a": tiny_model("llama", 9)})
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        for name in ("eager", "grouped_mm"):
            model.set_experts_implementation(name)
            assert model.router.config._experts_implementation == name
            torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=0, atol=1e-4)


def test_a_router_whose_head_reads_another_width() -> None:
    """OPT-350m and RemBERT project what their LM head reads."""
    config = OPTConfig(
        vocab_size=200, hidden_size=32, word_embed_proj_dim=16, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4
    )
    router = AutoModelForCausalLM.from_config(config).eval()
    model = composed(router, {"a": tiny_model("llama", 9), "b": tiny_model("llama", 10)})
    assert model.route_head.in_features == 16
    assert model(input_ids=IDS).expert_ids.unique().numel() == 2
