"""The files of compiled experts: adapters in PEFT's LoRA format, and the hash of the router that they belong to."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ebpo_core.files import write_bytes
from ebpo_core.fusionroute.experts.errors import EXTRA, explained
from ebpo_core.fusionroute.experts.files import (
    ADAPTER_WEIGHTS,
    WEIGHT_PATTERNS,
    adapter_files,
    fetched_folder,
    weight_files,
)
from ebpo_core.fusionroute.experts.hashes import tensors_hash
from ebpo_core.fusionroute.experts.references import ADAPTER_CONFIG, Source

from .lowrank import LowRank

COMPILED_FOLDER = "compiled"
REPORT = "report.json"
_PREFIX = "base_model.model."
# What PEFT's LoRA can be beyond `alpha / r * B A x`: values that stand for "not so".
_PLAIN: dict[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    "use_dora": False,
    "use_rslora": False,
    "lora_bias": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
    "layer_replication": None,
    "fan_in_fan_out": False,
    "use_qalora": False,
    "use_bdlora": False,
    "alora_invocation_tokens": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "layers_to_transform": None,
    "arrow_config": None,
    "kasa_config": None,
    "monteclora_config": None,
    "velora_config": None,
}


def require_peft() -> None:
    """Raise an ImportError with the remedy where PEFT, whose format the adapters have, is missing."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"compiling experts writes adapters of the package 'peft', which is missing: {EXTRA}"
        ) from error


class _Tensors(Mapping[str, Tensor]):
    """The tensors of safetensors files by name, read one at a time."""

    def __init__(self, files: Sequence[Any]) -> None:
        self._files = {name: file for file in files for name in file.keys()}  # noqa: SIM118 -- no mapping

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def router_hash(folder: str | os.PathLike[str]) -> str:
    """The hash of a checkpoint's own weights, router and route head, as its files hold them.

    Names, dtypes, shapes and bytes of the tensors count, not how they are spread over files, and not the dtype in which
    a model is loaded.

    Raises:
        FileNotFoundError, ValueError: as for :func:`~.files.weight_files`.
    """
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(file, "pt")) for file in weight_files(folder).values()]
        return tensors_hash(_Tensors(files))


def changed_weights(folder: str | os.PathLike[str], state: Mapping[str, Any]) -> list[str]:
    """Names of the weights in a checkpoint's files that are other ones in ``state``, a state dict.

    Another dtype is the same weight, also where it came by way of a half precision. Names that only one of the two has
    (of tied weights, of families whose modules fuse what the files hold apart) and those that were quantised since are
    not compared.

    Raises:
        FileNotFoundError, ValueError: as for :func:`~.files.weight_files`.
    """
    changed = []
    with ExitStack() as stack:
        tensors = _Tensors([stack.enter_context(safe_open(file, "pt")) for file in weight_files(folder).values()])
        for name in sorted(tensors.keys() & state.keys()):
            now, stored = state[name].detach().cpu(), tensors[name]
            if not (now.is_floating_point() and stored.is_floating_point()):
                continue
            ways = (stored.dtype, torch.bfloat16, torch.float16)
            if now.shape != stored.shape or not any(torch.equal(stored.to(way).to(now.dtype), now) for way in ways):
                changed.append(name)
    return changed


def compiled_folder(
    checkpoint: str | os.PathLike[str],
    revision: str | None,
    *,
    subfolder: str = "",
    access: Mapping[str, Any] | None = None,
) -> Path:
    """The local folder of a checkpoint, or its snapshot, whose ``compiled/`` has been fetched.

    Args:
        checkpoint, revision, subfolder: folder, or hub id with its revision, and where in it.
        access: how the hub is reached, of :func:`~ebpo_core.fusionroute.experts.files.hub_access`.
    """
    if Path(checkpoint).is_dir():
        return Path(checkpoint) / subfolder
    patterns = [f"{COMPILED_FOLDER}/*/{name}" for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)]
    source = Source(os.fspath(checkpoint), None, revision, subfolder, None)
    return fetched_folder(source, *patterns, f"{COMPILED_FOLDER}/{REPORT}", *WEIGHT_PATTERNS, access=access)


