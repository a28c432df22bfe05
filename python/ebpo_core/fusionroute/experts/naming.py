"""Lists of experts: from what a person passes to uniquely named references, and changes to stored ones."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ebpo_core.models import PACKAGE_PREFIX

from .references import ExpertReference


def parse_experts(experts: Iterable[Any] | Mapping[str, Any]) -> list[tuple[ExpertReference, PreTrainedModel | None]]:
    """References with unique names, each beside its live model, if it was one.

    Args:
        experts: whatever :meth:`ExpertReference.parse` takes, in order; or a mapping from names to that.

    Raises:
        ValueError: two experts of one name, or a mapping whose key contradicts the reference's name.
    """
    if isinstance(experts, (str, os.PathLike)):
        raise TypeError(f"experts is {experts!r}: pass a list of experts, or a mapping from names to experts")
    keys = list(experts) if isinstance(experts, Mapping) else None
    values = list(experts.values()) if isinstance(experts, Mapping) else list(experts)
    references = [ExpertReference.parse(value) for value in values]
    if keys is not None:
        for key, reference in zip(keys, references, strict=True):
            if reference.name not in ("", key):
                raise ValueError(f"expert {key!r} has the name {reference.name!r} in its reference: drop one")
        references = [replace(reference, name=key) for key, reference in zip(keys, references, strict=True)]
    models = [value if isinstance(value, PreTrainedModel) else None for value in values]
    return list(zip(named(references), models, strict=True))


def named(references: Sequence[ExpertReference]) -> list[ExpertReference]:
    """The references, unnamed ones named after their adapter, file or folder: "math", and "math-2" where it is taken.

    Names are compared without case, since they become folders.

    Raises:
        ValueError: two references of one given name.
    """
    taken: set[str] = set()
    for reference in references:
        if reference.name and reference.name.casefold() in taken:
            raise ValueError(f"two experts are named {reference.name!r}: give each a name of its own")
        taken.add(reference.name.casefold())
    return [
        reference if reference.name else replace(reference, name=unused_name(_label(reference), taken))
        for reference in references
    ]


def unused_name(label: str, taken: set[str]) -> str:
    """A name made of ``label`` that is not in ``taken``, and is added to it."""
    name = stem = re.sub(r"[^\w.+-]+", "-", label).strip("-.")[:80] or "expert"
    number = 1
    while name.casefold() in taken:
        number += 1
        name = f"{stem}-{number}"
    taken.add(name.casefold())
    return name


def overridden(
    references: Sequence[ExpertReference], experts: Mapping[str, Any] | Sequence[Any] | None
) -> dict[str, ExpertReference | PreTrainedModel]:
    """Stored references with some, or all, replaced by what the person who loads the checkpoint says.

    Args:
        references: of the checkpoint.
        experts: None; a mapping from names to a new path (the expert moved: its hash is still checked), to a dict of
            fields to change, to a reference, or to a live model (not checked); or a sequence, one of these an expert.

    Raises:
        ValueError: a name that is not among the references, or a sequence of another length.
    """
    names = [reference.name for reference in references]
    if experts is None:
        return dict(zip(names, references, strict=True))
    if not isinstance(experts, Mapping):
        if len(experts) != len(names):
            raise ValueError(
                f"experts has {len(experts)} items for the {len(names)} experts {names}: pass one for each"
            )
        experts = dict(zip(names, experts, strict=True))
    unknown = [name for name in experts if name not in names]
    if unknown:
        raise ValueError(f"experts names {unknown}: the checkpoint's experts are {names}")
    result: dict[str, ExpertReference | PreTrainedModel] = {}
    for reference in references:
        new = experts.get(reference.name, reference)
        if isinstance(new, (str, os.PathLike)):
            new = {"path": os.fspath(new)}
        if isinstance(new, Mapping):
            moved = {"revision": None, "subfolder": None, "gguf_file": None} if "path" in new else {}
            moved |= {"adapter_revision": None} if "adapter" in new else {}
            new = ExpertReference.from_dict({**reference.to_dict(), **moved, **new})
        elif isinstance(new, ExpertReference):
            # What the router takes for the tokens that it lacks does not change with where it is.
            new = replace(new, name=reference.name, substitutes=new.substitutes or reference.substitutes)
        elif not isinstance(new, PreTrainedModel):
            ExpertReference.parse(new)  # says what may be passed
        result[reference.name] = new
    return result


def _label(reference: ExpertReference) -> str:
    path = reference.adapter or reference.gguf_file or reference.subfolder or reference.path or "expert"
    path = path.removeprefix(PACKAGE_PREFIX).removesuffix(".gguf")
    return Path(path).name or Path(path).resolve().name
