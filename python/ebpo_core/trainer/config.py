"""``EBPOConfig``: TRL's ``GRPOConfig`` with the EBPO estimator's options (arXiv 2602.05165) as ``ebpo_`` fields."""

from dataclasses import dataclass, field
from typing import Any, Literal

from trl import GRPOConfig  # type: ignore[attr-defined]

from ebpo_core import EBPO
from ebpo_core.estimator import Options

# No `from __future__ import annotations` here: argparse-building parsers (HfArgumentParser, TrlParser) read the
# field types of this dataclass at run time.


@dataclass
class EBPOArguments:
    """The ``ebpo_`` fields alone, to put in front of another GRPO-like config: ``class C(EBPOArguments, RLOOConfig)``.

    Every estimator option is explained, with its formula, in :class:`ebpo_core.EBPO`.
    """

    ebpo_normalize: Literal["batch", "scale", "none"] = field(
        default="batch",
        metadata={
            "help": "Last step of the estimator: 'batch' (the paper's) centres and divides by the standard deviation "
            "of the batch, 'scale' divides by its root mean square and keeps the sign of a failed group, 'none' "
            "leaves r - V."
        },
    )
    ebpo_sigma2: Literal["total", "within"] = field(
        default="total",
        metadata={"help": "Reward variance: of all rewards seen ('total', the paper's) or pooled within groups."},
    )
    ebpo_tau2: Literal["raw", "debiased"] = field(
        default="raw",
        metadata={
            "help": "Variance of group means: 'raw' (the paper's) or 'debiased', which subtracts their sampling noise."
        },
    )
    ebpo_score: Literal["after", "before"] = field(
        default="after",
        metadata={"help": "Score a batch 'after' (the paper's) or 'before' the prior has been updated with it."},
    )
    ebpo_leave_one_out: Literal[False, True, "group", "row"] = field(
        default=False,
        metadata={
            "help": "True (or 'group') scores each group with a prior that leaves that group out; 'row' leaves each "
            "completion out of its group's mean besides, for an unbiased gradient, and needs `ebpo_normalize` 'none'.",
            "nargs": "?",
            "const": True,
        },
    )
    ebpo_shrinkage: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the prior's mean in every baseline, in [0, 1], such as 0.5. Unset: estimated for each "
            "group, as in the paper."
        },
    )
    ebpo_decay: float = field(
        default=1.0,
        metadata={"help": "Exponential forgetting of the prior per generation batch, in (0, 1]; 1 never forgets."},
    )
    ebpo_decay_by: Literal["update", "visit"] = field(
        default="update",
        metadata={
            "help": "What counts for ebpo_decay: every generation batch ('update'), or for each key the batches that "
            "hold it ('visit'), as a prior for each prompt wants."
        },
    )
    ebpo_eps: float = field(
        default=1e-6,
        metadata={"help": "Added to the denominator of the last step."},
    )
    ebpo_ddof: int = field(
        default=0,
        metadata={"help": "Delta degrees of freedom of the prior's variances."},
    )
    ebpo_norm_ddof: int = field(
        default=1,
        metadata={"help": "Delta degrees of freedom of the batch's standard deviation."},
    )
    ebpo_keys: list[str] | None = field(
        default=None,
        metadata={
            "help": "Columns of the dataset that name a prompt's key, from general to special, such as 'topic level': "
            "each key has a prior of its own, blended with its parents' while it has seen few groups. One column may "
            "also hold lists. None in a column ends the key there. Unset: one prior for all."
        },
    )
    ebpo_track_prompts: bool = field(
        default=False,
        metadata={
            "help": "One prior for each prompt, under the key of `ebpo_keys` if there is one: a hash of the prompt is "
            "the key's last part. For prompts that come back, with `ebpo_decay` below 1, `ebpo_decay_by='visit'` and "
            "room in `ebpo_max_keys` for all prompts of the dataset."
        },
    )
    ebpo_kappa: float = field(
        default=10.0,
        metadata={"help": "Groups that the prior of a key's parent is worth when the two are blended."},
    )
    ebpo_max_keys: int = field(
        default=1024,
        metadata={"help": "Most priors kept beside the one for all; a dataset, or a batch, that needs more raises."},
    )
    ebpo_per_reward: bool = field(
        default=False,
        metadata={
            "help": "One prior for each reward function: advantages are computed for each and added up with the "
            "reward weights. Unset: one prior for the weighted sum of the rewards."
        },
    )
    ebpo_turns: bool = field(
        default=False,
        metadata={
            "help": "An advantage for each turn of TRL's agent loop (tools, environments): the turn's return-to-go "
            "less a baseline from the prompt's completions that reached that turn. A reward function may then return a "
            "list for each completion, with one reward a turn; a number comes with the last turn. Needs "
            "`ebpo_normalize` 'scale' or 'none'."
        },
    )
    ebpo_gamma: float = field(
        default=1.0,
        metadata={"help": "Discount of the return-to-go from one turn to the next, in [0, 1]."},
    )
    ebpo_shadow: bool = field(
        default=False,
        metadata={
            "help": "Train with TRL's own advantages and only log EBPO's beside them: metrics `ebpo/shadow_*` and a "
            "column of the completions table."
        },
    )
    ebpo_prior: str | None = field(
        default=None,
        metadata={
            "help": "Checkpoint folder or prior file to start the prior from, which may have been written under other "
            "options. On resume the checkpoint's own wins."
        },
    )
    ebpo_allow_missing_prior: bool = field(
        default=False,
        metadata={
            "help": "Resume from a checkpoint without a prior (one of plain GRPO): the prior then starts empty, or "
            "from `ebpo_prior`."
        },
    )

    def ebpo_options(self) -> dict[str, Any]:
        """The keyword arguments of :class:`ebpo_core.EBPO` that these fields stand for."""
        return {name: getattr(self, f"ebpo_{name}") for name in Options.__annotations__}

    def ebpo_key_columns(self) -> list[str]:
        """``ebpo_keys`` as a list; a YAML file may hold one name alone."""
        return [self.ebpo_keys] if isinstance(self.ebpo_keys, str) else list(self.ebpo_keys or [])

    def check_ebpo_options(self) -> None:
        """Raise the estimator's own error for an illegal option or combination now, not at the first step.

        Raises:
            TypeError, ValueError: names the option, and the remedy.
        """
        if self.ebpo_turns and self.ebpo_normalize == "batch":
            raise ValueError(
                "ebpo_turns=True with ebpo_normalize='batch': one mean subtracted from every turn rewards the policy "
                "for their number; set ebpo_normalize='scale' or 'none'"
            )
        if self.ebpo_turns and self.ebpo_shadow:
            raise ValueError(
                "ebpo_turns=True with ebpo_shadow=True: TRL has one advantage a completion to compare with; set one of "
                "them to False"
            )
        if not 0.0 <= self.ebpo_gamma <= 1.0:
            raise ValueError(f"ebpo_gamma={self.ebpo_gamma!r}: expected a number in [0, 1]")
        if self.ebpo_gamma != 1.0 and not self.ebpo_turns:
            raise ValueError(f"ebpo_gamma={self.ebpo_gamma!r} discounts turns: set ebpo_turns=True, or leave it out")
        try:
            EBPO(**self.ebpo_options())
        except (TypeError, ValueError) as error:
            raise type(error)(f"{error} (an `ebpo_` field of {type(self).__name__})") from error


