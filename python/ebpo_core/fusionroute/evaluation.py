"""FusionRoute in EleutherAI's lm-evaluation-harness: the model name ``fusionroute``, and one function that evaluates.

The harness has no plug-ins for models: the name is known once this module is imported. ``fusionroute eval`` does so;
``python -m ebpo_core.fusionroute.evaluation run --model fusionroute --model_args pretrained=PATH ...`` is the harness's
own command with the name known.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import handle_non_serializable
except ModuleNotFoundError as error:
    message = 'evaluation needs the lm-evaluation-harness: pip install "ebpo-core[fusionroute,eval]"'
    raise ModuleNotFoundError(message, name=error.name) from error

from ebpo_core.files import write_text
from ebpo_core.fusionroute.decoding.routing import OPTION_NAMES, RoutingOptions, permitted_rows
from ebpo_core.fusionroute.model import FusionRouteForCausalLM

# A comma ends an argument, and experts may have a plus in their names.
LIST_SEPARATOR = ":"


@register_model("fusionroute")
class FusionRouteLM(HFLM):  # type: ignore[misc]
    """The harness's ``HFLM`` for a FusionRoute checkpoint or model, greedy or sampled as a task asks.

    Model arguments are those of ``hf`` and the options of :class:`~.decoding.routing.RoutingOptions`; a list is written
    with colons, as in ``pretrained=runs/router,alpha=0.5,allowed_experts=math:code``. Any other causal LM can be
    evaluated too, an expert alone for instance, without those options. Weights are loaded from safetensors only.

    Raises:
        ValueError: An option for a model that is not FusionRoute, an option's value, or an unknown expert.
    """

    def __init__(self, pretrained: Any, *, device: Any = None, **arguments: Any) -> None:
        given = {name: arguments.pop(name) for name in OPTION_NAMES if arguments.get(name) is not None}
        self.routing = {name: _as_list(value) if name == "allowed_experts" else value for name, value in given.items()}
        RoutingOptions(**self.routing)  # a bad value is worth no minutes of loading
        if isinstance(pretrained, os.PathLike):
            pretrained = os.fspath(pretrained)
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        super().__init__(pretrained, backend="causal", device=str(device), **arguments)
        if isinstance(self.model, FusionRouteForCausalLM):
            permitted_rows(self.model.config.options().updated(**self.routing), self.model.experts.names)
            context = self.model.config.max_position_embeddings
            if context is not None and self.max_length > context:
                raise ValueError(
                    f"max_length is {self.max_length}: pass at most {context}, the shortest context among the models"
                )
        elif self.routing:
            raise ValueError(
                f"{', '.join(self.routing)}: FusionRoute's options, and this is a {type(self.model).__name__}"
            )

    def _create_model(self, pretrained: str, **arguments: Any) -> None:
        if not arguments.get("gguf_file"):
            arguments.setdefault("use_safetensors", True)
        super()._create_model(pretrained, **arguments)

    def _model_call(self, inps: Any, *_: Any) -> Any:
        """Fused logits of a right-padded batch, ``[B, S, V]``; the harness normalises them."""
        dtype = self.mixed_precision_dtype
        with torch.no_grad(), torch.autocast(device_type=self.device.type, dtype=dtype, enabled=dtype is not None):
            return self.model(inps, **self.routing).logits

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **generation_kwargs: Any) -> Any:
        return super()._model_generate(context, max_length, stop, **generation_kwargs, **self.routing)

    def get_model_info(self) -> dict[str, Any]:
        """The harness's record of the model, with the experts: ``model_num_parameters`` counts the router alone."""
        info: dict[str, Any] = super().get_model_info()
        if isinstance(self.model, FusionRouteForCausalLM):
            info["fusionroute_options"] = dict(self.routing)
            info["fusionroute_experts"] = {expert.name: expert.num_parameters for expert in self.model.experts}
        return info


