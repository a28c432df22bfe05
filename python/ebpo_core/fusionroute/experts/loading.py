"""Loading one expert: the frozen base model from safetensors or GGUF, adapters on top, errors that name the expert."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

from .references import ADAPTER_CONFIG, ExpertReference, Source
from .weights import ADAPTER_WEIGHTS, adapter_files, local_folder, weight_files

_FSDP_SETTING = "FSDP_CPU_RAM_EFFICIENT_LOADING"

EXTRA = 'pip install "ebpo-core[fusionroute]"'


def load_base(
    reference: ExpertReference, source: Source, *, default_dtype: torch.dtype | str | None, device: torch.device
) -> Any:
    """A reference's model without its adapter: frozen, in eval mode, on ``device`` (the CPU if it is offloaded).

    Raises:
        ImportError: a package that the reference needs is missing.
        OSError: no such repository or revision, nor a copy in the local cache (FileNotFoundError: a folder's weights).
        ValueError: a folder of pickles, weights that lack tensors, a model that transformers cannot load.
    """
    dtype: Any = reference.dtype or default_dtype or "auto"
    if isinstance(dtype, str) and dtype != "auto":
        dtype = getattr(torch, dtype)
    options: dict[str, Any] = {"revision": source.revision, "subfolder": source.subfolder}
    if source.gguf_file:
        require("gguf", reference.name, f"gguf_file={source.gguf_file!r}")
        options["gguf_file"] = source.gguf_file
    else:
        options["use_safetensors"] = True
    if reference.attn_implementation:
        options["attn_implementation"] = reference.attn_implementation
    if reference.offload:
        require("accelerate", reference.name, "offload=True")
        device = torch.device("cpu")
    if reference.quantization_config or device.type != "cpu":
        # A quantizer without a device map chooses the GPU on its own; for the others it saves a copy on the CPU.
        require("accelerate", reference.name, f"device={str(device)!r} or a quantization")
        options["device_map"] = {"": device}
    with explained(reference.name, source):
        if source.folder is not None:
            weight_files(source.folder, source.gguf_file)
        if reference.quantization_config:
            quantizers: Any = importlib.import_module("transformers.quantizers")
            config = dict(reference.quantization_config)
            options["quantization_config"] = quantizers.AutoQuantizationConfig.from_dict(config)
        loader: Any = transformers.AutoModelForCausalLM
        with whole_models():
            model, info = loader.from_pretrained(source.path, dtype=dtype, output_loading_info=True, **options)
        _check_complete({name: value for name, value in info.items() if name != "unexpected_keys"}, source.path)
    if source.gguf_file:
        # What came out of the file is plain float weights, see ebpo_core.models.
        for mark in ("hf_quantizer", "is_quantized", "quantization_method"):
            vars(model).pop(mark, None)
        vars(model.config).pop("quantization_config", None)
    return freeze(model)


def load_adapter(model: Any, expert: str, adapter: str, source: Source) -> None:
    """Put an adapter's weights into ``model`` under the name ``adapter``. Errors as for :func:`load_base`."""
    require("peft", expert, f"adapter={source.path!r}")
    with explained(expert, source):
        folder = source.folder
        if folder is None:
            # Fetched by its name: transformers would fall back to a pickle.
            from huggingface_hub import hf_hub_download

            for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
                hf_hub_download(source.path, name, revision=source.revision)
            folder = local_folder(source)
        from peft import PeftConfig
        from peft.functional import inject_adapter_in_model, set_peft_model_state_dict
        from safetensors.torch import load_file

        (weights,) = adapter_files(folder).values()
        config = PeftConfig.from_pretrained(os.fspath(folder))
        config.inference_mode = True
        with warnings.catch_warnings():
            # Several adapters in one model are the point.
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            inject_adapter_in_model(config, model, adapter)
        # The model's own load_adapter() reports the other adapters' weights as missing.
        tensors = {name.removeprefix("base_model.model."): value for name, value in load_file(weights).items()}
        result: Any = set_peft_model_state_dict(model, tensors, adapter_name=adapter)
        missing = [name for name in result.missing_keys if adapter in name.split(".")]
        _check_complete({"missing_keys": missing, "unexpected_keys": result.unexpected_keys}, source.path)
    freeze(model)


@contextmanager
def whole_models() -> Iterator[None]:
    """Every process loads all of an expert, whatever is set up for the model that is trained.

    Otherwise transformers would leave the weights of all ranks but the first to FSDP's broadcast, or split them for
    DeepSpeed's ZeRO-3, and neither of them ever sees an expert.
    """
    deepspeed: Any = importlib.import_module("transformers.integrations.deepspeed")
    reference = deepspeed._hf_deepspeed_config_weak_ref
    setting = os.environ.pop(_FSDP_SETTING, None)
    deepspeed._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = reference
        if setting is not None:
            os.environ[_FSDP_SETTING] = setting


def freeze(model: Any) -> Any:
    """In eval mode, without gradients; the same object."""
    model.eval()
    model.requires_grad_(False)
    return model


def logit_width(model: Any) -> int:
    """The number of logits a position gets."""
    head = model.get_output_embeddings()
    width = getattr(head, "out_features", None)
    return int(model.config.get_text_config().vocab_size if width is None else width)


def require(package: str, expert: str, what: str) -> None:
    """Raise an ImportError with the remedy where a package is missing."""
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"expert {expert!r}: {what} needs the package {package!r}: {EXTRA}") from error


@contextmanager
def explained(expert: str, source: Source | None = None) -> Iterator[None]:
    """Errors of libraries, with the expert's name, what was asked for, and what can be done."""
    try:
        yield
    except ImportError as error:
        raise ImportError(f"expert {expert!r}: {error}\nInstall what is named, or {EXTRA}") from error
    except OSError as error:
        if source is None or source.folder is not None:
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else OSError
            raise kind(f"expert {expert!r}: {error}") from error
        asked = f"{source.path!r} at revision {source.revision or 'main'!r}"
        raise OSError(
            f"expert {expert!r} ({asked}): {error}\nCheck its path and revision; without the hub in reach fetch it "
            "once into the local cache, or name a local folder instead"
        ) from error
    except ValueError as error:
        raise ValueError(f"expert {expert!r}: {error}") from error
    except SafetensorError as error:
        raise ValueError(f"expert {expert!r}: broken safetensors: {error}; fetch or save them again") from error


def _check_complete(info: Mapping[str, Any], path: str) -> None:
    """``info``: lists of tensors, by the problem they had. Unread tensors of a whole model are left to transformers."""
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if found := info.get(problem):
            raise ValueError(
                f"the weights in {path!r} do not fit the model, {problem.replace('_', ' ')}: "
                f"{sorted(map(str, found))[:5]}; save them again, from the model that the config describes"
            )
