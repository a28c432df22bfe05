"""PEFT adapters of experts: put into a base model that several experts share, switched, or merged into it."""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import os
import threading
import warnings
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .errors import check_complete, explained, require
from .files import ADAPTER_WEIGHTS, adapter_files, local_folder
from .references import ADAPTER_CONFIG, Source

_UNKNOWN = object()


def load_adapter(model: Any, expert: str, adapter: str, source: Source) -> None:
    """Put an adapter's weights into ``model`` under the name ``adapter``.

    Raises:
        ImportError: PEFT is missing.
        OSError: no such repository or revision, nor a copy in the local cache (FileNotFoundError: a folder's weights).
        ValueError: a folder of pickles, or weights that do not fit the model.
    """
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
        check_complete({"missing_keys": missing, "unexpected_keys": result.unexpected_keys}, source.path)


class AdapterSwitch:
    """The one of a model's PEFT adapters that is active. The caller of :meth:`select` holds ``lock``, also while the
    model runs: the active adapter is a state of the whole model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.lock = threading.RLock()
        self._active: Any = _UNKNOWN

    def select(self, adapter: str | None) -> None:
        """Activate an adapter by its name in the model, or none of them."""
        if self._active == adapter:
            return
        from peft.functional import set_adapter
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        self._active = _UNKNOWN
        # Not the model's own enable_adapters(): it leaves modules_to_save switched off.
        for module in self.model.modules():
            if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
                module.enable_adapters(enabled=adapter is not None)
        if adapter is not None:
            set_adapter(self.model, adapter, inference_mode=True)  # which freezes what enabling made trainable
        self._active = adapter


def merge_adapter(model: Any, expert: str, adapter: str) -> None:
    """Put an adapter into the weights of its base, in place, and take PEFT's modules out of the model.

    Raises:
        ValueError: an adapter that cannot be merged.
    """
    from peft.functional import set_adapter
    from peft.tuners.tuners_utils import BaseTunerLayer

    try:
        if getattr(model.peft_config[adapter], "layer_replication", None):
            raise ValueError("it repeats layers of the base, which then share weights")
        set_adapter(model, adapter, inference_mode=True)
        untie(model)
        options: dict[str, Any] = {"safe_merge": True, "adapter_names": [adapter]}
        merged: list[str] = []
        for path, module in list(model.named_modules()):
            if any(path.startswith(f"{outer}.") for outer in merged):
                continue  # inside of one that is gone
            if hasattr(module, "unload_and_optionally_merge_module"):
                plain = module.unload_and_optionally_merge_module(merge=True, **options)
            elif isinstance(module, BaseTunerLayer):
                module.merge(**options)
                plain = module.get_base_layer()
            else:
                continue
            model.set_submodule(path, plain)
            merged.append(path)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"expert {expert!r}: its adapter cannot be merged into the base: {error}. Name a folder with both in "
            f"one: expert_paths={{{expert!r}: {{'path': ..., 'adapter': None}}}} with verify_experts=False"
        ) from error
    del model.peft_config
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embeddings.weight.data_ptr() != head.weight.data_ptr():
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False


def untie(model: Any) -> bool:
    """Give embeddings and head weights of their own where an adapter changes either: it may change one alone.

    Returns:
        True if they were tied and are not any more.
    """
    outer = [model.get_input_embeddings(), model.get_output_embeddings()]
    inner = [_innermost(module) for module in outer]
    tied = inner != outer and inner[0].weight is inner[1].weight
    if tied:
        inner[1].weight = nn.Parameter(inner[1].weight.detach().clone(), requires_grad=False)
    return tied


def _innermost(module: Any) -> Any:
    """The module that PEFT has wrapped."""
    while (inner := getattr(module, "original_module", None) or getattr(module, "base_layer", None)) is not None:
        module = inner
    return module
