"""A checkpoint with experts that must be converted to be served, copies of it to break, checks of what comes out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from fusionroute_tiny import save_tiny, save_tiny_adapter, save_tiny_gguf, tiny_model, tiny_tokenizer
from safetensors.torch import load_file
from transformers import GenerationConfig

from ebpo_core.fusionroute import FusionRouteForCausalLM

IDS = torch.tensor([[1, 9, 30, 77, 150, 8, 199, 44, 23, 12, 101, 57]])
MERGED = {"atol": 1e-4, "rtol": 0.0}  # PEFT's own layers add in another order
NAMES = ["math", "code", "chat"]


class Made(NamedTuple):
    """A folder of models, the checkpoint in it, and what its experts add: logits of each, forced at every token."""

    root: Path
    checkpoint: Path
    logits: dict[str, torch.Tensor]


def forced(model: FusionRouteForCausalLM) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return {name: model(input_ids=IDS, forced_expert=name).logits for name in model.experts.names}


def own(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=IDS).logits
    return result


def fused(root: Path, experts: dict[str, Any], **options: Any) -> FusionRouteForCausalLM:
    model = FusionRouteForCausalLM.from_experts(root / "router", experts, **options)
    with torch.no_grad():
        model.route_head.weight.normal_(std=1.0, generator=torch.Generator().manual_seed(0))
    return model


def save_convertible(root: Path) -> Made:
    """A checkpoint in ``root / "fused"`` whose expert "math" is a GGUF file, "code" an adapter, "chat" a folder."""
    for seed, (name, family) in enumerate([("router", "llama"), ("base", "llama"), ("chat", "qwen3")]):
        save_tiny(root / name, family, seed)
    (root / "base" / "LICENSE").write_text("as it is")
    save_tiny_gguf(root / "math.gguf", 3)
    save_tiny_adapter(root / "code", tiny_model("llama", 1), 4)
    experts = {"math": root / "math.gguf", "code": {"path": root / "base", "adapter": root / "code"}}
    model = fused(root, {**experts, "chat": root / "chat"}, alpha=0.5)
    model.generation_config = GenerationConfig(max_new_tokens=7, eos_token_id=[2, 5])
    model.save_pretrained(root / "fused")
    tiny_tokenizer().save_pretrained(root / "fused")
    shutil.copytree(root / "fused", root / "newer")
    edit_config(root / "newer", fusionroute_version=99)
    (root / "fused" / "optimizer.pt").write_bytes(b"what serving does not need")
    return Made(root, root / "fused", forced(model))


def copied(original: Made, root: Path) -> Made:
    """All of it once more, with references to the copy: to be broken and deleted."""
    shutil.copytree(original.root, root)
    config = root / "fused" / "config.json"
    config.write_text(config.read_text().replace(str(original.root), str(root)))
    return Made(root, root / "fused", original.logits)


def stored(checkpoint: Path) -> dict[str, dict[str, Any]]:
    return {expert["name"]: expert for expert in json.loads((checkpoint / "config.json").read_text())["experts"]}


def edit(checkpoint: Path, name: str, **changes: Any) -> None:
    """Change fields of an expert's reference."""
    config = json.loads((checkpoint / "config.json").read_text())
    for expert in config["experts"]:
        if expert["name"] == name:
            expert.update(changes)
    (checkpoint / "config.json").write_text(json.dumps(config))


def edit_config(folder: Path, **changes: Any) -> None:
    """Change values of a model's config."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def check(output: Path, expected: dict[str, torch.Tensor], exact: tuple[str, ...] = ("math", "chat")) -> None:
    """The checkpoint loads with its hashes verified, and every expert adds what it added before."""
    found = forced(FusionRouteForCausalLM.from_pretrained(output))
    assert list(found) == list(expected)
    for name, logits in expected.items():
        tolerance = {"atol": 0.0, "rtol": 0.0} if name in exact else MERGED
        torch.testing.assert_close(found[name], logits, **tolerance)


def snapshot(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


def dtypes(checkpoint: Path, name: str) -> str:
    """Of an expert's file and of its config, which agree."""
    folder = checkpoint / "experts" / name
    (found,) = {str(tensor.dtype).removeprefix("torch.") for tensor in load_file(folder / "model.safetensors").values()}
    assert json.loads((folder / "config.json").read_text())["dtype"] == found
    return found


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