def evaluate(
    model: Any,
    tasks: str | Sequence[Any],
    *,
    tokenizer: Any = None,
    include_path: str | os.PathLike[str] | None = None,
    manager: Any = None,
    limit: float | None = None,
    num_fewshot: int | None = None,
    batch_size: int | str = 8,
    max_length: int | None = None,
    device: str | None = None,
    dtype: str = "auto",
    apply_chat_template: bool = False,
    system_instruction: str | None = None,
    generation_kwargs: dict[str, Any] | None = None,
    log_samples: bool = False,
    seed: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """Evaluate a model on tasks of the harness, its own or from a folder of YAML files.

    Tasks that run a model's code (HumanEval, MBPP) are refused: nothing here evaluates what a model wrote.

    Args:
        model: A FusionRoute checkpoint's path or hub id, a loaded model, or any other causal LM in either form.
        tasks: Names of tasks or groups, or what else the harness takes for one.
        tokenizer: Of a loaded model; by default the one in the folder that the model came from.
        include_path: A folder with tasks of one's own, beside the harness's.
        manager: What :func:`task_manager` returned, if it was asked before the model was loaded.
        limit: Documents per task, or their share where it is below 1. For trials, not for results.
        num_fewshot: Examples in the prompt; by default the task's.
        batch_size: Rows at once, or "auto".
        max_length: Longest input in tokens; by default what the router's config allows.
        device: Where a model that is loaded here goes; by default the first GPU, else the CPU.
        dtype: Of a model that is loaded here; by default the checkpoint's.
        apply_chat_template: Put prompts into the tokenizer's chat template.
        system_instruction: In front of every prompt.
        generation_kwargs: Override a task's, e.g. ``{"max_gen_toks": 400}`` as in the paper.
        log_samples: Keep every document, answer and score under ``"samples"``.
        seed: Of the few-shot examples and of sampling.
        options: Of :class:`~.decoding.routing.RoutingOptions`, e.g. ``forced_expert="math"``.

    Returns:
        The harness's results: ``["results"][task]["<metric>,<filter>"]`` and the record of the run.

    Raises:
        ValueError: No task, an unknown one, or what :class:`FusionRouteLM` raises.
        TypeError: An option that does not exist.
    """
    unknown = [name for name in options if name not in OPTION_NAMES]
    if unknown:
        raise TypeError(f"{', '.join(unknown)}: no such option; choose among {', '.join(OPTION_NAMES)}")
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    if not names:
        raise ValueError("tasks=[]: give at least one name")
    if manager is None:
        manager = task_manager(names, include_path)
    lm = FusionRouteLM(
        model,
        tokenizer=tokenizer,
        batch_size=batch_size,
        max_length=max_length,
        device=device,
        dtype=dtype,
        **options,
    )
    results: dict[str, Any] | None = simple_evaluate(
        lm,
        tasks=names,
        task_manager=manager,
        limit=limit,
        num_fewshot=num_fewshot,
        apply_chat_template=apply_chat_template,
        system_instruction=system_instruction,
        gen_kwargs=generation_kwargs,
        log_samples=log_samples,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    # Of several processes the first has the results.
    return {} if results is None else results


def write_results(path: str | os.PathLike[str], results: dict[str, Any]) -> Path:
    """Write what :func:`evaluate` returned as JSON, with the harness's own rules for what JSON lacks."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=2, ensure_ascii=False, default=handle_non_serializable)
    write_text(target, text + "\n")
    return target


def task_manager(names: Sequence[Any], include_path: str | os.PathLike[str] | None = None) -> Any:
    """The harness's index of tasks, which was seen to hold ``names``.

    Raises:
        FileNotFoundError: No such folder.
        ValueError: An unknown task.
    """
    if include_path is not None:
        if not Path(include_path).is_dir():
            raise FileNotFoundError(f"include_path={os.fspath(include_path)!r}: no such folder")
        own = TaskManager(include_path=os.fspath(include_path), include_defaults=False)
        # Reading the harness's own fourteen thousand files takes half a minute on a slow machine.
        if all(isinstance(name, str) and name in own.all_subtasks for name in names):
            return own
    manager = TaskManager(include_path=None if include_path is None else os.fspath(include_path))
    known = set(manager.all_tasks)
    missing = [name for name in names if isinstance(name, str) and name not in known and not Path(name).is_file()]
    if missing:
        raise ValueError(f"tasks={missing!r}: the harness knows no such task; `lm_eval ls tasks` lists its own")
    return manager


def _as_list(value: Any) -> Any:
    return value.split(LIST_SEPARATOR) if isinstance(value, str) else value


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
