"""The options of ``ebpo train``: TRL's own parser over TRL's own configs, plus the fields that say what to train."""

# No `from __future__ import annotations` here: TrlParser reads the field types of this dataclass at run time.
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ebpo_core.cli.parsing import check_at_least, check_model_config, early_value, parse_with_trl, read_flags

Method = Literal["ebpo", "grpo"]


@dataclass
class TrainArguments:
    """Options of ``ebpo train`` beside those of TRL's ``GRPOConfig`` and ``ModelConfig``."""

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
        check_at_least(self, 0, "eval_prompts", "warm_up_steps")
        check_at_least(self, 1, "eval_completions", "eval_completions_batch", "warm_up_batch_size")
        check_at_least(self, 1, "train_size", "tiny_hidden_size", "tiny_layers", "cpu_threads")
        if self.method == "grpo" and self.prior is not None:
            raise ValueError(f"prior={self.prior!r}: plain GRPO has no prior; use method ebpo")


def parse(
    argv: Sequence[str], defaults: dict[str, Any] | None = None, prog: str = "ebpo train"
) -> tuple[Any, Any, Any]:
    """Parse a YAML file and flags into (TrainArguments, EBPOConfig or GRPOConfig, ModelConfig); flags win.

    Args:
        argv: Flags, with ``--config FILE`` among them or not.
        defaults: What stands where neither file nor flag says otherwise.
        prog: The command's name in its help.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A value that does not fit, or a name in the file that is no option. ``ebpo_`` options in a file are
            ignored for method grpo, so that one file serves both methods; as flags they are refused.
    """
    from trl import GRPOConfig, ModelConfig  # type: ignore[attr-defined]

    from ebpo_core.trainer import EBPOConfig

    flags, in_file = read_flags(argv)
    plain = early_value("method", flags, in_file, default="ebpo") == "grpo"
    train, config, model = parse_with_trl(
        (TrainArguments, GRPOConfig if plain else EBPOConfig, ModelConfig),
        flags,
        prog=prog,
        defaults=defaults,
        foreign=lambda name: plain and name.startswith("--ebpo_"),
        hint="ebpo_ options need method ebpo",
    )
    if model.model_name_or_path is None:
        raise ValueError(
            "model_name_or_path is missing: give a model directory, a hub id, a .gguf file, "
            "package:<installed package>, or tiny:countdown"
        )
    check_model_config(model, quantisation="ebpo train loads the model unquantised")
    return train, config, model
