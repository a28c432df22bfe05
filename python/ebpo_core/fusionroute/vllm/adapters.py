"""The adapters of a compiled checkpoint: found, and compared with what its config says of them, at the start."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ebpo_core.fusionroute.config import FusionRouteConfig
from ebpo_core.fusionroute.experts.files import ADAPTER_WEIGHTS, adapter_files, fetched_folder
from ebpo_core.fusionroute.experts.references import ADAPTER_CONFIG, ExpertReference, Source

from .stacks import FAMILIES

FOLDER = "compiled"  # in the checkpoint, with a folder of each expert's name in it
TARGETS = {"q_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"}
# What PEFT can do beside B A x, by the value that it has where it does not.
_PLAIN: dict[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    "lora_bias": False,
    "use_dora": False,
    "use_rslora": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "layers_to_transform": None,
}


def found(config: FusionRouteConfig, architecture: str, model: str, revision: str | None) -> Path:
    """The local folder of the adapters, after looking at each one's config.

    Args:
        config: of the checkpoint, its ``compiled`` a dict.
        architecture: vLLM's name of the router's class.
        model, revision: the checkpoint's folder or hub id.

    Raises:
        FileNotFoundError: an adapter, or its weights.
        ValueError: a router of another family, a config that lacks something, or an adapter that it does not describe.
    """
    compiled: Mapping[str, Any] = config.compiled or {}
    if architecture not in FAMILIES:
        raise ValueError(
            f"the router is a {architecture}: vLLM serves compiled checkpoints of {', '.join(FAMILIES)}; use the "
            "checkpoint's own generate, or serve the checkpoint that was compiled"
        )
    if missing := [name for name in ("rank", "scale") if name not in compiled]:
        raise ValueError(f"config.json has compiled={dict(compiled)} without {missing}: compile the checkpoint again")
    if Path(model).is_dir():
        folder = Path(model, FOLDER)
    else:
        source = Source(os.fspath(model), None, revision, "", None)
        folder = fetched_folder(source, *(f"{FOLDER}/*/{name}" for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS))) / FOLDER
    for expert in map(ExpertReference.from_dict, config.experts or []):
        adapter_files(folder / expert.name)  # says what is missing, and refuses pickles
        file = folder / expert.name / ADAPTER_CONFIG
        if not file.is_file():
            raise FileNotFoundError(f"{str(file)!r} is missing: restore the folder, or compile the checkpoint again")
        _check(file, json.loads(file.read_text(encoding="utf-8")), compiled)
    return folder


def _check(file: Path, adapter: Mapping[str, Any], compiled: Mapping[str, Any]) -> None:
    """Compare an adapter's config with the checkpoint's.

    Raises:
        ValueError: they differ, or the adapter is not of the kind that a compiled expert is.
    """
    rank, scale = int(compiled["rank"]), float(compiled["scale"])
    wanted: dict[str, Any] = {**_PLAIN, "r": rank, "lora_alpha": scale * rank}
    for name, value in wanted.items():
        # Absent, or any empty value, is what the empty ones stand for.
        given = adapter.get(name, value)
        if given != value and (given or value):
            raise ValueError(
                f"{str(file)!r} has {name}={given!r}, a compiled expert of this checkpoint has {value!r}: compile the "
                "checkpoint again"
            )
    targets = {str(name).rpartition(".")[2] for name in adapter.get("target_modules") or []}
    if targets != TARGETS:
        raise ValueError(
            f"{str(file)!r} has target_modules {sorted(targets)}, a compiled expert has {sorted(TARGETS)}: compile the "
            "checkpoint again"
        )
