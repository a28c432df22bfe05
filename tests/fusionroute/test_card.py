"""The model card: front matter, table, loading code that runs, and nothing of the machine that wrote it."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import yaml
from fusionroute_tiny import tiny_config
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

from ebpo_core.fusionroute.card import model_card
from ebpo_core.fusionroute.config import FusionRouteConfig
from ebpo_core.fusionroute.experts.references import ExpertReference


def config(*experts: dict[str, Any], **options: Any) -> Any:
    named = [{"name": f"e{number}", **values} for number, values in enumerate(experts)]
    references = [ExpertReference.from_dict(values).to_dict() for values in named]
    return FusionRouteConfig(router_config=tiny_config("qwen3"), experts=references, **options)


def front_matter(card: str) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    assert ModelCard(card).data.to_dict() == values, "as the hub reads it"
    return values


def rows(card: str) -> list[list[str]]:
    table = card.split("## Experts\n\n")[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table]


def test_hub_experts() -> None:
    digest = "ab12" * 16
    card = model_card(
        config(
            {
                "name": "math",
                "path": "owner/math-8B",
                "revision": "v1",
                "dtype": "bfloat16",
                "hash": f"sha256:files:{digest}",
            },
            {"name": "code", "path": "owner/base", "adapter": "owner/code-lora", "adapter_revision": "main"},
            {"name": "small", "path": "owner/quants", "gguf_file": "q4.gguf", "subfolder": "deep"},
            {"name": "int8", "path": "owner/base", "quantization_config": {"quant_method": "bitsandbytes"}},
        ),
        base_name="owner/router",
    )
    values = front_matter(card)
    assert values["library_name"] == "transformers"
    assert values["pipeline_tag"] == "text-generation"
    assert {"fusionroute", "token-level-routing"} <= set(values["tags"])
    assert values["base_model"] == ["owner/router", "owner/math-8B", "owner/base", "owner/code-lora", "owner/quants"]
    math, code, small, int8 = rows(card)
    link = "[owner/math-8B](https://huggingface.co/owner/math-8B)"
    assert math == ["0", "math", link, "", "v1", "bfloat16", "`sha256:files:ab12ab12ab12`"]
    assert code[3:] == [
        "[owner/code-lora](https://huggingface.co/owner/code-lora)",
        "main",
        "the router's",
        "not recorded",
    ]
    assert "(`deep`)" in small[2]
    assert "(`q4.gguf`)" in small[2]
    assert int8[2].endswith("bitsandbytes")
    assert "expert_paths" not in card
    assert "2601.05106" in card
    assert "architecture `qwen3`" in card


def test_local_experts_are_shown_by_name_and_asked_for(tmp_path: Path) -> None:
    folder = tmp_path / "secret-place" / "math-expert"
    lora = tmp_path / "secret-place" / "lora-of-code"
    card = model_card(
        config(
            {"name": "math", "path": str(folder)},
            {"name": "code", "path": "owner/base", "adapter": str(lora)},
            {"name": "win", "path": "C:\\Users\\someone\\chat-expert"},
            {"name": "inside", "path": "experts/inside"},
            {"name": "below", "path": "./own/below"},
            {"name": "package", "path": "package:weights_of_x"},
            {"name": "live", "path": None},
        ),
        base_name=str(tmp_path / "secret-place" / "router"),
    )
    for leak in (str(tmp_path), "secret-place", "someone", str(Path.cwd()), str(Path.home()) + "/"):
        assert leak not in card
    assert [row[2] for row in rows(card)] == [
        "*local* `math-expert`",
        "[owner/base](https://huggingface.co/owner/base)",
        "*local* `chat-expert`",
        "`experts/inside`",
        "`./own/below`",
        "`package:weights_of_x`",
        "*local*, given as a live model",
    ]
    assert rows(card)[1][3] == "*local* `lora-of-code`"
    assert front_matter(card)["base_model"] == ["owner/base"]
    given_paths = ast.literal_eval(re.search(r"expert_paths=(\{.*?\n\})", card, re.DOTALL)[1])  # type: ignore[index]
    assert {name: list(fields) for name, fields in given_paths.items()} == {
        "math": ["path"],
        "code": ["adapter"],
        "win": ["path"],
        "live": ["path"],
    }


def test_a_complete_checkpoint_asks_for_nothing() -> None:
    card = model_card(config({"path": "experts/e0"}, {"path": "experts/e0", "adapter": "experts/e1"}))
    assert "and the experts." in card
    assert "expert_paths" not in card
    assert "base_model" not in front_matter(card)
    assert "loaded from where the table says" in model_card(config({"path": "owner/e"}))


def test_the_code_parses_and_options_are_those_of_the_config() -> None:
    options = {"alpha": 0.7, "complementary": False, "hysteresis": 0.25, "expert_prefill": "eager", "vocab_size": 150}
    given_config = config({"path": "owner/a"}, {"path": "/somewhere/b"}, **options)
    card = model_card(given_config)
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert code is not None
    ast.parse(code[1])
    assert "import ebpo_core.fusionroute" in code[1]
    table = dict(re.findall(r"^\| `(\w+)` \| `(.*)` \|$", card, re.MULTILINE))
    assert table == {name: str(getattr(given_config, name)) for name in (*options, "route", "expert_cache_budget")}


_NAMES = st.from_regex(r"[A-Za-z0-9_+][A-Za-z0-9_.+-]{0,10}", fullmatch=True)
_PATHS = st.none() | st.from_regex(r"[ -~]{1,20}", fullmatch=True) | st.from_regex(r"/[ -~]{1,20}", fullmatch=True)


@given(st.lists(st.tuples(_NAMES, _PATHS), max_size=3, unique_by=lambda pair: pair[0].casefold()))
def test_any_experts_give_a_readable_card(experts: list[tuple[str, str | None]]) -> None:
    given_config = config(*({"name": name, "path": path} for name, path in experts))
    card = model_card(given_config, base_name='it\'s: a "name"')
    assert front_matter(card)["library_name"] == "transformers"
    assert [row[1] for row in rows(card)] == [name for name, _ in experts]
    assert {len(row) for row in rows(card)} <= {7}
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert code is not None
    ast.parse(code[1])
    assert json.loads(json.dumps(given_config.experts)) == given_config.experts
