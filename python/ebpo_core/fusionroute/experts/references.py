"""``ExpertReference``: where an expert's weights are and how they are loaded, as a checkpoint's config stores it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from ebpo_core.models import PACKAGE_PREFIX, resolve_model

EXPERTS_FOLDER = "experts"  # of copies, in a checkpoint that brings its experts along
ADAPTER_CONFIG = "adapter_config.json"

_NAME = re.compile(r"[\w+][\w.+-]{0,99}")
_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[\w.-]+)?", re.ASCII)


_KINDS = {"offload": bool, "quantization_config": dict, "substitutes": dict, "vocab_size": int}  # others are text


class Source(NamedTuple):
    """The place of a model's files, as ``from_pretrained`` takes it.

    Attributes:
        path: an absolute folder (``subfolder`` already joined), or a hub id.
        gguf_file: the file in it, or None for safetensors.
        revision, subfolder: of a hub id.
        folder: the same as ``path`` for a local folder, None for a hub id.
    """

    path: str
    gguf_file: str | None
    revision: str | None
    subfolder: str
    folder: Path | None


@dataclass(frozen=True, kw_only=True)
class ExpertReference:
    """One expert of a FusionRoute model.

    Attributes:
        name: how people and traces call it: letters, digits, ``. + - _``; by default from the path.
        path: a local folder or ``.gguf`` file, a hub id, or ``package:<installed package>``. A relative local path is
            looked up in the checkpoint's folder first. None: a model that was given live and never saved.
        revision, subfolder: as for ``from_pretrained``.
        dtype: "float32", "bfloat16", ..., "auto" (the checkpoint's own), or None for the router's.
        device: such as "cuda:1" or "cpu"; None follows the router.
        offload: the weights stay on the CPU until the expert is selected, then on its device until another offloaded
            expert is.
        gguf_file: a GGUF file in ``path``.
        quantization_config: the dict of a transformers quantization config (or the config itself).
        adapter, adapter_revision: folder or hub id of a PEFT adapter on top of ``path``. Experts that differ in their
            adapter alone share one base model.
        attn_implementation: as for ``from_pretrained``.
        substitutes: from ids of tokens that the expert lacks to ids that it reads and scores in their place.
        hash: of the weights, see :mod:`~.hashes`; checked when the expert is loaded.
        code_hash: of the Python files in its folder, for a model that runs them; checked alike. It records what the
            model needs and allows nothing: that is ``trust_remote_code``, an argument of whatever loads the expert.
        vocab_size: width of the logits.

    Raises:
        TypeError: a value of a wrong kind.
        ValueError: a value that does not fit.
    """

    name: str = ""
    path: str | None = None
    revision: str | None = None
    subfolder: str | None = None
    dtype: str | None = None
    device: str | None = None
    offload: bool = False
    gguf_file: str | None = None
    quantization_config: dict[str, Any] | None = None
    adapter: str | None = None
    adapter_revision: str | None = None
    attn_implementation: str | None = None
    substitutes: dict[str, int] | None = None
    hash: str | None = None
    code_hash: str | None = None
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        functions: dict[str, Callable[[Any], Any]] = {"path": os.fspath, "adapter": os.fspath}
        for name, function in {**functions, "dtype": _dtype, "device": _device}.items():
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, function(value))
        object.__setattr__(self, "quantization_config", _json_safe(self.quantization_config))
        object.__setattr__(self, "substitutes", _substitutes(self.substitutes))
        for field in fields(self):
            value, optional = getattr(self, field.name), field.default is None
            kind = {"offload": bool, "quantization_config": dict, "substitutes": dict, "vocab_size": int}.get(
                field.name, str
            )
            if not (value is None and optional) and type(value) is not kind:
                raise TypeError(f"{self._owner}: {field.name} is {value!r}, pass a {kind.__name__}")
        if self.name and not _NAME.fullmatch(self.name):
            raise ValueError(
                f"an expert cannot be named {self.name!r} (names are folders and labels, too): use letters, digits and "
                "'.', '+', '-', '_', 100 at most, and none of '.', '-' in front"
            )
        for name in ("path", "adapter"):
            if getattr(self, name) == "":
                raise ValueError(f"{self._owner}: {name} is empty, pass a folder or a hub id")
        if self.path is None and (self.adapter or self.gguf_file):
            raise ValueError(f"{self._owner}: pass the path of the model that the adapter or GGUF file belongs to")
        if self.adapter_revision and not self.adapter:
            raise ValueError(f"{self._owner}: adapter_revision is {self.adapter_revision!r} without an adapter")
        if self.gguf_file and self.quantization_config:
            raise ValueError(f"{self._owner}: a GGUF file brings its own quantization, drop quantization_config")

    @property
    def _owner(self) -> str:
        return f"expert {self.name or self.path!r}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe; fields at their defaults are left out, but for name and path."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        kept = {key: value for key, value in values.items() if key in ("name", "path") or value not in (None, False)}
        return {key: dict(value) if isinstance(value, dict) else value for key, value in kept.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ExpertReference:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: an unknown key.
        """
        known = [field.name for field in fields(cls)]
        unknown = sorted(str(key) for key in values if key not in known)
        if unknown:
            raise ValueError(f"expert {values.get('name', values.get('path'))!r}: no field {unknown}, of {known}")
        return cls(**values)

    @classmethod
    def parse(cls, obj: Any) -> ExpertReference:
        """A reference from a path or hub id, a dict, a reference, or a live model (which :class:`~.experts.Experts`
        keeps beside it).

        The folder of a PEFT adapter becomes the adapter of the base model that its config names. A live model's path is
        what it was loaded from, and its dtype the one it has.

        Raises:
            TypeError: something else.
        """
        if isinstance(obj, cls):
            return obj
        if isinstance(obj, Mapping):
            return cls.from_dict(obj)
        if isinstance(obj, PreTrainedModel):
            loaded_from = obj.name_or_path or None
            if loaded_from is not None and Path(loaded_from).exists():
                loaded_from = str(Path(loaded_from).resolve())
            elif loaded_from is not None and not _HUB_ID.fullmatch(loaded_from):
                loaded_from = None  # a folder that is gone
            return cls(path=loaded_from, dtype=str(obj.dtype).removeprefix("torch."))
        if not isinstance(obj, (str, os.PathLike)):
            raise TypeError(
                f"an expert is {type(obj).__name__}: pass a folder or hub id, a dict of ExpertReference's fields, an "
                "ExpertReference, or a transformers model (a PEFT model: as path and adapter, or after "
                "merge_and_unload())"
            )
        path = os.fspath(obj)
        folder = Path(path).expanduser()
        if (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file():
            base = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
            if not base:
                raise ValueError(f"expert {path!r} is an adapter that does not name its base: pass path and adapter")
            return cls(path=base, adapter=path)
        return cls(path=path)

    def source(self, base_dir: str | os.PathLike[str] | None = None) -> Source:
        """The place of the weights; relative paths are looked up in ``base_dir``, then in the working directory.

        Raises:
            FileNotFoundError: a local path that does not exist.
            ValueError: a folder without a model, a package that is not installed, a live model, or a revision for a
                local folder.
        """
        if self.path is None:
            raise ValueError(
                f"{self._owner} was given as a live model and never saved: pass it again, expert_paths="
                f"{{{self.name!r}: model}}, or save the checkpoint with save_experts=True where it is at hand"
            )
        found = _locate(self._owner, "path", self.path, self.revision, self.subfolder, base_dir)
        if found.folder is None:
            return found._replace(gguf_file=self.gguf_file)
        if self.gguf_file:
            if not (found.folder / self.gguf_file).is_file():
                raise FileNotFoundError(
                    f"{self._owner}: no file {self.gguf_file!r} in {found.path!r}; correct gguf_file"
                )
            return found._replace(gguf_file=self.gguf_file)
        if found.gguf_file or (found.folder / "config.json").is_file():
            return found
        try:
            path, gguf_file = resolve_model(found.path)
        except ValueError as error:
            raise ValueError(f"{self._owner}: {error}") from error
        return found._replace(path=path, gguf_file=gguf_file)

    def adapter_source(self, base_dir: str | os.PathLike[str] | None = None) -> Source | None:
        """The place of the adapter, None without one. Errors as for :meth:`source`."""
        if self.adapter is None:
            return None
        return _locate(self._owner, "adapter", self.adapter, self.adapter_revision, None, base_dir)

    def anchored(self, base_dir: str | os.PathLike[str] | None = None, *, missing_ok: bool = False) -> ExpertReference:
        """The same reference with paths that do not depend on a checkpoint's folder.

        Errors as for :meth:`source`; with ``missing_ok`` a reference whose files are not there stays as it is.
        """
        if missing_ok:
            try:
                return self.anchored(base_dir)
            except (FileNotFoundError, ValueError):
                return self
        source, adapter = self.source(base_dir), self.adapter_source(base_dir)
        changes: dict[str, Any] = {}
        if source.folder is not None and not str(self.path).startswith(PACKAGE_PREFIX):
            changes = {"path": source.path, "subfolder": None, "gguf_file": source.gguf_file}
        if adapter is not None:
            changes["adapter"] = adapter.path
        return replace(self, **changes)

    def stored(self, checkpoint_dir: str | os.PathLike[str]) -> ExpertReference:
        """The reference in the config of a checkpoint: paths in its folder relative to it, other local paths absolute,
        hub ids and packages as they are."""
        root = Path(checkpoint_dir).resolve()
        return replace(self, path=_stored(self.path, root), adapter=_stored(self.adapter, root))


def is_hub_id(path: str | None) -> bool:
    """True for a path of a repository on the hub; not for a package or a folder (of the checkpoint, or here)."""
    if path is None or path.startswith((PACKAGE_PREFIX, f"{EXPERTS_FOLDER}/")) or not _HUB_ID.fullmatch(path):
        return False
    return not Path(path).exists()


def _locate(
    owner: str,
    field: str,
    path: str,
    revision: str | None,
    subfolder: str | None,
    base_dir: str | os.PathLike[str] | None,
) -> Source:
    gguf_file = None
    if path.startswith(PACKAGE_PREFIX):
        try:
            folder, gguf_file = resolve_model(path)
        except ValueError as error:
            raise ValueError(f"{owner}: {error}") from error
        local = Path(folder)
    else:
        local = Path(path).expanduser()
        if base_dir is not None and (Path(base_dir) / local).exists():
            local = Path(base_dir) / local
    if local.is_file() and local.suffix == ".gguf":
        local, gguf_file = local.parent, local.name
    if not local.is_dir():
        if not _HUB_ID.fullmatch(path) or path.startswith(f"{EXPERTS_FOLDER}/"):
            raise FileNotFoundError(
                f"{owner}: there is no {field} {path!r}"
                + (f" in {os.fspath(base_dir)!r}" if base_dir is not None and not local.is_absolute() else "")
                + "; restore it, or say where it is now, when loading a checkpoint by expert_paths="
                + f"{{name: {{{field!r}: ...}}}}"
            )
        return Source(path, None, revision, subfolder or "", None)
    if revision is not None:
        raise ValueError(f"{owner}: revision is {revision!r}, but {path!r} is a local folder; drop one of them")
    local = (local / subfolder if subfolder else local).resolve()
    if not local.is_dir():
        raise FileNotFoundError(f"{owner}: no subfolder {subfolder!r} in {path!r}; correct subfolder")
    return Source(str(local), gguf_file, None, "", local)


def _stored(path: str | None, root: Path) -> str | None:
    if path is None or path.startswith(PACKAGE_PREFIX):
        return path
    local = Path(path).expanduser()
    inside = root / local
    if not inside.exists():
        if not local.exists():
            return path
        inside = local.resolve()
    if not inside.resolve().is_relative_to(root):
        return str(inside.resolve())
    relative = PurePosixPath(*inside.resolve().relative_to(root).parts)
    # "./" tells a folder such as owner/name from a hub id, also where the folder is not at hand.
    return str(relative) if relative.parts[:1] == (EXPERTS_FOLDER,) else f"./{relative}"


def _dtype(value: Any) -> Any:
    name = str(value).removeprefix("torch.")
    if name != "auto" and not isinstance(getattr(torch, name, None), torch.dtype):
        raise ValueError(
            f"an expert's dtype is {value!r}: pass a name such as 'float32' or 'bfloat16', 'auto', or None"
        )
    return name


def _device(value: Any) -> str:
    try:
        return str(torch.device(value))
    except RuntimeError as error:
        raise ValueError(
            f"an expert's device is {value!r}: pass 'cpu', 'cuda:1', ..., or None (the router's); offload=True keeps "
            "the weights on the CPU until they are needed"
        ) from error


def _substitutes(value: Any) -> Any:
    """The ids as JSON keeps them: keys are text."""
    if not isinstance(value, Mapping) or not value:
        return None if isinstance(value, Mapping) else value
    for lacking, own in value.items():
        if not str(lacking).isdecimal() or isinstance(own, bool) or not isinstance(own, int) or own < 0:
            raise ValueError(f"an expert's substitutes have {lacking!r}: {own!r}: pass ids of tokens")
    return {str(lacking): own for lacking, own in value.items()}


def _json_safe(config: Any) -> Any:
    """A quantization config, or its dict, as JSON would give it back."""
    if config is None:
        return None
    values = config.to_dict() if hasattr(config, "to_dict") else config
    try:
        return json.loads(json.dumps(values))
    except TypeError as error:
        raise TypeError(f"quantization_config cannot be stored as JSON ({error}): pass plain values") from error