@dataclass
class EBPOConfig(EBPOArguments, GRPOConfig):
    """``GRPOConfig`` for :class:`EBPOTrainer`; every field of GRPO stays, with these differences.

    ``scale_rewards`` defaults to ``"none"``: the estimator scales the advantages itself, and another value raises.
    With ``ebpo_shadow=True`` TRL's own advantages are what trains, so every value is allowed there and the default is
    TRL's, ``"group"``. ``multi_objective_aggregation="normalize_then_sum"`` raises too outside shadow mode: the prior
    needs one reward per completion on one scale, which is the weighted sum, or with ``ebpo_per_reward=True`` each
    function's own.

    Raises:
        ValueError: one of the above, or an option that the estimator refuses.
    """

    scale_rewards: str | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "'none' is the default and the only value allowed: EBPO scales the advantages itself. With "
            "`ebpo_shadow` it is TRL's ('group' by default, 'batch' or 'none'), since TRL's advantages train there."
        },
    )

    def __post_init__(self) -> None:
        if self.scale_rewards is None:
            self.scale_rewards = "group" if self.ebpo_shadow else "none"
        super().__post_init__()  # type: ignore[no-untyped-call]
        if not self.ebpo_shadow and self.scale_rewards != "none":
            raise ValueError(
                f"scale_rewards={self.scale_rewards!r}: EBPO scales the advantages itself; leave scale_rewards unset "
                "or 'none', or set ebpo_shadow=True to train with TRL's advantages and only log EBPO's"
            )
        if not self.ebpo_shadow and self.multi_objective_aggregation != "sum_then_normalize":
            raise ValueError(
                f"multi_objective_aggregation={self.multi_objective_aggregation!r}: EBPO's prior is over the weighted "
                "sum of the rewards; use 'sum_then_normalize' (with reward_weights), with ebpo_per_reward=True for a "
                "prior of each reward function, or ebpo_shadow=True to train with TRL's advantages and only log EBPO's"
            )
        self.check_ebpo_options()
