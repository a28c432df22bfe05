"""Devices of experts: models that wait on the CPU until they run, and devices by their exact names."""

from __future__ import annotations

import threading
from typing import Any

import torch
from transformers import PreTrainedModel

_OF_EXPERTS = (
    "pass another one, expert_paths={name: {'device': ...}} when loading a checkpoint, or None to follow the router"
)
OF_MODELS = "name one that it has, such as cpu or cuda:0"


class OffloadPool:
    """Models on the CPU, of which one at a time is on each execution device. Who runs one holds ``lock`` meanwhile."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._hooks: dict[int, Any] = {}
        self._resident: dict[torch.device, Any] = {}  # the hook of the model that ran last

    def add(self, model: PreTrainedModel, device: torch.device) -> None:
        """Take a model that is on the CPU. accelerate's hook moves it to ``device`` when its forward is called."""
        from accelerate import cpu_offload_with_hook

        _, self._hooks[id(model)] = cpu_offload_with_hook(model, device)

    def device(self, model: PreTrainedModel) -> torch.device:
        """The device that the model runs on."""
        device: torch.device = self._hooks[id(model)].hook.execution_device
        return device

    def bring(self, model: PreTrainedModel) -> None:
        """Make room: the model that ran last on the same device goes back to the CPU. The caller holds ``lock``."""
        hook, device = self._hooks[id(model)], self.device(model)
        last = self._resident.get(device)
        if last is not None and last is not hook:
            from accelerate.utils.memory import clear_device_cache

            last.offload()
            clear_device_cache()
        self._resident[device] = hook

    def move(self, model: PreTrainedModel, device: torch.device) -> None:
        """Change where the model runs; it waits on the CPU."""
        with self.lock:
            hook, before = self._hooks[id(model)], self.device(model)
            if before == device:
                return
            hook.offload()
            if self._resident.get(before) is hook:
                del self._resident[before]
            hook.hook.execution_device = device


def exact_device(device: str | int | torch.device | None, remedy: str = _OF_EXPERTS) -> torch.device:
    """A device with its index: "cuda" is the current one, None the CPU; ``remedy`` is for the message.

    Raises:
        ValueError: no such device in this machine.
    """
    try:
        return torch.empty(0, device="cpu" if device is None else device).device
    except (RuntimeError, AssertionError) as error:  # torch asserts where it was built without CUDA
        raise ValueError(
            f"device {str(device)!r} is not in this machine ({str(error).splitlines()[0]}): {remedy}"
        ) from error