def write_adapter(folder: Path, down: Mapping[str, Tensor], up: Mapping[str, Tensor], alpha: float) -> None:
    """Write one adapter as PEFT's ``save_pretrained`` does, the weights last: with them it is complete.

    It names no base model: what it adapts is the checkpoint's router, which no hub id or folder of its own holds.

    Args:
        folder: which is made.
        down: A by module name, ``[r, in]``.
        up: B by module name, ``[out, r]``.
        alpha: PEFT's ``lora_alpha``.
    """
    from peft import LoraConfig

    folder.mkdir(parents=True, exist_ok=True)
    config = LoraConfig(
        r=next(iter(down.values())).shape[0],
        lora_alpha=alpha,  # type: ignore[arg-type]
        target_modules=sorted({name.rpartition(".")[2] for name in down}),
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    config.save_pretrained(os.fspath(folder))
    tensors = {f"{_PREFIX}{name}.lora_A.weight": value for name, value in down.items()}
    tensors |= {f"{_PREFIX}{name}.lora_B.weight": value for name, value in up.items()}
    contiguous = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    write_bytes(folder / ADAPTER_WEIGHTS, save(contiguous, {"format": "pt"}))


def read_adapters(
    checkpoint: Path, names: Sequence[str], modules: Mapping[str, nn.Linear], rank: int, scale: float
) -> LowRank:
    """The adapters of a checkpoint, stacked in the order of ``names``, on the CPU and in float64.

    Raises:
        FileNotFoundError: an adapter is missing.
        ValueError: one that is not of this rank and scale, of other modules, no plain LoRA, broken, or not finite.
    """
    read = [_read_adapter(checkpoint / COMPILED_FOLDER / name, name, modules, rank, scale) for name in names]
    # In float64, so that what the scale is multiplied into is rounded once, to the router's dtype.
    down = {module: torch.stack([each[f"{module}.lora_A.weight"].double() for each in read]) for module in modules}
    up = {
        module: torch.stack([each[f"{module}.lora_B.weight"].T.double() * scale for each in read]) for module in modules
    }
    return LowRank(down, up)


def _read_adapter(
    folder: Path, expert: str, modules: Mapping[str, nn.Linear], rank: int, scale: float
) -> dict[str, Tensor]:
    remedy = "compile the checkpoint again (fusionroute compile), or load it with compiled=False"
    file = folder / ADAPTER_CONFIG
    if not file.is_file():
        raise FileNotFoundError(f"expert {expert!r} is compiled, but {str(file)!r} is missing: {remedy}")
    config = _json_object(file, f"expert {expert!r}", remedy)
    for name, plain in _PLAIN.items():
        if config.get(name, plain) not in (plain, None):
            raise ValueError(
                f"expert {expert!r}: its adapter has {name}={config[name]!r}, expected {plain!r}: {remedy}"
            )
    alpha = config.get("lora_alpha")
    of_scale = isinstance(alpha, (int, float)) and math.isclose(alpha / rank, scale, rel_tol=1e-6)
    if config.get("r") != rank or not of_scale:
        raise ValueError(
            f"expert {expert!r}: its adapter has r={config.get('r')!r} and lora_alpha={alpha!r}, the checkpoint's rank "
            f"is {rank} and its scale {scale}: {remedy}"
        )
    with explained(expert):
        (weights,) = adapter_files(folder).values()
        tensors = {name.removeprefix(_PREFIX): value for name, value in load_file(weights).items()}
    shapes = {f"{name}.lora_A.weight": (rank, module.in_features) for name, module in modules.items()}
    shapes |= {f"{name}.lora_B.weight": (module.out_features, rank) for name, module in modules.items()}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    wrong = sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name))
    if wrong:
        raise ValueError(f"expert {expert!r}: its adapter does not fit the router, {wrong[:3]}: {remedy}")
    odd = sorted(name for name, value in tensors.items() if not (value.is_floating_point() and value.isfinite().all()))
    if odd:
        raise ValueError(f"expert {expert!r}: its adapter has entries that are no finite numbers, {odd[:3]}: {remedy}")
    return tensors


def _json_object(file: Path, whose: str, remedy: str) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{whose}: {str(file)!r} is no JSON ({error}): {remedy}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{whose}: {str(file)!r} holds no JSON object: {remedy}")
    return found


def read_report(checkpoint: Path) -> dict[str, Any] | None:
    """What compiling cost on held-out rows, of :func:`~.report.compare`; None for a checkpoint without it.

    Raises:
        ValueError: a file that is broken.
    """
    file = checkpoint / COMPILED_FOLDER / REPORT
    if not file.is_file():
        return None
    remedy = "restore it, or delete it to go without"
    report = _json_object(file, "the report on compiled experts", remedy)
    if not {"rank", "rows", "tokens", "fused", "experts"} <= report.keys():
        raise ValueError(f"the report on compiled experts: {str(file)!r} has the keys {sorted(report)} alone: {remedy}")
    return report


def copy_adapters(source: str | os.PathLike[str], names: Sequence[str], target: Path) -> None:
    """Copy the adapters and their report, byte for byte, from one checkpoint to another; nothing onto itself.

    Raises:
        FileNotFoundError: the files are gone.
    """
    origin, goal = Path(source) / COMPILED_FOLDER, target / COMPILED_FOLDER
    if goal.exists() and goal.resolve() == origin.resolve():
        return
    files = [f"{name}/{file}" for name in names for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)]
    missing = [name for name in files if not (origin / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{str(origin)!r}, which the compiled experts were loaded from, lacks {missing[:3]}: restore it, then save"
        )
    if not (origin / REPORT).is_file():
        (goal / REPORT).unlink(missing_ok=True)  # of other experts that were there
    for name in [*files, *([REPORT] if (origin / REPORT).is_file() else [])]:
        (goal / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(origin / name, goal / name)
