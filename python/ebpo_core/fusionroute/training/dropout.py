"""Dropout turned off, wherever a model keeps its probability: modules, their attributes, the config they read."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedConfig, PreTrainedModel

# Noise of mixture-of-experts layers in training. Others with "jitter" in their names are no noise.
_NOISE = ("jitter_noise", "input_jitter_noise")


def disable_dropout(model: nn.Module) -> None:
    """Make ``model`` compute in training mode what it computes in evaluation, as far as dropout is concerned.

    ``nn.Dropout`` modules get probability 0, and so do attributes such as ``attention_dropout`` and ``layerdrop``,
    which models pass to functions. Some layers (Falcon's, GPT-Neo's) read their config in every forward: they get a
    copy of it without dropout, so that the config that is saved stays as it is.
    """
    quiet: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        _silence(module)
        config = vars(module).get("config")
        if isinstance(config, PreTrainedConfig) and not isinstance(module, PreTrainedModel):
            if id(config) not in quiet:
                quiet[id(config)] = copy.copy(config)
                _silence(quiet[id(config)])
            module.config = quiet[id(config)]


def _silence(owner: Any) -> None:
    for name, value in list(vars(owner).items()):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if number and value and ("drop" in name or name in _NOISE):
            setattr(owner, name, 0.0)
