"""Checkpoints of a FusionRoute model: made from models, saved with references to the experts, loaded again."""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ebpo_core.files import write_text
from ebpo_core.models import load_model, resolve_model

from .card import model_card
from .compiled.experts import CompiledExperts
from .compiled.files import COMPILED_FOLDER, compiled_folder, copy_adapters, read_report, router_hash
from .compiled.loading import load_compiled
from .config import FusionRouteConfig
from .context import shortest_context
from .decoding.routing import STORED_OPTIONS, RoutingOptions
from .experts.experts import Experts
from .experts.files import checkpoint_folder, hub_access
from .experts.naming import overridden
from .experts.references import EXPERTS_FOLDER, ExpertReference
from .experts.remote_code import check_code, check_recorded_code, has_own_class, is_code_of_a_folder
from .experts.vocabulary import shared_vocabulary
from .families import check_router
from .hub import upload
from .keywords import check_saving, loading_arguments

if TYPE_CHECKING:
    from typing import Any as Base  # stands in front of PreTrainedModel
else:
    Base = object

logger = logging.get_logger(__name__)
_CARD = "README.md"


class CheckpointMixin(Base):  # type: ignore[misc]
    """Loading and saving of :class:`~.model.FusionRouteForCausalLM`.

    A checkpoint holds the weights ``router.*`` and ``route_head.*`` and, in ``config.json``, where each expert is and
    what its weights hashed to. Experts are copied into it only by ``save_experts=True``.
    """

    config: FusionRouteConfig
    trust_remote_code = False  # what `from_pretrained` was told, for experts that are loaded later

    @classmethod
    def from_experts(
        cls,
        router: str | os.PathLike[str] | PreTrainedModel,
        experts: Mapping[str, Any] | Sequence[Any],
        *,
        tokenizer: Any = None,
        vocab_size: int | None = None,
        substitutes: Mapping[str | int, str | int] | None = None,
        renamed_ids: Iterable[int] = (),
        dtype: str | torch.dtype | None = None,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> Any:
        """A model to start training from: the given router, a fresh route head, the given experts.

        Args:
            router: path, hub id, ``package:<name>`` or GGUF file of a causal LM, or a loaded model, which is taken over
                and not copied.
            experts: in the order of the route head's rows: what :meth:`ExpertReference.parse` takes (a path, a dict, a
                reference), or loaded models; a mapping gives them names.
            tokenizer: the router's, to compare with the experts'; by default the one in the router's folder. Experts
                whose folder holds no tokenizer are not compared.
            vocab_size: V; by default the smallest width among router and experts.
            substitutes: from tokens (or ids) that experts lack to tokens that they have, such as
                ``{"<|im_end|>": "</s>"}``. Such an expert reads the second in place of the first, and its logit of the
                first is that of the second. They are stored with its reference.
            renamed_ids: ids whose tokens may differ between the tokenizers: reserved tokens that a fine-tune renamed.
            dtype: of router and experts that are loaded here and name none; by default the router's own, or float32.
            trust_remote_code: run the Python code of experts (and their tokenizers) whose folders bring their own. A
                router needs a class of transformers.
            options: stored as defaults of decoding, see :class:`~.decoding.routing.RoutingOptions`; or arguments for
                loading the router from its path, as for ``AutoModelForCausalLM.from_pretrained``:
                ``attn_implementation``, ``quantization_config``, ``device_map`` (one device), ``revision``, ``token``,
                ``cache_dir``, ``local_files_only``, ``force_download``. Experts have theirs in their references.

        Raises:
            TypeError: a name that is none of these, a loading argument for a loaded router, or a router that is no
                causal LM: a PEFT model, a FusionRoute model, a backbone without its LM head.
            ValueError: no experts, tokenizers that disagree (the first differing token is named), a token that ending,
                padding or the chat template needs and an expert lacks, a bad reference, an expert whose code is not
                allowed, or the router's own object among the experts.
        """
        for expert in experts.values() if isinstance(experts, Mapping) else experts:
            if expert is router and isinstance(router, PreTrainedModel):
                raise ValueError(
                    "the router is one of the experts, as the same object: training would freeze or change both; "
                    "pass copy.deepcopy(router) as the expert, or a path"
                )
        if "torch_dtype" in options:  # the older name of the same
            dtype = options.pop("torch_dtype") if dtype is None else dtype
        loading = loading_arguments(options, STORED_OPTIONS, loaded=isinstance(router, PreTrainedModel))
        RoutingOptions().updated(**options)  # wrong values are found before anything is loaded
        _check_router(router)
        check_code(experts, trust_remote_code=trust_remote_code)
        # 1. Router and experts, loaded where they are not models already.
        if not isinstance(router, PreTrainedModel):
            name = None if dtype is None else str(dtype).removeprefix("torch.")
            router, loaded_tokenizer = load_model(
                os.fspath(router), dtype=name or "float32", trust_remote_code=False, **loading
            )
            tokenizer = loaded_tokenizer if tokenizer is None else tokenizer
        loaded = Experts.load(
            experts, default_dtype=dtype or router.dtype, device=router.device, trust_remote_code=trust_remote_code
        )
        if not len(loaded):
            raise ValueError("experts is empty: give at least one expert")
        # 2. One vocabulary: V leading ids, each a token of every model or with a substitute, the same in all.
        vocab_size = shared_vocabulary(
            router,
            tokenizer,
            loaded,
            vocab_size=vocab_size,
            substitutes=substitutes,
            renamed_ids=renamed_ids,
            trust_remote_code=trust_remote_code,
        )
        # 3. The model around the given router, made without weights, and a fresh route head [n, D].
        config = FusionRouteConfig(
            router_config=router.config,
            experts=[expert.reference.to_dict() for expert in loaded],
            vocab_size=vocab_size,
            max_position_embeddings=shortest_context(router.config, loaded),
            **options,
        )
        with torch.device("meta"):
            model = cls(config)
        head = nn.Linear(model.route_head.in_features, len(loaded), bias=False, dtype=torch.float32)
        nn.init.normal_(head.weight, std=0.02)
        model.router = router
        model.route_head = head.to(router.device)
        model.generation_config = router.generation_config
        if getattr(router, "hf_quantizer", None) is not None:  # it knows how to save quantised weights
            model.hf_quantizer = router.hf_quantizer
        object.__setattr__(model, "_experts", loaded)
        model.eval()
        return model

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *args: Any,
        load_experts: bool = True,
        expert_paths: Mapping[str, Any] | None = None,
        verify_experts: bool = True,
        trust_remote_code: bool | None = False,
        compiled: bool = True,
        **kwargs: Any,
    ) -> Any:
        """``PreTrainedModel.from_pretrained``, and the experts.

        Args:
            pretrained_model_name_or_path, args, kwargs: as in transformers; ``dtype`` is also that of experts whose
                reference names none.
            load_experts: False loads the router alone, e.g. to train from an expert cache; compiled experts are left
                out for good.
            expert_paths: where experts are now, by name: a path, a dict of the fields of
                :class:`~.experts.references.ExpertReference` that change, or a loaded model.
            verify_experts: False accepts experts whose weights, or code, are no longer those of the checkpoint; where
                they are compiled, a router that is no longer the one they were compiled for.
            trust_remote_code: run the Python code of experts that the checkpoint was made with it for.
            compiled: of a checkpoint whose experts are compiled, False loads the experts that they were compiled from,
                and leaves the compiled ones out for good.

        Raises:
            ValueError: an expert is missing, its weights or its code changed, its code is not allowed, or its
                vocabulary is too narrow; of compiled ones, the router has changed, an adapter is broken, or
                ``expert_paths`` or ``variant`` are given.
        """
        kwargs.setdefault("use_safetensors", True)
        trust = bool(trust_remote_code)  # the auto classes pass None on
        config = _stored_config(pretrained_model_name_or_path, kwargs)
        adapted = config.compiled if compiled and load_experts else None
        if adapted and expert_paths:
            raise ValueError(
                f"expert_paths names {list(expert_paths)}, and the checkpoint's experts are compiled, so none is "
                "loaded: leave expert_paths out, or pass compiled=False"
            )
        if adapted:
            _check_variant(kwargs)
        home: Any = pretrained_model_name_or_path
        within, revision, access = str(kwargs.get("subfolder") or ""), kwargs.get("revision"), hub_access(kwargs)
        if adapted:
            home = compiled_folder(home, revision, subfolder=within, access=access)
        elif home is not None and Path(home).is_dir():
            home = Path(home) / within
        if load_experts and not adapted:
            known = [ExpertReference.from_dict(expert) for expert in config.experts or []]
            wanted = overridden(known, expert_paths)
            check_recorded_code(wanted, trust_remote_code=trust)  # before experts are fetched
            references = [each for each in wanted.values() if isinstance(each, ExpertReference)]
            home = checkpoint_folder(references, home, revision, subfolder=within, access=access) or home
            check_code(wanted, base_dir=home, revision=revision, trust_remote_code=trust, verify=verify_experts)
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model: Any = loaded[0] if isinstance(loaded, tuple) else loaded
        model.trust_remote_code = trust
        stored = [ExpertReference.from_dict(expert) for expert in model.config.experts]
        wanted = overridden(stored, expert_paths)
        model.config.compiled = adapted
        if load_experts and not adapted:
            experts = Experts.load(
                wanted,
                base_dir=home,
                revision=revision,
                default_dtype=model.dtype,
                device=model.device,
                verify=verify_experts,
                trust_remote_code=trust,
            )
            for expert, reference in zip(experts, stored, strict=True):
                if expert.live and reference.substitutes:
                    expert.substitute({int(lacking): own for lacking, own in reference.substitutes.items()})
                if expert.vocab_size < model.config.vocab_size:
                    raise ValueError(
                        f"expert {expert.name!r} has {expert.vocab_size} logits, the checkpoint's vocab_size is "
                        f"{model.config.vocab_size}: it is not the expert this model was trained with"
                    )
            object.__setattr__(model, "_experts", experts)
            model.config.max_position_embeddings = shortest_context(model.config.router_config, experts)
            model.config.experts = [reference.to_dict() for reference in experts.references]
        else:
            # Saved elsewhere later, the references must not depend on this folder any more.
            known = [ExpertReference.parse(expert) for expert in wanted.values()]
            model.config.experts = [expert.anchored(home, missing_ok=True).to_dict() for expert in known]
        if adapted:
            references = [ExpertReference.from_dict(expert) for expert in model.config.experts]
            experts = load_compiled(model.router, adapted, references, home, verify=verify_experts)
            object.__setattr__(model, "_experts", experts)
        return loaded

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *args: Any, save_experts: bool = False, **kwargs: Any
    ) -> Any:
        """``PreTrainedModel.save_pretrained``: router, route head, config, and a model card where there is none.

        Args:
            save_directory, args, kwargs: as in transformers.
            save_experts: copy the experts into ``experts/<name>/``, so that the folder is complete by itself.

        Raises:
            TypeError: a keyword that neither knows.
            ValueError: ``save_experts`` where none are loaded; of compiled ones, ``save_experts`` or ``variant``, or
                weights that are not those of the checkpoint any more. Nothing is written then.
        """
        check_saving(kwargs, ["save_experts"])
        folder = Path(save_directory)
        experts: Experts = self.experts
        kept, kept_compiled = self.config.experts, self.config.compiled
        main = kwargs.get("is_main_process", True)
        if main:
            if isinstance(experts, CompiledExperts):
                _check_variant(kwargs)
                experts.check_unchanged(kwargs.get("state_dict") or self.state_dict())
                read_report(Path(experts.folder))
            if save_experts and not len(experts):
                raise ValueError("save_experts=True, but no experts are loaded: load the model with its experts")
            if save_experts:
                references = experts.save_into(folder)
            elif len(experts):
                references = experts.stored(folder)
                for name in experts.changed():
                    logger.warning(
                        f"expert {name!r} was changed in memory since it was loaded from "
                        f"{experts[name].reference.path!r}, to which {folder} refers: save the changed model and pass "
                        f"its folder when loading, expert_paths={{{name!r}: ...}}, or save with save_experts=True"
                    )
            else:
                references = [ExpertReference.from_dict(expert).stored(folder) for expert in kept or []]
            for reference in references:
                if reference.path is None and not isinstance(experts, CompiledExperts):
                    logger.warning(
                        f"expert {reference.name!r} was given as a model that was never saved: loading {folder} will "
                        f"need expert_paths={{{reference.name!r}: ...}}, unless it is saved with save_experts=True"
                    )
            self.config.experts = [reference.to_dict() for reference in references]
            if isinstance(experts, CompiledExperts):
                copy_adapters(experts.folder, experts.names, folder)
        try:
            result = super().save_pretrained(save_directory, *args, **kwargs)
            if main and isinstance(experts, CompiledExperts):
                self._write_compiled_config(folder)
            if main and not (folder / _CARD).exists():
                write_text(folder / _CARD, model_card(self.config, report=read_report(folder)))
        finally:
            self.config.experts, self.config.compiled = kept, kept_compiled
        return result

    def _upload_modified_files(
        self, working_dir: str | os.PathLike[str], repo_id: str, files_timestamps: Mapping[str, float], **how: Any
    ) -> Any:
        """On the way to the hub: our model card in place of transformers' empty form, and experts and adapters too."""
        folder = Path(working_dir)
        card = folder / _CARD
        if not card.exists() or "2601.05106" not in card.read_text(encoding="utf-8"):
            write_text(card, model_card(self.config, report=read_report(folder)))
        if self.config.compiled is not None:  # `save_pretrained` does so at its end, which is after an upload
            self._write_compiled_config(folder)
        return upload(folder, repo_id, files_timestamps, (EXPERTS_FOLDER, COMPILED_FOLDER), **how)

    def _write_compiled_config(self, folder: Path) -> None:
        """Note the hash of the router as it was just written, which may have been rounded to another dtype."""
        self.config.compiled = {**(self.config.compiled or {}), "router": router_hash(folder)}
        self.config.save_pretrained(folder)


