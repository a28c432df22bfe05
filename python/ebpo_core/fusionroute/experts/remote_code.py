"""Code that a model's folder brings along: run when the user allows it, compared with what a router was trained with.

A config may name classes of ``*.py`` files beside it (``auto_map``); transformers runs them with
``trust_remote_code=True`` alone. The reference of an expert that runs such code has its hash, ``code_hash``. That says
what is needed; the permission is an argument, every time the expert is loaded.
"""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from .errors import explained
from .files import CODE_PATTERN, COMPANIONS, checkpoint_folder, code_files, fetched_folder
from .hashes import files_hash
from .naming import parse_experts
from .references import ExpertReference, Source

_AUTO_CLASS = "AutoModelForCausalLM"
_LOADED_CODE = "transformers_modules"  # the package that transformers makes of such files


def with_code(reference: ExpertReference, *, trust_remote_code: bool, verify: bool = True) -> ExpertReference:
    """The reference with the hash of the code that its loading will run; None in it where that is transformers' own.

    A reference with a hash of its weights, which is a checkpoint's, runs what it ran then. Any other runs its folder's
    code if that is allowed, and transformers' class of that type if there is one and it is not.

    Args:
        reference: paths in it do not depend on a checkpoint's folder.
        trust_remote_code: the user's permission.
        verify: compare the code with ``code_hash``.

    Raises:
        FileNotFoundError, OSError: no such model.
        ValueError: code that is not allowed, that changed, or that is in another repository.
    """
    if reference.path is None or (reference.hash is not None and reference.code_hash is None):
        return reference
    if reference.code_hash is not None and not trust_remote_code:
        raise ValueError(f"expert {reference.name!r}: {_not_allowed(reference.path)}")
    source = reference.source()
    if source.gguf_file is not None:
        return reference
    with explained(reference.name, source):
        if reference.code_hash is None:
            config = config_dict(source)
            if _AUTO_CLASS not in (config.get("auto_map") or {}):
                return reference
            if not trust_remote_code and not has_own_class(config):
                raise ValueError(_not_allowed(source.path))
            if not trust_remote_code:
                return reference
        folder = fetched_folder(source, *COMPANIONS, CODE_PATTERN)
        named = config_dict(Source(str(folder), None, None, "", folder)).get("auto_map") or {}
        elsewhere = [str(value).split("--")[0] for value in named.values() if "--" in str(value)]
        if elsewhere:
            raise ValueError(
                f"its config takes code from another repository, {elsewhere[0]!r}, where a change would go unnoticed: "
                "put the files beside the config, and name them in its auto_map without '--'"
            )
        found = code_hash(folder)
        if verify and reference.code_hash not in (None, found):
            raise ValueError(
                f"the code in {source.path!r} is not what the router was trained with: the checkpoint has "
                f"{reference.code_hash}, found {found}. Restore its {CODE_PATTERN} files, or pass verify_experts=False "
                "(verify=False to Experts.load) to run them as they are"
            )
    return replace(reference, code_hash=found)


def check_code(
    experts: Iterable[Any] | Mapping[str, Any],
    *,
    trust_remote_code: bool,
    base_dir: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    verify: bool = True,
) -> None:
    """Raise what :func:`with_code` raises for any of the experts, before the first of them, or a router, is loaded.

    Args:
        experts, base_dir, revision: as for :meth:`~.experts.Experts.load`.
        trust_remote_code, verify: as for :func:`with_code`.
    """
    check_recorded_code(experts, trust_remote_code=trust_remote_code)
    parsed = [reference for reference, model in parse_experts(experts) if model is None]
    asked = [each for each in parsed if each.hash is None or each.code_hash is not None]
    folder = checkpoint_folder(asked, base_dir, revision)
    for each in asked:
        if each.path is not None:
            with_code(each.anchored(folder), trust_remote_code=trust_remote_code, verify=verify)


def check_recorded_code(experts: Iterable[Any] | Mapping[str, Any], *, trust_remote_code: bool) -> None:
    """The part of :func:`check_code` that needs no files: what a checkpoint says of its experts itself."""
    for reference, model in parse_experts(experts):
        if model is None and reference.code_hash is not None and not trust_remote_code:
            with_code(reference, trust_remote_code=False)


def config_dict(source: Source) -> dict[str, Any]:
    """What is in a model's ``config.json``, read without its code."""
    values: dict[str, Any] = PreTrainedConfig.get_config_dict(
        source.path, revision=source.revision, subfolder=source.subfolder
    )[0]
    return values


def has_own_class(config: Mapping[str, Any]) -> bool:
    """True if transformers itself, or a package that has registered one, has a causal LM for a config's type."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    kind = str(config.get("model_type"))
    if kind not in CONFIG_MAPPING or CONFIG_MAPPING[kind].__module__.startswith(_LOADED_CODE):
        return False
    return CONFIG_MAPPING[kind] in MODEL_FOR_CAUSAL_LM_MAPPING


def is_code_of_a_folder(model: object) -> bool:
    """True for a model whose class transformers has loaded from a folder or repository."""
    return type(model).__module__.startswith(_LOADED_CODE)


def class_of_code(config: Any, folder: str) -> Any:
    """The class that a config names in its folder, after running its code.

    Not through ``AutoModelForCausalLM``, which keeps one class per config class: of two folders of one name whose
    configs have the same code it would give the second the first one's model.
    """
    model_class: Any = get_class_from_dynamic_module(config.auto_map[_AUTO_CLASS], folder)
    model_class.register_for_auto_class(_AUTO_CLASS)  # its code is saved with it
    return model_class


def code_hash(folder: Path) -> str:
    """The hash of the Python files in a folder."""
    return files_hash(code_files(folder))


def _not_allowed(path: str) -> str:
    return (
        f"its model is Python code in {path!r}, which runs with this program's rights: read it, then pass "
        "trust_remote_code=True (on the command line --trust-remote-code, for train --trust_remote_code true)"
    )
