"""``generate``: transformers' own, with lazy caches, tokens from the kernels, and a record of the routing."""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import math
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.utils import logging

from ebpo_core.kernels import select_add_argmax, select_add_sample

from .compat import CACHE
from .compiled.experts import check_options
from .decoding.cache import FusionRouteCache
from .decoding.draftable import check_croppable, check_draft_tokens, check_drafts
from .decoding.drafts import decode
from .decoding.recorder import RoutingRecorder
from .decoding.routing import OPTION_NAMES, RoutingOptions, permitted_rows
from .families import check_cached
from .keywords import check_generation_config

if TYPE_CHECKING:
    from typing import Any as GenerationMixin  # typed for models of one class each; here the model is a mixin's
else:
    from transformers import GenerationMixin

logger = logging.get_logger(__name__)

_KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass
class _Call:
    """One call of ``generate``: what it asked for beyond transformers' own arguments."""

    model: Any
    options: RoutingOptions
    recorder: RoutingRecorder | None
    draft_tokens: int | Literal["auto"] | None = None
    past: int = 0  # columns of a cache that are not among the prompt's


# Not in `model_kwargs`: transformers hands those to assistant models too. Per thread, hence safe side by side.
_calls: ContextVar[tuple[_Call, ...]] = ContextVar("fusionroute_calls", default=())


def current_call(model: Any) -> _Call | None:
    """The call of ``generate`` that this forward of ``model`` belongs to."""
    return next((call for call in reversed(_calls.get()) if call.model is model), None)