def _check_variant(arguments: Mapping[str, Any]) -> None:
    """Raise a ValueError for weights under another name than those whose hash compiled experts name."""
    if arguments.get("variant") is not None:
        raise ValueError(
            f"variant={arguments['variant']!r}, and the experts are compiled: they belong to the one router whose hash "
            "is in config.json; leave variant out, and give dtype"
        )


def _stored_config(name: str | os.PathLike[str], kwargs: Mapping[str, Any]) -> FusionRouteConfig:
    """The config of a checkpoint, before anything is loaded; ``kwargs`` are those of ``from_pretrained``."""
    config = kwargs.get("config")
    if not isinstance(config, PreTrainedConfig):
        taken = ("revision", "subfolder", "token", "cache_dir", "local_files_only", "force_download")
        where = {key: kwargs[key] for key in taken if kwargs.get(key) is not None}
        config = FusionRouteConfig.from_pretrained(name if config is None else config, **where)
    stored: Any = config
    return stored  # type: ignore[no-any-return]


def _check_router(router: Any) -> None:
    """Refuse what cannot be a router, by its class or its config, before anything is loaded.

    Raises:
        TypeError: with the remedy.
    """
    if hasattr(router, "peft_config"):
        raise TypeError(
            f"router is a {type(router).__name__} with an adapter: merge it (merge_and_unload), or pass the plain "
            "model here and peft_config to the trainer"
        )
    if not isinstance(router, (str, os.PathLike, PreTrainedModel)):
        raise TypeError(f"router is a {type(router).__name__}: pass a path, a hub id, or a causal LM of transformers")
    if isinstance(router, PreTrainedModel):
        config: Any = router.config
        if is_code_of_a_folder(router):
            raise TypeError(
                f"router is a {type(router).__name__}, a class that was loaded with trust_remote_code: a checkpoint is "
                "built by a class of transformers; choose another router. An expert may have code"
            )
        if router.get_output_embeddings() is None:
            raise TypeError(f"router is a {type(router).__name__}, without an LM head: use AutoModelForCausalLM")
    else:
        source, gguf_file = resolve_model(os.fspath(router))
        if gguf_file is not None or not (Path(source) / "config.json").is_file():
            return
        values = PreTrainedConfig.get_config_dict(source)[0]
        if values.get("auto_map") and not has_own_class(values):
            raise TypeError(
                f"router={os.fspath(router)!r} is a model with Python code of its own: a checkpoint is built by a "
                "class of transformers; choose another router. An expert may have code, with trust_remote_code=True"
            )
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    if config.model_type == FusionRouteConfig.model_type:
        raise TypeError("router is a FusionRoute model: pass model.router, or load it with from_pretrained as it is")
    if config.is_encoder_decoder:
        raise TypeError(f"router is a {config.model_type} model with an encoder: pass a causal LM")
    check_router(config)
