"""The options of ``fusionroute train``: TRL's own parser over the trainers' configs, plus models, experts and data."""

# No `from __future__ import annotations` here: TrlParser reads the field types of this dataclass at run time.
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from ebpo_core.cli.parsing import check_at_least, check_model_config, early_value, has_flag, parse_with_trl, read_flags
from ebpo_core.fusionroute.cli.options import named_paths

Stage = Literal["sft", "mix", "cdpo"]


@dataclass
class TrainArguments:
    """Options of ``fusionroute train`` beside the trainer's arguments and TRL's ``ModelConfig``.

    ``experts_typed`` is True where ``experts`` was a flag: for a checkpoint, which has its experts, those of a file are
    ignored, so that one file serves both phases, and those of a flag are refused.
    """

    stage: Stage = field(
        default="sft",
        metadata={
            "help": "sft (first phase), mix (SFT samples and preference pairs shuffled together), or cdpo alone."
        },
    )
    experts: list[str] | None = field(
        default=None,
        metadata={
            "help": "NAME=PATH of each frozen expert, to start from a plain router; in YAML also a mapping of names to "
            "paths or to fields of an expert's reference. A FusionRoute checkpoint has its own: for one, experts in "
            "YAML are ignored."
        },
    )
    expert_paths: list[str] | None = field(
        default=None, metadata={"help": "NAME=PATH of experts that a checkpoint refers to elsewhere."}
    )
    substitutes: list[str] | None = field(
        default=None,
        metadata={
            "help": "TOKEN=TOKEN of tokens that experts lack, and of theirs that they read and score instead; in YAML "
            "also a mapping. With experts only."
        },
    )
    renamed_ids: list[int] | None = field(
        default=None, metadata={"help": "Ids of reserved tokens that one of the models renamed. With experts only."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the Python code of experts whose folders bring their own model class."}
    )
    alpha: float | None = field(
        default=None, metadata={"help": "Weight of the expert's logits; 1 in the paper, else the checkpoint's."}
    )
    data: str | None = field(
        default=None,
        metadata={"help": "SFT rows, for sft and mix: a .jsonl/.parquet/.csv file, a saved data set, or a hub id."},
    )
    preferences: str | None = field(default=None, metadata={"help": "Preference rows, for mix and cdpo; same forms."})
    eval_data: str | None = field(default=None, metadata={"help": "SFT rows to evaluate on; see --eval_strategy."})
    eval_preferences: str | None = field(default=None, metadata={"help": "Preference rows to evaluate on."})
    dataset_split: str = field(default="train", metadata={"help": "Split of saved and hub data sets."})
    train_size: int | None = field(
        default=None, metadata={"help": "Rows to keep of each training set; all by default."}
    )
    cpu_threads: int | None = field(default=None, metadata={"help": "Threads of torch on a CPU."})
    experts_typed: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        check_at_least(self, 1, "train_size", "cpu_threads")
        self.named_experts()  # these raise where an item is not NAME=PATH
        self.moved_experts()
        self.named_substitutes()
        needed = {"sft": ("data",), "mix": ("data", "preferences"), "cdpo": ("preferences",)}[self.stage]
        for name in needed:
            if getattr(self, name) is None:
                raise ValueError(f"{name} is missing: stage {self.stage} needs it; give a file, a folder or a hub id")
        for name in ("data", "preferences"):
            for given in (name, f"eval_{name}"):
                if name not in needed and getattr(self, given) is not None:
                    raise ValueError(f"{given}={getattr(self, given)!r}: stage {self.stage} does not use it")

    def named_experts(self) -> dict[str, Any] | None:
        """``experts`` as :meth:`FusionRouteForCausalLM.from_experts` takes them."""
        return _named("experts", self.experts)

    def moved_experts(self) -> dict[str, Any] | None:
        """``expert_paths`` as ``from_pretrained`` takes them."""
        return _named("expert_paths", self.expert_paths)

    def named_substitutes(self) -> dict[str, Any] | None:
        """``substitutes`` as ``from_experts`` takes them."""
        return _named("substitutes", self.substitutes)


def _named(argument: str, value: Any) -> dict[str, Any] | None:
    if value is None or isinstance(value, dict):  # a mapping in YAML
        return value
    return named_paths(argument, [value] if isinstance(value, str) else value)


def parse(argv: Sequence[str], prog: str = "fusionroute train") -> tuple[Any, Any, Any]:
    """Parse a YAML file and flags into (TrainArguments, the stage's trainer config, TRL's ModelConfig); flags win.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A value that does not fit, or a name that is no option. What only the second phase knows (``beta``,
            ``sft_loss_weight``) may stand in a file for stage sft, so that one file serves all stages; as a flag it is
            refused.
    """
    from trl import ModelConfig  # type: ignore[attr-defined]

    from ebpo_core.fusionroute.training import FusionRouteCDPOConfig, FusionRouteSFTConfig

    flags, in_file = read_flags(argv)
    first = early_value("stage", flags, in_file, default="sft") == "sft"
    second_phase = {f"--{one.name}" for one in fields(FusionRouteCDPOConfig)}
    config_type: Any = FusionRouteSFTConfig if first else FusionRouteCDPOConfig
    train, config, model = parse_with_trl(
        (TrainArguments, config_type, ModelConfig),
        flags,
        prog=prog,
        foreign=lambda name: first and name in second_phase,
        hint="stage sft does not have it, mix and cdpo do",
    )
    if model.model_name_or_path is None:
        raise ValueError(
            "model_name_or_path is missing: give a FusionRoute checkpoint, or a router (a causal LM's directory, hub "
            "id, .gguf file or package:<installed package>) together with experts"
        )
    check_model_config(model)
    train.experts_typed = has_flag("experts", flags)
    return train, config, model
