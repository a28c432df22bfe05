"""The start of an engine: experts found and checked, limits set, what cannot be served refused.

vLLM calls :class:`Startup` once, in the process that builds the engine's configuration, so that every refusal is that
process' error message. The processes that run the model get the configuration as it is left here.
"""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

from vllm.logger import init_logger
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
from vllm.tokenizers import cached_tokenizer_from_config

from ebpo_core.fusionroute.config import FusionRouteConfig
from ebpo_core.fusionroute.experts.errors import explained
from ebpo_core.fusionroute.experts.export import needs_conversion
from ebpo_core.fusionroute.experts.files import checkpoint_folder, fetched_folder, weight_files
from ebpo_core.fusionroute.experts.hashes import check_sources
from ebpo_core.fusionroute.experts.naming import overridden
from ebpo_core.fusionroute.experts.references import ExpertReference

from .adapters import check_compiled
from .columns import extra_columns
from .counters import publish
from .guard import processor_name
from .plugin import COMPILED_ARCHITECTURE
from .submodels import expert_config, view
from .versions import check_version

logger = init_logger(__name__)


def known_to(startup: type, architecture: str) -> None:
    """Have vLLM call ``startup`` for models of ``architecture``."""
    MODELS_CONFIG_MAP[architecture] = startup


class Startup(VerifyAndUpdateConfig):  # type: ignore[misc]
    """vLLM's hook for what a model needs of an engine's configuration.

    Attributes of the checkpoint's config that only this reads, given by ``--hf-overrides '{"name": value}'``:

    ``expert_paths``
        where experts are now, by name: a path, or a dict of the fields of
        :class:`~ebpo_core.fusionroute.experts.references.ExpertReference` that change.
    ``verify_experts``
        false accepts experts whose weights are no longer those that the router was trained with.
    """

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Experts resolved to local folders, the vocabulary widened, the context as long as every sub-model's.

        Of a compiled checkpoint, the adapters are looked at in their place, and the experts not looked for.

        Raises:
            FileNotFoundError, OSError, ValueError: an expert is missing, changed, too narrow, or of a kind that vLLM
                does not load; or vLLM is of a version that this package does not know.
        """
        check_version()
        config: FusionRouteConfig = model_config.hf_config
        experts: list[ExpertReference] = []
        if config.compiled is None:
            experts = resolved(config, model_config.model, model_config.revision)
            config.experts = [expert.to_dict() for expert in experts]
        else:
            _start_compiled(model_config, config)
        V, longest = int(config.vocab_size or 0), int(model_config.max_model_len)
        router: Any = config.router_config
        widths = [int(router.get_text_config().vocab_size)]
        mixture = _mixture_of(view(model_config, config.router_config, model_config.model), "the router")
        for expert in experts:
            full = expert_config(expert, trust_remote_code=model_config.trust_remote_code)
            own = full.get_text_config()
            if own.vocab_size < V:
                raise ValueError(
                    f"expert {expert.name!r} has {own.vocab_size} logits, the checkpoint's vocab_size is {V}: it is "
                    "not the expert this model was trained with"
                )
            widths.append(int(own.vocab_size))
            one = view(model_config, full, str(expert.path))
            mixture = max(mixture, _mixture_of(one, f"expert {expert.name!r}"))
            positions = getattr(own, "max_position_embeddings", None) or longest
            if positions < longest and model_config.original_max_model_len is not None:
                raise ValueError(
                    f"max_model_len is {longest}, but expert {expert.name!r} has {positions} positions: "
                    f"pass --max-model-len {positions} or less"
                )
            longest = min(longest, positions)
        if longest < model_config.max_model_len:
            logger.info("max_model_len is %d, the shortest context among router and experts", longest)
            model_config.max_model_len = longest
        text = copy.copy(config.text_config)
        text.vocab_size = _width(model_config, V + extra_columns(config.num_experts), min(widths))
        model_config.hf_text_config = text
        model_config.model_arch_config = model_config.get_model_arch_config()
        # vLLM prepares its ranks for mixtures of experts if the engine's model is one; here any part may be.
        model_config.model_arch_config.num_experts = mixture

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Refuse what a composite of models cannot do; add the guard of the extra ids; open the counters.

        Raises:
            ValueError: a setting that does not go with FusionRoute, with the one to use instead.
        """
        model_config = vllm_config.model_config
        config: FusionRouteConfig = model_config.hf_config
        options = config.options()
        for name, wanted in {"route": "argmax", "hysteresis": 0}.items():
            value = getattr(options, name)
            if value != wanted:
                raise ValueError(
                    f"the checkpoint's config has {name}={value!r}, which needs a state per request that vLLM's models "
                    f"do not have: pass --hf-overrides '{json.dumps({name: wanted})}'"
                )
        for present, what in (
            (vllm_config.speculative_config, "speculative decoding"),
            (vllm_config.lora_config, "LoRA requests"),
            (model_config.enable_prompt_embeds, "prompts given as embeddings"),
            (vllm_config.parallel_config.pipeline_parallel_size > 1, "pipeline parallelism"),
            # Halves of a batch take turns inside a step, and what a step selected is kept in one place.
            (vllm_config.parallel_config.use_ubatching, "dual batch overlap"),
        ):
            if present:
                raise ValueError(f"FusionRoute in vLLM does not support {what}: start the server without it")
        names = [str(expert["name"]) for expert in config.experts or []]
        processor = processor_name(vllm_config)
        if config.compiled is not None:
            # vLLM's name for what the adapted stack does: it reads a cache that the router writes, and in a prompt
            # the tokens whose logits are wanted. Without it, vLLM would not tell the model which these are.
            vllm_config.cache_config.kv_sharing_fast_prefill = True
        others = [given for given in model_config.logits_processors or [] if given != processor]
        model_config.logits_processors = [*others, processor]
        publish(names, int(config.vocab_size or 0))


