"""``FusionRouteCDPOTrainer``, the second phase: complemented DPO, alone or mixed with SFT samples (§4.2)."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad
from transformers import TrainerCallback

from .base import FusionRouteTrainer, Scores
from .batches import MixDataset
from .config import FusionRouteCDPOConfig
from .dropout import disable_dropout
from .losses import cdpo_bias, cdpo_loss, cdpo_margin
from .metrics import Quotients
from .preparation import content_name, fusion_model, prepared_data, prepared_model, tokenized_pairs
from .reference_logprobs import reference_sums
from .sequences import PreferencePairs
from .sft import Rows


class _HeadRests(TrainerCallback):
    """Leaves ``route_head`` out of a step whose global batch has pairs alone.

    Its gradient is None then in one process, but zero under DDP, where momentum and weight decay would move it.
    """

    samples = 0  # of the global batch at hand

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        if not self.samples:
            for name, parameter in kwargs["model"].named_parameters():
                if "route_head." in name:
                    parameter.grad = None


class FusionRouteCDPOTrainer(FusionRouteTrainer):
    """Trains the router with CDPO; SFT samples mixed in keep training all parameters (the paper's mix training).

    The loss of a global batch is ( λ Σ_s L_SFT(s) + Σ_p L_CDPO(p) ) / (n_s + n_p), each L_SFT(s) over its own tokens,
    with L_CDPO = −log σ(ℓ + bias): ℓ is DPO's margin of the router's own log-probabilities, and bias = αβ Σ (chosen −
    rejected) of the experts that the current router selects. No gradient goes through the selection or into
    ``route_head``: a step without SFT samples leaves the head as it is, whatever momentum and weight decay would do,
    and in a run without them it is frozen.

    The experts' part comes from the expert cache, so that none needs to be in memory; only SFT samples with
    ``routing_loss="normalized"`` need them loaded. The reference is ``model`` as it is given: its log-probabilities are
    computed once, here, and kept in ``output_dir``; to resume, give the same model again. A PEFT adapter that is
    trained further is part of the reference, a new one changes nothing yet.

    TRL's ``DPOTrainer`` is not the base: it has one kind of rows, takes log-probabilities from a head that it patches
    into the model, and its reference has no term that moves with the policy's selection.

    Args:
        model: a :class:`~..model.FusionRouteForCausalLM` after the SFT phase, or a PEFT model on one.
        args: a :class:`~.config.FusionRouteCDPOConfig`.
        train_dataset, eval_dataset: preference rows, see :func:`~.data.tokenize_pairs`.
        sft_dataset, eval_sft_dataset: SFT rows to mix in, see :func:`~.data.tokenize_samples`.
        processing_class: the tokenizer.
        peft_config: of an adapter to be made on the router.
        kwargs: to ``Trainer`` (``callbacks``, ``optimizers``, ...).

    Metrics beside those of :class:`~.sft.FusionRouteSFTTrainer` (routing ones over samples and chosen completions):
    ``loss_cdpo``, ``rewards/chosen``, ``rewards/rejected``, ``rewards/margins`` (ℓ) and ``rewards/accuracies`` (share
    of ℓ > 0) as in TRL, of the router alone; ``cdpo/bias``, ``cdpo/bias_magnitude`` (mean of \\|bias\\|) and
    ``cdpo/accuracy`` (share of ℓ + bias > 0).

    Raises:
        TypeError: another model or args.
        ValueError: data that cannot be trained on, a model without complementary logits, a frozen route head where SFT
            samples should train it, an expert cache or reference of something else.
    """

    args: FusionRouteCDPOConfig

    def __init__(
        self,
        model: Any,
        args: FusionRouteCDPOConfig,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | None = None,
        processing_class: Any = None,
        *,
        sft_dataset: Rows | None = None,
        eval_sft_dataset: Rows | None = None,
        peft_config: Any = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, FusionRouteCDPOConfig):
            raise TypeError(f"args is a {type(args).__name__}: pass a FusionRouteCDPOConfig")
        if isinstance(eval_dataset, Mapping) or isinstance(eval_sft_dataset, Mapping):
            raise TypeError("eval_dataset is a dict: give one list or Dataset of preference rows")
        fusion = fusion_model(model)
        if not fusion.config.complementary:
            raise ValueError(
                "the model's config has complementary=False, so its router's logits count for nothing and CDPO has "
                "nothing to train: set model.config.complementary = True"
            )
        trains_head = sft_dataset is not None
        samples = trains_head or eval_sft_dataset is not None
        model = prepared_model(model, args, peft_config, samples=samples, trains_head=trains_head)
        if args.disable_dropout:
            disable_dropout(model)
        train = prepared_data(fusion, args, processing_class, "train", samples=sft_dataset, pairs=train_dataset)
        evaluation = prepared_data(fusion, args, processing_class, "eval", samples=eval_sft_dataset, pairs=eval_dataset)
        self._head_rests = _HeadRests()
        # An adapter made here, and no more than that, can be turned off to have the reference again.
        self._new_adapter = peft_config is not None and getattr(peft_config, "bias", "none") == "none"
        super().__init__(model, args, train, evaluation, processing_class, **kwargs)
        self.add_callback(self._head_rests)
        for name, dataset in (("train", train), ("eval", evaluation)):
            if dataset is not None and dataset.pairs is not None:
                dataset.reference = self._reference(name, dataset.pairs)

    def _reference(self, name: str, pairs: PreferencePairs, *, with_adapter: bool = True) -> NDArray[np.float32]:
        model = self.accelerator.unwrap_model(self.model)

        def forward(**inputs: Any) -> Any:
            context = nullcontext() if with_adapter else model.disable_adapter()
            with torch.no_grad(), self.accelerator.autocast(), context:
                return model(**inputs)

        return reference_sums(self.args, name, pairs, model, forward, with_adapter=with_adapter)

    def evaluate(
        self, eval_dataset: Any = None, *args: Any, eval_sft_dataset: Rows | None = None, **kwargs: Any
    ) -> Any:
        """``Trainer.evaluate``, of rows too.

        Args:
            eval_dataset: preference rows; None: the constructor's.
            args, kwargs: as in ``Trainer.evaluate``.
            eval_sft_dataset: SFT rows beside them.

        Raises:
            ValueError: preference rows that the constructor did not see, after training has moved the router itself:
                their reference is gone.
        """
        if eval_sft_dataset is not None:
            eval_dataset = self._data(eval_sft_dataset, eval_dataset)
        return super().evaluate(eval_dataset, *args, **kwargs)

    def data_of_rows(self, rows: Any) -> MixDataset:
        return self._data(None, rows)

    def _data(self, samples: Any, pairs: Any) -> MixDataset:
        prepare = partial(prepared_data, self.fusion, self.args, self.processing_class, None)
        if pairs is not None and hasattr(pairs, "__len__"):  # before the experts are run
            self._known_reference(tokenized_pairs(pairs, self.args, self.processing_class))
        data = cast("MixDataset", prepare(samples=samples, pairs=pairs))  # there are rows of one kind at least
        if data.pairs is not None:
            known = self._known_reference(data.pairs)
            with_adapter = self.state.global_step == 0
            name = content_name(data.pairs.sequences)
            data.reference = self._reference(name, data.pairs, with_adapter=with_adapter) if known is None else known
        return data

    def _known_reference(self, pairs: PreferencePairs) -> NDArray[np.float32] | None:
        """The sums of pairs that the constructor saw; None if they can still be computed.

        Raises:
            ValueError: neither.
        """
        for data in (self.train_dataset, self.eval_dataset):
            seen = data.pairs if isinstance(data, MixDataset) else None
            if seen is not None and seen.sequences.fingerprint == pairs.sequences.fingerprint:
                reference: NDArray[np.float32] | None = data.reference
                return reference
        if self.state.global_step and not self._new_adapter:
            raise ValueError(
                "eval_dataset: the router has moved since training began, and these rows have no log-probabilities of "
                "the reference; pass them to the constructor, as eval_dataset"
            )
        return None

    def loss_of_batch(self, scores: Scores, inputs: dict[str, Tensor]) -> tuple[Tensor, Quotients]:
        samples, pairs = (int(count) for count in inputs["counts"])
        parts = [samples, pairs, pairs]  # of the rows: samples, chosen sides, rejected sides
        alpha, beta = float(self.fusion.config.alpha), self.args.beta

        # Samples: L_SFT(s), each over its own tokens; (n_s,).
        lm, tokens = -scores.logprobs[:samples], scores.tokens[:samples]
        sft = self.args.sft_loss_weight * (lm + self.args.routing_loss_weight * scores.routing) / tokens

        # Pairs: −log σ(ℓ + bias); (n_p,).
        _, chosen, rejected = torch.split(scores.logprobs, parts)
        reference_chosen, reference_rejected = inputs["reference"].to(chosen.dtype).unbind(dim=1)
        margin = cdpo_margin(chosen, rejected, reference_chosen, reference_rejected, beta=beta)
        _, selected_chosen, selected_rejected = torch.split(scores.selected, parts)
        bias = cdpo_bias(selected_chosen, selected_rejected, beta=beta, alpha=alpha)
        cdpo = cdpo_loss(margin, bias)

        # Metrics: samples first, then pairs; one kind is padded with zeros, in both sums, in metrics of the other.
        losses, one = torch.cat([sft, cdpo]), torch.ones_like(margin)
        of_samples = {"loss_lm": lm, "loss_routing": scores.routing}
        of_pairs = {
            "loss_cdpo": cdpo,
            "rewards/chosen": beta * (chosen - reference_chosen),
            "rewards/rejected": beta * (rejected - reference_rejected),
            "rewards/margins": margin,
            "rewards/accuracies": (margin > 0).to(margin.dtype),
            "cdpo/bias": bias,
            "cdpo/bias_magnitude": bias.abs(),
            "cdpo/accuracy": (margin + bias > 0).to(margin.dtype),
        }
        quotients = {"loss": (losses, torch.ones_like(losses))}
        quotients |= {name: (pad(x, (0, pairs)), pad(tokens, (0, pairs))) for name, x in of_samples.items()}
        quotients |= {name: (pad(x, (samples, 0)), pad(one, (samples, 0))) for name, x in of_pairs.items()}
        return losses.sum(), quotients

    def count_of_batch(self, inputs: dict[str, Tensor]) -> Tensor:
        return inputs["counts"].sum()

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, count = super().get_batch_samples(*args, **kwargs)
        samples = torch.tensor(sum(int(batch["counts"][0]) for batch in batches), device=self.args.device)
        self._head_rests.samples = int(self.accelerator.gather(samples).sum())
        return batches, count