class FusionRouteGenerationMixin(GenerationMixin):  # type: ignore[misc]
    """The parts of :class:`~.model.FusionRouteForCausalLM` that ``generate`` needs."""

    def generate(
        self,
        inputs: Tensor | None = None,
        *args: Any,
        output_routing: bool = False,
        draft_tokens: int | Literal["auto"] | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' ``generate`` with all its modes and arguments, and these:

        Args:
            inputs, args, kwargs: as in ``GenerationMixin.generate``.
            alpha, complementary, route, hysteresis, allowed_experts, forced_expert, expert_prefill,
            expert_cache_budget: see :class:`~.decoding.routing.RoutingOptions`; by default the config's.
            output_routing: return a ``ModelOutput`` whose ``routing`` holds one
                :class:`~.traces.trace.RoutingTrace` per returned sequence: which expert wrote each token, its weight,
                whether the token is not its own argmax.
            draft_tokens: the router writes so many tokens ahead, and each expert that it selected among them verifies
                them in one chunk: the same tokens in fewer forwards of the experts, where the router often agrees with
                the sum. "auto" adapts the number to what is accepted. None, or 1: no drafts. For greedy decoding and
                sampling with a cache and no processor but temperature, top-k, top-p and min-p; see
                :mod:`~.decoding.drafts`.

        Greedy decoding and sampling (temperature, top-k, top-p, min-p) take their tokens from
        :mod:`ebpo_core.kernels` when nothing needs the logits themselves; the fused logits are not written then.
        Greedy tokens are the same either way, draws are equal in distribution but not token for token.

        Raises:
            ValueError: options that are no options, or that do not go together; before anything has run.
        """
        check_draft_tokens(draft_tokens, kwargs)
        check_generation_config(args[0] if args else kwargs.get("generation_config"), OPTION_NAMES)
        check_generation_config(self.generation_config, OPTION_NAMES)
        given = {name: kwargs.pop(name) for name in OPTION_NAMES if name in kwargs}
        options = self.config.options().updated(**given)
        if self.compiled is not None:
            check_options(options)
        permitted_rows(options, self.experts.names)  # wrong names are found before the router reads the prompt
        recorder = RoutingRecorder() if output_routing else None
        prompt = inputs if inputs is not None else kwargs.get("input_ids")
        past = 0
        if prompt is not None:
            self._check_readable(prompt)
            past = max(0, _columns(prompt, kwargs) - prompt.shape[1])
        token = _calls.set((*_calls.get(), _Call(self, options, recorder, draft_tokens, past)))
        try:
            result = super().generate(inputs, *args, **kwargs)
        finally:
            _calls.reset(token)
        if recorder is not None:
            if prompt is None:
                prompt = result.sequences[:, :1]  # transformers began with a BOS
            first = _columns(prompt, kwargs) - 1
            result["routing"] = recorder.traces(self.experts.names, result, prompt.shape[1], first)
        return result

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Not supported: continuous batching has a cache of its own, which no expert could follow."""
        raise NotImplementedError("generate_batch (continuous batching): use generate, which takes padded batches")

    def _prepare_generated_length(self, generation_config: Any, *, input_ids_length: int, **kwargs: Any) -> Any:
        """transformers' own, at most the shortest context among the models."""
        kwargs["input_ids_length"] = input_ids_length
        result = super()._prepare_generated_length(generation_config, **kwargs)
        call, context = current_call(self), self.config.max_position_embeddings
        past = 0 if call is None else call.past
        if context is None or result.max_length + past <= context:
            return result
        if input_ids_length + past >= context:
            raise ValueError(
                f"input_ids has {input_ids_length + past} columns, and the shortest context among the models is "
                f"{context}, the answer included: shorten the prompt"
            )
        logger.warning(
            f"generation ends at {context} tokens, the shortest context among the models, not at "
            f"{result.max_length + past}"
        )
        result.max_length = context - past
        return result

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """transformers makes the router's cache, of the kind asked for; the experts' lazy caches stand beside it.

        Here ``generation_config`` is this call's own, with all that was given in whatever way, and with the defaults.
        """
        call = current_call(self)
        if call is not None and call.recorder is not None:
            if generation_config.guidance_scale not in (None, 1):
                raise ValueError(
                    f"output_routing with guidance_scale={generation_config.guidance_scale}: the forwards without the "
                    "prompt select experts of their own; leave one of the two out"
                )
            _check_ends(model_kwargs.get("attention_mask"))
            call.recorder.end_tokens = generation_config._eos_token_tensor
            generation_config.return_dict_in_generate = True
            if generation_config.num_beams > 1:
                generation_config.output_scores = True  # transformers returns the beams' indices with the scores only
        for tokens in (generation_config._pad_token_tensor, generation_config._eos_token_tensor):
            if tokens is not None:
                self._check_readable(tokens)
        given = model_kwargs.get(CACHE)
        drafts = None if call is None else call.draft_tokens
        if drafts is not None:
            check_drafts(drafts, args[0], generation_config, model_kwargs)
        result = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get(CACHE)
        if given is None and isinstance(cache, Cache):
            check_cached(self.router, self.experts)
            model_kwargs[CACHE] = FusionRouteCache(cache, self._with_caches)
        if drafts is not None and isinstance(model_kwargs[CACHE], FusionRouteCache):  # forward refuses others
            check_croppable(drafts, model_kwargs[CACHE], self.experts)
        options = _options_of(self)
        if cache is None and options.hysteresis and options.route == "sample":
            raise ValueError(
                f"hysteresis is {options.hysteresis} and use_cache is False: with route='sample' the experts that were "
                "drawn before are kept in the cache; leave use_cache on, or hysteresis at 0"
            )
        return result

    def _check_readable(self, ids: Tensor) -> None:
        self.experts.check_readable(ids, self.config.router_config.get_text_config().vocab_size)

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Greedy decoding and sampling: from the kernels where that is the same, else transformers' own loop."""
        call = current_call(self)
        if call is not None and call.recorder is not None:
            stopping_criteria = call.recorder.watching(stopping_criteria)
        if call is not None and call.draft_tokens is not None:
            draws = _filters_of(logits_processor)
            if synced_gpus or isinstance(draws, type):
                what = f"a {draws.__name__}" if isinstance(draws, type) else "synced_gpus=True"
                raise ValueError(
                    f"draft_tokens={call.draft_tokens!r} with {what}: drafts take temperature, top_k, top_p and min_p, "
                    "one process for a model; leave draft_tokens out"
                )
            return decode(
                self, input_ids, draws, stopping_criteria, generation_config, call, streamer=streamer, **model_kwargs
            )
        filters = None if synced_gpus else self._kernel_filters(logits_processor, generation_config, model_kwargs)
        if filters is None:
            return super()._sample(
                input_ids,
                logits_processor,
                stopping_criteria,
                generation_config,
                synced_gpus=synced_gpus,
                streamer=streamer,
                **model_kwargs,
            )
        B, device = len(input_ids), input_ids.device
        seed = torch.randint(2**63 - 1, (B,), device=device) if generation_config.do_sample else None
        options = _options_of(self)
        pad = generation_config._pad_token_tensor
        stops_at_eos = any(hasattr(criteria, "eos_token_id") for criteria in stopping_criteria)
        running = torch.ones(B, dtype=torch.bool, device=device)
        # The prompt: logits of the router and of the experts selected at its last position.
        model_kwargs["fuse"] = False
        outputs = self._prefill(input_ids, generation_config, model_kwargs)
        while True:
            model_kwargs = self._update_model_kwargs_for_generation(outputs, model_kwargs)
            # The next token of each row, [B]; rows that have ended get padding.
            rows = None if model_kwargs.get("active_rows") is None else running.nonzero()[:, 0]
            tokens = _next_tokens(
                outputs, rows, options.alpha, self.config.vocab_size, seed, input_ids.shape[1], filters
            )
            del outputs
            if rows is not None:
                tokens = torch.full((B,), int(pad), device=device).index_copy_(0, rows, tokens.to(device))
            tokens = tokens.to(device)
            input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
            if streamer is not None:
                streamer.put(tokens.cpu())
            # Which rows go on; the others' experts rest from now on.
            running = running & ~stopping_criteria(input_ids, None)
            if not bool(running.any()):
                break
            if stops_at_eos and not bool(running.all()):
                model_kwargs["active_rows"] = running
            # One column more.
            step = self.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **model_kwargs)
            outputs = self(**step, return_dict=True)
        if streamer is not None:
            streamer.end()
        if generation_config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(**{"sequences": input_ids, CACHE: model_kwargs.get(CACHE)})  # type: ignore[arg-type]
        return input_ids

    def _kernel_filters(
        self, processors: LogitsProcessorList, generation_config: Any, model_kwargs: dict[str, Any]
    ) -> dict[str, Any] | None:
        """The kernels' arguments that stand for the processors; None where the logits themselves are needed."""
        mask = model_kwargs.get("attention_mask")
        wanted = ("output_scores", "output_logits", "output_attentions", "output_hidden_states", "prefill_chunk_size")
        dtypes = {self.router.dtype, *(expert.model.dtype for expert in self.experts)}
        if (
            any(getattr(generation_config, name, None) for name in wanted)
            or not model_kwargs.get("use_cache")
            or not _options_of(self).complementary
            or _options_of(self).alpha <= 0  # the kernels multiply an expert's minus infinity like any number
            or not dtypes <= set(_KERNEL_DTYPES)
            or self.device.type == "mps"  # its loop reads the stop flag one step late, for speed
            or (mask is not None and not bool(mask[:, -1].all()))  # no expert where a prompt ends in padding
        ):
            return None
        filters = _filters_of(processors)
        return None if isinstance(filters, type) else filters


