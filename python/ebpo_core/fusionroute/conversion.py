"""Conversion of a checkpoint to one whose experts are folders of safetensors, all that engines load."""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedModel

from .card import model_card
from .config import FusionRouteConfig
from .experts.export import export_expert, needs_conversion
from .experts.files import (
    COMPANIONS,
    WEIGHT_PATTERNS,
    adapter_files,
    checkpoint_folder,
    copy_model,
    free_folder,
    local_folder,
    weight_files,
)
from .experts.naming import overridden
from .experts.references import EXPERTS_FOLDER, ExpertReference

_CONFIG = "config.json"
_TEMPLATES = "additional_chat_templates"


@dataclass(frozen=True)
class ConvertedExpert:
    """One expert after a conversion.

    Attributes:
        name: of the expert.
        done: in a few words, such as "GGUF file dequantised" or "stays a reference".
        path: where it is now: relative to the new checkpoint if it is in there, else as its reference says.
        size: of its weights (and its adapter's), in bytes; None for a repository that is not in the local cache.
    """

    name: str
    done: str
    path: str
    size: int | None


def convert_checkpoint(
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    experts: Sequence[str] | None = None,
    copy_all: bool = False,
    expert_paths: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    verify_experts: bool = True,
    revision: str | None = None,
    trust_remote_code: bool = False,
    report: Callable[[ConvertedExpert], None] | None = None,
) -> list[ConvertedExpert]:
    """Write a checkpoint with the same router whose experts are plain folders of safetensors.

    An expert that :func:`~.experts.export.needs_conversion` says something about becomes ``experts/<name>/`` of the new
    checkpoint, as :func:`~.experts.export.export_expert` writes it: a GGUF file dequantised, an adapter merged into its
    base, a model quantised on loading as it was before, a live model saved. What the old checkpoint has in its own
    folder comes along. The others stay references. Router, route head, generation config, tokenizer and chat template
    are copied file by file. Experts are loaded one at a time, and only those that must be.

    Args:
        checkpoint: folder or hub id of a FusionRoute checkpoint.
        output: a folder that does not exist, or is empty. It is filled under another name beside it and moved at the
            end; when anything fails, nothing is left.
        experts: names of those to write, whether they need it or not; the others, but for live models, stay
            references. None: as above.
        copy_all: write all of them, so that the new checkpoint is complete by itself.
        expert_paths: where experts are now, as for ``from_pretrained``: paths, dicts, or live models.
        dtype: "float32", "bfloat16", ...: of the weights that are written; by default that of each reference, then the
            router's.
        verify_experts: False accepts experts whose weights are no longer those of the checkpoint.
        revision: of a hub id.
        trust_remote_code: run the code of experts that bring their own, where they have to be loaded. Such an expert
            stays one: its code is copied with it.
        report: called with each expert when it is done.

    Returns:
        One entry per expert, in their order.

    Raises:
        FileNotFoundError, FileExistsError, ImportError, OSError, ValueError: no such checkpoint, an output that is not
            empty, a name of no expert, or an expert that cannot be found, loaded or converted.
    """
    if copy_all and experts is not None:
        raise ValueError(f"experts is {list(experts)} beside copy_all=True: pass one of them")
    target = free_folder(Path(output))
    folder, config = _opened(checkpoint, revision)
    stored = [ExpertReference.from_dict(expert) for expert in config["experts"]]
    wanted = overridden(stored, expert_paths)
    unknown = [name for name in experts or () if name not in wanted]
    if unknown:
        raise ValueError(f"experts names {unknown}: the checkpoint's experts are {list(wanted)}")
    base = checkpoint_folder(
        [each for each in wanted.values() if isinstance(each, ExpertReference)], checkpoint, revision
    )
    substitutes = {reference.name: reference.substitutes for reference in stored}  # which live models have not
    # All of them are looked for before the first is written, which may take long.
    given: dict[str, ExpertReference | PreTrainedModel] = {
        name: each.anchored(base) if isinstance(each, ExpertReference) else each for name, each in wanted.items()
    }
    chosen = [
        name for name, each in given.items() if copy_all or (_must(each, base) if experts is None else name in experts)
    ]
    references: list[ExpertReference] = []
    result: list[ConvertedExpert] = []
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as beside:
        staging = Path(beside) / target.name
        templates = {f"{_TEMPLATES}/{file.name}": file for file in (folder / _TEMPLATES).glob("*.jinja")}
        copy_model(folder, {**weight_files(folder), **templates}, staging)
        for name, expert in given.items():
            if isinstance(expert, PreTrainedModel) or name in chosen:
                reference, done = export_expert(
                    expert,
                    name,
                    staging / EXPERTS_FOLDER / name,
                    dtype=dtype,
                    default_dtype=config.get("dtype"),
                    verify=verify_experts,
                    trust_remote_code=trust_remote_code,
                )
                size = _size(reference)
                reference = replace(
                    reference,
                    path=f"{EXPERTS_FOLDER}/{name}",
                    substitutes=reference.substitutes or substitutes[name],
                )
            else:
                reference, done = expert.stored(target), "stays a reference"
                size = _size(reference)
            references.append(reference)
            result.append(ConvertedExpert(name, done, str(reference.adapter or reference.path), size))
            if report is not None:
                report(result[-1])
        config["experts"] = [reference.to_dict() for reference in references]
        (staging / _CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        # The old card tells of the old experts.
        (staging / "README.md").write_text(model_card(FusionRouteConfig.from_pretrained(staging)), encoding="utf-8")
        if target.exists():
            target.rmdir()  # which Windows does not do in a move
        staging.replace(target)
    return result


def _opened(checkpoint: str | os.PathLike[str], revision: str | None) -> tuple[Path, dict[str, Any]]:
    """The checkpoint's local folder, and what is in its ``config.json``."""
    folder = Path(checkpoint).expanduser()
    if not folder.is_dir():
        if folder.is_absolute() or os.fspath(checkpoint).startswith("."):
            raise FileNotFoundError(f"checkpoint={os.fspath(checkpoint)!r}: no such folder")
        from huggingface_hub import snapshot_download

        patterns = [*COMPANIONS, *WEIGHT_PATTERNS, f"{_TEMPLATES}/*"]
        folder = Path(
            snapshot_download(
                os.fspath(checkpoint),
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=f"{EXPERTS_FOLDER}/*",
            )
        )
    file = folder / _CONFIG
    if not file.is_file():
        raise FileNotFoundError(
            f"checkpoint={os.fspath(checkpoint)!r}: no {_CONFIG} in it; give the folder of a FusionRoute checkpoint"
        )
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    kind = config.get("model_type")
    if kind != FusionRouteConfig.model_type or not config.get("experts"):
        raise ValueError(
            f"checkpoint={os.fspath(checkpoint)!r}: its config has model_type {kind!r} and "
            f"{len(config.get('experts') or [])} experts; give a FusionRoute checkpoint, as save_pretrained writes it"
        )
    if config.get("compiled"):
        raise ValueError(
            f"checkpoint={os.fspath(checkpoint)!r} has compiled experts, which are no models to convert: convert the "
            "checkpoint that it was compiled from"
        )
    FusionRouteConfig.from_pretrained(folder)  # of a version and with values that this package reads
    return folder, config


def _must(expert: ExpertReference | PreTrainedModel, base: Path | None) -> bool:
    """True for an expert that is written where the caller does not say which are."""
    if isinstance(expert, PreTrainedModel) or needs_conversion(expert) is not None:
        return True
    source = expert.source().folder
    return source is not None and base is not None and source.is_relative_to(base.resolve())


def _size(reference: ExpertReference) -> int | None:
    try:
        source, adapter = reference.source(), reference.adapter_source()
        files = list(weight_files(local_folder(source), source.gguf_file).values())
        files += [] if adapter is None else adapter_files(local_folder(adapter)).values()
    except FileNotFoundError:
        return None
    return sum(file.stat().st_size for file in files)
