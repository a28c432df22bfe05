"""The files of compiled experts: adapters in PEFT's LoRA format, and the hash of the router that they belong to."""

from __future__ import annotations

import json
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
    "bias": "none",
    "use_dora": False,
    "use_rslora": False,
    "lora_bias": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
    "layer_replication": None,
    "fan_in_fan_out": False,
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


def compiled_folder(checkpoint: str | os.PathLike[str], revision: str | None) -> Path:
    """The local folder of a checkpoint, or its snapshot, whose ``compiled/`` has been fetched."""
    if Path(checkpoint).is_dir():
        return Path(checkpoint)
    patterns = [f"{COMPILED_FOLDER}/*/{name}" for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)]
    source = Source(os.fspath(checkpoint), None, revision, "", None)
    return fetched_folder(source, *patterns, f"{COMPILED_FOLDER}/{REPORT}", *WEIGHT_PATTERNS)


def write_adapter(folder: Path, down: Mapping[str, Tensor], up: Mapping[str, Tensor], alpha: float, base: str) -> None:
    """Write one adapter as PEFT's ``save_pretrained`` does, the weights last: with them it is complete.

    Args:
        folder: which is made.
        down: A by module name, ``[r, in]``.
        up: B by module name, ``[out, r]``.
        alpha: PEFT's ``lora_alpha``.
        base: name of the model that it adapts.
    """
    from peft import LoraConfig

    folder.mkdir(parents=True, exist_ok=True)
    config = LoraConfig(
        r=next(iter(down.values())).shape[0],
        lora_alpha=alpha,  # type: ignore[arg-type]
        target_modules=sorted({name.rpartition(".")[2] for name in down}),
        base_model_name_or_path=base,
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
        ValueError: one that is not of this rank and scale, of other modules, no plain LoRA, or not of finite numbers.
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
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"expert {expert!r}: {str(file)!r} is no JSON, {error}: {remedy}") from error
    for name, plain in _PLAIN.items():
        if config.get(name, plain) not in (plain, None):
            raise ValueError(
                f"expert {expert!r}: its adapter has {name}={config[name]!r}, expected {plain!r}: {remedy}"
            )
    alpha = config.get("lora_alpha")
    fits = isinstance(alpha, int | float) and abs(alpha / rank - scale) <= 1e-6 * abs(scale)
    if config.get("r") != rank or not fits:
        raise ValueError(
            f"expert {expert!r}: its adapter has r={config.get('r')} and lora_alpha={alpha!r}, the "
            f"checkpoint's rank is {rank} and its scale {scale}: {remedy}"
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
    broken = sorted(name for name, value in tensors.items() if not (value.is_floating_point() and _finite(value)))
    if broken:
        raise ValueError(
            f"expert {expert!r}: its adapter has values that are no finite numbers, {broken[:3]}: {remedy}"
        )
    return tensors


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def read_report(checkpoint: Path) -> dict[str, Any] | None:
    """What compiling cost on held-out rows, of :func:`~.report.compare`; None for a checkpoint without it."""
    file = checkpoint / COMPILED_FOLDER / REPORT
    if not file.is_file():
        return None
    report: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
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
    for name in [*files, *([REPORT] if (origin / REPORT).is_file() else [])]:
        (goal / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(origin / name, goal / name)