def resolved(config: FusionRouteConfig, model: str, revision: str | None) -> list[ExpertReference]:
    """The checkpoint's experts as references to local folders of safetensors, their hashes compared.

    Args:
        config: of the checkpoint, with ``expert_paths`` and ``verify_experts`` if they were given.
        model: the checkpoint's folder or hub id.
        revision: of a hub id.

    Raises:
        FileNotFoundError, OSError, ValueError: as :class:`Startup` says.
    """
    stored = [ExpertReference.from_dict(expert) for expert in config.experts or []]
    if not stored:
        raise ValueError(f"the checkpoint {model!r} names no experts: save it again from the model")
    moved = overridden(stored, getattr(config, "expert_paths", None))
    wanted = [ExpertReference.parse(expert) for expert in moved.values()]
    base = checkpoint_folder(wanted, model, revision)
    verify = bool(getattr(config, "verify_experts", True))
    return [_resolved(expert.anchored(base), verify) for expert in wanted]


def _width(model_config: Any, columns: int, readable: int) -> int:
    """The engine's vocabulary: the logits' columns, and as many more as its tokenizer has ids.

    vLLM lets these through in prompts, and penalties and log-probabilities look up a prompt's tokens among the logits:
    one behind their end would stop the engine.

    Args:
        model_config: of the engine.
        columns: of the logits, the routing's included.
        readable: ids of tokens that router and experts have an embedding of.
    """
    tokenizer: Any = cached_tokenizer_from_config(model_config)
    if tokenizer is None:  # --skip-tokenizer-init: vLLM then looks at no id
        return columns
    last = int(tokenizer.max_token_id)
    if last >= readable:
        logger.warning(
            "the tokenizer in %r has ids up to %d, and only those up to %d are tokens of router and every expert: "
            "others are read as id %d where a prompt has them",
            *(str(model_config.tokenizer), last, readable - 1, readable - 1),
        )
    return max(columns, last + 1)


def _start_compiled(model_config: Any, config: FusionRouteConfig) -> None:
    """A compiled checkpoint's adapters looked at; its model taken for the one of router and experts.

    Raises:
        FileNotFoundError, ValueError: as :func:`.adapters.check_compiled` says.
    """
    router = view(model_config, config.router_config, model_config.model)
    (architecture,) = router.hf_config.architectures[:1]
    check_compiled(config, architecture, model_config.model, model_config.revision)
    config.architectures = [COMPILED_ARCHITECTURE]


def _resolved(expert: ExpertReference, verify: bool) -> ExpertReference:
    if expert.substitutes:
        raise ValueError(
            f"expert {expert.name!r} has substitutes for tokens that it lacks (ids {', '.join(expert.substitutes)}), "
            "which vLLM's models know nothing of: use the checkpoint's own generate, or an expert that has them"
        )
    if (reason := needs_conversion(expert)) is not None:
        raise ValueError(
            f"expert {expert.name!r}: {reason}, which vLLM does not load; write a checkpoint that it does load by "
            "`fusionroute convert CHECKPOINT OUTPUT`, and serve OUTPUT"
        )
    if expert.code_hash is not None:
        raise ValueError(f"expert {expert.name!r}: its model is Python code of its own folder, which vLLM does not run")
    source = expert.source()
    with explained(expert.name, source):
        folder = fetched_folder(source, "*.json", "*.safetensors")
        weight_files(folder)  # says what is missing, and refuses pickles
        if verify and expert.hash is not None and not check_sources(expert.name, expert.hash, source):
            logger.warning(
                "expert %r was saved from a live model: its weights are not compared with those it had then",
                expert.name,
            )
    return replace(expert, path=str(folder), revision=None, subfolder=None)


def _mixture_of(model_config: Any, name: str) -> int:
    """The number of feed-forward experts that a sub-model has inside its layers, 0 for most.

    Raises:
        ValueError: it keeps a state per request other than keys and values.
    """
    (architecture,) = model_config.hf_config.architectures[:1]
    info, _ = model_config.registry.inspect_model_cls(architecture, model_config)
    if info.has_inner_state or info.is_attention_free or info.is_hybrid:
        raise ValueError(
            f"{name} is a {architecture}, with recurrent layers: FusionRoute in vLLM keeps keys and values only; "
            "use the checkpoint's own generate, or an expert with attention alone"
        )
    return int(model_config.model_arch_config.num_experts or 0)