_FILTERS: dict[type, Callable[[Any], tuple[str, Any]]] = {
    TemperatureLogitsWarper: lambda warper: ("temperature", float(warper.temperature)),
    TopKLogitsWarper: lambda warper: ("top_k", int(warper.top_k)),
    TopPLogitsWarper: lambda warper: ("top_p", float(warper.top_p)),
    MinPLogitsWarper: lambda warper: ("min_p", float(warper.min_p)),
}


def _filters_of(processors: LogitsProcessorList) -> dict[str, Any] | type:
    """The kernels' arguments that stand for the processors, or the class of one that none stands for."""
    filters: dict[str, Any] = {}
    order = list(_FILTERS)
    for processor in processors:
        kind = type(processor)
        # The kernels filter in transformers' own order, always keep one token, not more, and leave no chance to others.
        keeps_one = getattr(processor, "min_tokens_to_keep", 1) == 1
        if kind not in order or not keeps_one or getattr(processor, "filter_value", -math.inf) != -math.inf:
            return kind
        order = order[order.index(kind) + 1 :]
        name, value = _FILTERS[kind](processor)
        filters[name] = value
    return filters


def _next_tokens(
    outputs: Any,
    rows: Tensor | None,
    alpha: float,
    vocab_size: int,
    seed: Tensor | None,
    position: int,
    filters: dict[str, Any],
) -> Tensor:
    """The next token of each running row, ``[rows]``, from logits that were never summed in memory."""
    router, ids = outputs.router_logits[:, -1], outputs.expert_ids[:, -1]
    if rows is not None:
        router, ids = router[rows], ids[rows]
        seed = None if seed is None else seed[rows]
    chosen = outputs.expert_logits.at_last(len(router))
    if seed is None:
        return select_add_argmax(router, ids, chosen, alpha=alpha, vocab_size=vocab_size).token_ids
    return select_add_sample(
        router, ids, chosen, seed=seed, step=position, alpha=alpha, vocab_size=vocab_size, **filters
    ).token_ids


def _check_ends(mask: Tensor | None) -> None:
    """Raise a ValueError for a mask, ``[B, T]``, whose last column is padding in some row."""
    if mask is not None and not bool(mask[:, -1].all()):
        row = int((mask[:, -1] == 0).nonzero()[0])
        raise ValueError(
            f"output_routing and a prompt whose row {row} ends in padding, where no expert is selected: pad on the "
            "left, padding_side='left'"
        )


def _options_of(model: Any) -> RoutingOptions:
    call = current_call(model)
    options: RoutingOptions = model.config.options() if call is None else call.options
    return options


def _columns(prompt: Tensor, kwargs: dict[str, Any]) -> int:
    """Columns before the first new token, those of a cache that was passed in included."""
    mask, cache = kwargs.get("attention_mask"), kwargs.get(CACHE)
    if mask is not None:
        return int(mask.shape[1])
    past = 0 if cache is None else cache.get_seq_length()
    # Like transformers: either the whole conversation is passed again, or only what is new.
    return int(prompt.shape[1] if prompt.shape[1] > past else past + prompt.shape[1])
