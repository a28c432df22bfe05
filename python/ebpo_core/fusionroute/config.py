"""``FusionRouteConfig``: the router's config, references to the experts, and the defaults of decoding."""

# mypy: disable-error-code="no-untyped-call"
# No `from __future__ import annotations`: transformers validates the annotated fields of a config at run time.
import copy
from dataclasses import fields
from typing import Any, ClassVar

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from .compiled.fields import check_fields
from .context import context_length
from .decoding.routing import STORED_OPTIONS, RoutingOptions
from .keywords import unexpected

VERSION = 1
# Of transformers' configs, beside the fields: what a checkpoint's config.json may hold, and what loading sets.
_NAMES = {
    *("model_type", "name_or_path", "torch_dtype", "num_labels", "attn_implementation", "experts_implementation"),
    *("output_attentions", "quantization_config", "tie_word_embeddings", "use_cache", "tokenizer_class", "auto_map"),
    *("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id", "task_specific_params"),
}
_ROUTERS_OWN = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


class FusionRouteConfig(PreTrainedConfig):
    """Configuration of :class:`~.model.FusionRouteForCausalLM` (arXiv 2601.05106), stored as ``config.json``.

    Args:
        router_config: config of the router, a causal LM of any architecture (an object, or its dict with "model_type").
        experts: one dict per expert, as :meth:`~.experts.references.ExpertReference.to_dict` writes it, in the order
            of the route head's rows.
        vocab_size: V, the number of leading token ids that take part; by default the router's.
        max_position_embeddings: tokens that all models read, prompt and answer together; by default the router's.
        alpha, complementary, route, hysteresis, expert_prefill, expert_cache_budget: defaults of decoding, see
            :class:`~.decoding.routing.RoutingOptions`.
        compiled: None, or of compiled experts ``{"rank": r, "scale": alpha / r, "router": hash}``, see
            :mod:`~.compiled.loading`: ``experts`` are then what they were compiled from, and are not loaded.
        fusionroute_version: version of this format.

    Raises:
        TypeError: an unknown name. In a ``config.json`` one is passed over: a later transformers may have written it.
        ValueError: a value that does not fit, or a config written by a newer version of this package.
    """

    model_type = "fusionroute"
    sub_configs: ClassVar[dict[str, Any]] = {"router_config": AutoConfig}
    has_no_defaults_at_init = False

    router_config: dict[str, Any] | PreTrainedConfig | None = None
    experts: list[dict[str, Any]] | None = None
    vocab_size: int | None = None
    max_position_embeddings: int | None = None
    alpha: float | int = 1.0
    complementary: bool = True
    route: str = "argmax"
    hysteresis: float | int = 0.0
    expert_prefill: str = "lazy"
    expert_cache_budget: int | None = None
    compiled: dict[str, Any] | None = None
    fusionroute_version: int = VERSION

    def __post_init__(self, **kwargs: Any) -> None:
        for name in kwargs:
            if name not in _NAMES and not name.startswith("_"):
                raise unexpected(type(self).__name__, name, [field.name for field in fields(self)])
        if self.fusionroute_version > VERSION:
            raise ValueError(
                f"fusionroute_version is {self.fusionroute_version} and this ebpo_core reads {VERSION}: "
                "upgrade ebpo-core to the version that wrote the checkpoint"
            )
        router: Any = {} if self.router_config is None else self.router_config
        if isinstance(router, dict):
            # transformers builds a config without arguments to find out what differs from the defaults.
            kind = router.get("model_type", "llama")
            if kind not in CONFIG_MAPPING:
                raise ValueError(f"router_config has model_type {kind!r}: transformers knows no such model")
            router = CONFIG_MAPPING[kind](**{name: value for name, value in router.items() if name != "model_type"})
        self.router_config = router
        self.experts = [dict(expert) for expert in self.experts or []]
        if self.vocab_size is None:
            self.vocab_size = router.get_text_config().vocab_size
        if self.max_position_embeddings is None:
            self.max_position_embeddings = context_length(router)
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            if kwargs.get(name) is None and getattr(self, name, None) is None:
                kwargs[name] = getattr(router, name, None)
        for name in ("attn_implementation", "experts_implementation"):
            # Left out, they would be reset in the router's config, which is the very object that a loaded router uses.
            kwargs.setdefault(name, getattr(router, f"_{name}", None))
        self.compiled = check_fields(self.compiled)
        self.options()  # raises for values that do not fit
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        kind = config_dict.get("model_type", cls.model_type)
        if kind != cls.model_type:  # transformers would go on with the default router, of seven billion parameters
            raise ValueError(
                f"config.json has model_type {kind!r}: not a FusionRoute checkpoint; load it with "
                "AutoModelForCausalLM, or make a checkpoint with FusionRouteForCausalLM.from_experts"
            )
        known = {field.name for field in fields(cls)} | _NAMES
        kept = {name: value for name, value in config_dict.items() if name in known}
        if kwargs.pop("compiled", None) is False:  # as the auto classes pass it on from `from_pretrained`
            kept["compiled"] = None
        return super().from_dict(kept, **kwargs)

    @property
    def num_experts(self) -> int:
        return len(self.experts or [])

    @property
    def text_config(self) -> PreTrainedConfig:
        """The router's config, with this model's V and context: what transformers' generation and engines look at."""
        text: PreTrainedConfig = self.router_config.get_text_config()  # type: ignore[union-attr]
        shorter = context_length(text) != self.max_position_embeddings
        if text.vocab_size == self.vocab_size and not shorter:
            return text
        text = copy.copy(text)
        text.vocab_size = self.vocab_size
        if shorter:
            text.max_position_embeddings = self.max_position_embeddings
        return text

    @property
    def tie_word_embeddings(self) -> bool:
        """True if the router's LM head is its embedding matrix. Setting it changes the router's config."""
        return bool(getattr(self.router_config, "tie_word_embeddings", False))

    @tie_word_embeddings.setter
    def tie_word_embeddings(self, value: bool) -> None:
        router: Any = self.router_config
        for config in (router, router.get_text_config()):
            config.tie_word_embeddings = value

    def __getattr__(self, name: str) -> Any:
        """The router's sizes: what PEFT, DeepSpeed and engines look for in the config of any language model."""
        router = self.__dict__.get("router_config")
        if name in _ROUTERS_OWN and isinstance(router, PreTrainedConfig):
            return getattr(router.get_text_config(), name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe values, ``tie_word_embeddings`` among them, which PEFT reads there."""
        return {**super().to_dict(), "tie_word_embeddings": self.tie_word_embeddings}

    def options(self) -> RoutingOptions:
        """The stored defaults of decoding."""
        return RoutingOptions(**{name: getattr(self, name) for name in STORED_OPTIONS})


AutoConfig.register(FusionRouteConfig.model_type, FusionRouteConfig, exist_ok=True)
