"""``FusionRouteTrainer``, the base of both phases: sums over a global batch, logs, evaluation, checkpoints."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import Trainer

from ebpo_core.checkpoint import CompleteCheckpoints
from ebpo_core.fusionroute.model import FusionRouteForCausalLM

from .adapters import merged
from .batches import MixCollator, MixDataset
from .config import FusionRouteArguments
from .losses import IGNORE, label_logprobs, routing_loss_normalized, routing_loss_softmax, selected_logprobs
from .metrics import Quotients, Tally, routing_quotients
from .preparation import fusion_model

if TYPE_CHECKING:
    import os

# transformers is untyped here; type checkers see a base with every attribute.
_Base: Any = Trainer


class Scores(NamedTuple):
    """Log-probabilities and routing of one batch of B rows, see :class:`~.batches.MixCollator`."""

    logprobs: Tensor  # [B], Σ log π_θ over the labels, with gradient
    tokens: Tensor  # [B], number of labels
    routing: Tensor  # [n_s], Σ_{t∈S} of the routing loss of the samples, with gradient
    selected: Tensor  # [B], Σ log π_{I_t} of the selected experts over the labels, no gradient
    weights: Tensor  # [B, K - 1, n], W h
    quotients: Quotients  # of routing metrics, [B] each


class FusionRouteTrainer(CompleteCheckpoints, _Base):  # type: ignore[misc]
    """Base of the two trainers; :meth:`loss_of_batch` is what differs between them.

    The loss of a global batch is a sum divided by a count (label tokens, or samples and pairs) over all ranks and
    accumulation steps: ``transformers.Trainer`` passes that count to ``compute_loss`` as ``num_items_in_batch``.
    """

    args: FusionRouteArguments

    def __init__(
        self,
        model: Any,
        args: FusionRouteArguments,
        train: MixDataset | None,
        evaluation: MixDataset | dict[str, MixDataset] | None,
        tokenizer: Any,
        **kwargs: Any,
    ) -> None:
        for name in ("compute_metrics", "compute_loss_func", "preprocess_logits_for_metrics", "model_init"):
            if kwargs.get(name) is not None:
                raise ValueError(f"{name}: {type(self).__name__} has a loss and metrics of its own; leave it out")
        pad = getattr(tokenizer, "pad_token_id", None)
        super().__init__(
            model=model,
            args=args,
            data_collator=kwargs.pop("data_collator", None) or MixCollator(0 if pad is None else pad),
            train_dataset=train,
            eval_dataset=evaluation,
            processing_class=tokenizer,
            **kwargs,
        )
        # Our loss is divided by the count of the global batch, whatever the model's forward does with such arguments.
        self.model_accepts_loss_kwargs = True
        self._experts = [reference["name"] for reference in self.fusion.config.experts or []]
        self._tallies = {"train": Tally(self._experts), "eval": Tally(self._experts)}

    @property
    def fusion(self) -> FusionRouteForCausalLM:
        """The FusionRoute model under DDP, FSDP and PEFT."""
        return fusion_model(self.accelerator.unwrap_model(self.model, keep_torch_compile=False))

    @abstractmethod
    def loss_of_batch(self, scores: Scores, inputs: dict[str, Tensor]) -> tuple[Tensor, Quotients]:
        """The sum of the batch's losses, and metrics of its ``n_s + n_p`` items, "loss" among them."""

    @abstractmethod
    def count_of_batch(self, inputs: dict[str, Tensor]) -> Tensor:
        """The batch's part of what the sum over the global batch is divided by."""

    # ----------------------------------------------------------------------------------------------------------- loss

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | None:
        if not batch_samples:
            return None
        count = torch.stack([self.count_of_batch(batch).to(device) for batch in batch_samples]).sum()
        total: Tensor = self.accelerator.gather(count).sum()
        return total

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        count: Any = num_items_in_batch
        if count is None:
            count = self._get_num_items_in_batch([inputs], self.args.device)
        scores = self.score(model, inputs)
        loss, quotients = self.loss_of_batch(scores, inputs)
        if self.accelerator.num_processes > 1:
            # DDP waits for a gradient of every parameter, also where no row of this rank uses the route head.
            loss = loss + 0.0 * scores.weights.sum()
        # Metrics, [items, metrics, 2]; of routing those of samples and chosen sides, which are the first rows.
        items = int(inputs["counts"].sum())
        routing = {name: (top[:items], below[:items]) for name, (top, below) in scores.quotients.items()}
        tally = self._tallies["train" if model.training else "eval"]
        matrix = tally.matrix({**quotients, **routing}, items)
        if not model.training:
            # In the order of the items, since the last batch's repetitions are cut off behind the last item.
            matrix = self.accelerator.gather_for_metrics(
                torch.empty_like(matrix).index_copy(0, inputs["order"], matrix)
            )
        tally.add(matrix)
        # Ranks average their gradients, and this is a share of the global sum.
        loss = loss / count * self.accelerator.num_processes
        return (loss, {}) if return_outputs else loss

    def score(self, model: Any, inputs: dict[str, Tensor]) -> Scores:
        """Run the router (and, for the "normalized" routing loss, the experts) on a batch."""
        keep = inputs["labels"].shape[1]
        output = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            logits_to_keep=keep,
            router_only=True,
            use_cache=False,
        )
        # Position t predicts label t + 1: of what stands at labels the first column goes, of predictions the last.
        labels, informative = inputs["labels"][:, 1:], inputs["informative"][:, 1:]
        weights, expert_logprobs = output.routing_weights[:, :-1], inputs["expert_logprobs"][:, 1:]  # (B, K - 1, n)
        logprobs = label_logprobs(output.logits[:, :-1], labels).sum(dim=1)  # (B,)
        # The routing loss of the samples, the first n_s rows: at the P positions of S, then summed by row.
        samples = int(inputs["counts"][0])
        routing = logprobs.new_zeros(samples)
        if samples:
            mask = informative[:samples]
            values = self._routing_loss(inputs, mask, weights[:samples], expert_logprobs[:samples], labels[:samples])
            routing = routing.to(values.dtype).index_add(0, mask.nonzero()[:, 0], values)
        return Scores(
            logprobs=logprobs,
            tokens=(labels != IGNORE).sum(dim=1),
            routing=routing,
            selected=selected_logprobs(weights, expert_logprobs).sum(dim=1),
            weights=weights,
            quotients=routing_quotients(weights, expert_logprobs, labels, informative, self._experts),
        )

    def _routing_loss(
        self, inputs: dict[str, Tensor], mask: Tensor, weights: Tensor, expert_logprobs: Tensor, labels: Tensor
    ) -> Tensor:
        """At the P positions of ``mask``, ``[P]``."""
        if self.args.routing_loss == "softmax":
            return routing_loss_softmax(weights[mask], expert_logprobs[mask])
        logits = self._expert_logits(inputs, mask)
        V = int(self.fusion.config.vocab_size or 0)
        return routing_loss_normalized(weights[mask], logits, labels[mask], vocab_size=V)

    def _expert_logits(self, inputs: dict[str, Tensor], mask: Tensor) -> list[Tensor]:
        """Every expert's logits ``[P, V_i]`` at the P positions of ``mask`` ``[n_s, K - 1]``."""
        # An expert runs on the rows alone that have such a position.
        rows = mask.any(dim=1).nonzero()[:, 0]
        keep = mask.shape[1] + 1
        found = []
        for expert in self.fusion.experts:
            if not len(rows):
                found.append(torch.zeros(0, expert.vocab_size, device=mask.device))
                continue
            output = expert(
                input_ids=inputs["input_ids"][rows].to(expert.device),
                attention_mask=inputs["attention_mask"][rows].to(expert.device),
                logits_to_keep=keep,
                use_cache=False,
            )
            logits = output.logits[:, -keep:-1]  # (rows, K - 1, V_i)
            found.append(logits[mask[rows].to(logits.device)].to(mask.device))
        return found

    def _prepare_input(self, data: Any) -> Any:
        # Under DeepSpeed, Trainer would round these float inputs to bfloat16; a sum of log-probabilities loses units.
        if isinstance(data, Tensor) and data.is_floating_point():
            return data.to(self.args.device)
        return super()._prepare_input(data)

    # ----------------------------------------------------------------------------------------------- logs, evaluation

    @abstractmethod
    def data_of_rows(self, rows: Any) -> MixDataset:
        """Rows of the kind that the constructor takes as ``eval_dataset``, with the experts' columns."""

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Trainer's own, of rows too: ``evaluate`` takes what the constructor takes."""
        if eval_dataset is None or isinstance(eval_dataset, (str, MixDataset)):
            return super().get_eval_dataloader(eval_dataset)
        # Trainer keeps the loader of persistent workers, whatever its data is.
        kept: dict[str, Any] = getattr(self, "_eval_dataloaders", {})
        self._eval_dataloaders: dict[str, Any] = {}
        try:
            return super().get_eval_dataloader(self.data_of_rows(eval_dataset))
        finally:
            self._eval_dataloaders = kept

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """Trainer's own, of rows too."""
        data = test_dataset if isinstance(test_dataset, MixDataset) else self.data_of_rows(test_dataset)
        return super().get_test_dataloader(data)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            tally = self._tallies["train"]
            tally.sums = self.accelerator.reduce(tally.sums.to(self.args.device), reduction="sum")
            logs.update({name: value for name, value in tally.results().items() if name != "loss"})
            tally.clear()
        super().log(logs, *args, **kwargs)

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, None, None]:  # noqa: ARG002
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        return loss.detach(), None, None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        tally = self._tallies["eval"]
        tally.clear()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        # The loss too: Trainer's own is a mean of the batches' means.
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in tally.results().items()})
        return output

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def save_merged(self, folder: str | os.PathLike[str]) -> None:
        """Save a FusionRoute checkpoint, also of a PEFT model: a copy of it with the adapter merged into the router."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if hasattr(model, "merge_and_unload"):
            model = merged(model)
        if self.args.should_save:
            model.save_pretrained(folder)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
