"""The options of ``ebpo train``: TRL's own parser over TRL's own configs, plus the fields that say what to train."""

# No `from __future__ import annotations` here: TrlParser reads the field types of this dataclass at run time.
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Method = Literal["ebpo", "grpo"]


@dataclass
class TrainArguments:
    """What ``ebpo train`` adds to TRL's ``GRPOConfig`` and ``ModelConfig``."""

    task: str = field(
        default="countdown",
        metadata={"help": "countdown, arithmetic, a .jsonl/.parquet/.csv file, a saved data set, or a hub id."},
    )
    method: Method = field(
        default="ebpo",
        metadata={"help": "ebpo, or grpo: TRL's unmodified GRPOTrainer with the same seeds and data."},
    )
    reward: str | None = field(
        default=None,
        metadata={"help": "package.module:function in TRL's signature, exact, or integer; for your own data sets."},
    )
    prior: str | None = field(
        default=None,
        metadata={"help": "Checkpoint directory or prior file to start the running prior from."},
    )
    topics: list[str] | None = field(default=None, metadata={"help": "Topics of a built-in task; all by default."})
    levels: list[int] | None = field(default=None, metadata={"help": "Levels of a built-in task; all by default."})
    train_size: int | None = field(default=None, metadata={"help": "Prompts to train on."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub data set."})
    dataset_split: str = field(default="train", metadata={"help": "Split of a hub data set."})
    eval_prompts: int = field(
        default=0, metadata={"help": "Held-out prompts to measure pass@1 on, before and after; 0 measures nothing."}
    )
    eval_completions: int = field(default=4, metadata={"help": "Completions sampled per held-out prompt."})
    eval_completions_batch: int = field(default=256, metadata={"help": "Completions sampled at once in evaluation."})
    eval_seed: int = field(default=0, metadata={"help": "Seed of the held-out prompts and of their sampling."})
    warm_up_steps: int = field(
        default=120, metadata={"help": "Supervised steps of a tiny: model before it is trained with rewards."}
    )
    warm_up_batch_size: int = field(default=128, metadata={"help": "Examples per supervised step."})
    warm_up_learning_rate: float = field(default=2e-3, metadata={"help": "Peak learning rate of the warm-up."})
    warm_up_seed: int = field(default=0, metadata={"help": "Seed of the initial weights and of the warm-up's data."})
    tiny_hidden_size: int = field(default=128, metadata={"help": "Width of a tiny: model."})
    tiny_layers: int = field(default=5, metadata={"help": "Layers of a tiny: model."})
    cpu_threads: int | None = field(default=None, metadata={"help": "Threads of torch on a CPU."})

    def __post_init__(self) -> None:
        for name in ("eval_completions", "eval_completions_batch", "warm_up_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1")
        for name in ("eval_prompts", "warm_up_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 0")
        if self.method == "grpo" and self.prior is not None:
            raise ValueError("prior: plain GRPO has none; use method ebpo")


def _split_config_flag(argv: Sequence[str]) -> list[str]:
    """TrlParser knows ``--config FILE``; write ``--config=FILE`` that way, and see that the file is there."""
    arguments: list[str] = []
    for argument in argv:
        arguments.extend(["--config", argument[9:]] if argument.startswith("--config=") else [argument])
    if "--config" in arguments:
        following = arguments[arguments.index("--config") + 1 :][:1]
        if not following or not Path(following[0]).is_file():
            raise FileNotFoundError(f"config={following[0] if following else ''!r}: no such YAML file")
    return arguments


def _method_of(arguments: Sequence[str]) -> str:
    """The method, known before the rest is parsed, since it decides which of the two configs parses the rest."""
    method = ""
    for index, argument in enumerate(arguments):
        if argument == "--method":
            method = (list(arguments[index + 1 :]) or [""])[0]
        elif argument.startswith("--method="):
            method = argument[9:]
    if not method and "--config" in arguments:
        import yaml

        content = yaml.safe_load(Path(arguments[arguments.index("--config") + 1]).read_text(encoding="utf-8"))
        method = str(content.get("method", "")) if isinstance(content, dict) else ""
    return method or "ebpo"


def parse(
    argv: Sequence[str], defaults: dict[str, Any] | None = None, prog: str = "ebpo train"
) -> tuple[Any, Any, Any]:
    """Parse a YAML file and flags into (TrainArguments, EBPOConfig or GRPOConfig, ModelConfig); flags win.

    Args:
        argv: Flags, with ``--config FILE`` among them or not.
        defaults: What stands where neither file nor flag says otherwise.
        prog: The command's name in its help.

    Raises:
        ValueError: A value that does not fit, or a name in the file that is no option. ``ebpo_`` options in a file are
            ignored for method grpo, so that one file serves both methods; as flags they are refused.
    """
    from trl import GRPOConfig, ModelConfig, TrlParser  # type: ignore[attr-defined]

    from ebpo_core.trainer import EBPOConfig

    arguments = _split_config_flag(argv)
    config_type = GRPOConfig if _method_of(arguments) == "grpo" else EBPOConfig
    types: list[Any] = [TrainArguments, config_type, ModelConfig]
    parser = TrlParser(types, prog=prog, allow_abbrev=False)
    unknown = parser.set_defaults_with_config(**(defaults or {}))
    *parsed, in_file, flags = parser.parse_args_and_config(
        arguments, return_remaining_strings=True, separate_remaining_strings=True
    )
    # Each unknown option of the file comes as a name and a value.
    names = [name for name in (unknown + in_file)[::2] if config_type is EBPOConfig or not name.startswith("--ebpo_")]
    if names or flags:
        hint = " (ebpo_ options need method ebpo)" if config_type is GRPOConfig else ""
        raise ValueError(f"no such option: {', '.join([*names, *flags])}{hint}; see {prog} --help")
    train, config, model = parsed
    if model.model_name_or_path is None:
        raise ValueError(
            "model_name_or_path is missing: give a model directory, a hub id, a .gguf file, "
            "package:<installed package>, or tiny:countdown"
        )
    return train, config, model
