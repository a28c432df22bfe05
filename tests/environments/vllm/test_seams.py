"""Every name, member and signature that the plugin takes from vLLM, looked up in sources that need not be importable.

The sources are those of the installed vLLM. ``VLLM_SOURCE=/path/to/an/unpacked/wheel`` looks into those of another
version, whose compiled parts need not run here.
"""

from __future__ import annotations

import ast
import os
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

import ebpo_core.fusionroute.vllm as plugin
from ebpo_core.fusionroute.vllm.versions import REMEDY, SUPPORTED, check_version

OURS = Path(plugin.__path__[0])


def _sources() -> Path:
    given = os.environ.get("VLLM_SOURCE")
    if given:
        return Path(given) / "vllm"
    spec = find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


VLLM = _sources()


@cache
def tree(module: str) -> ast.Module:
    """The syntax tree of a module, such as ``vllm.config``."""
    path = VLLM.parent.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    assert file.exists(), f"there is no {module}"
    return ast.parse(file.read_text(encoding="utf-8"))


@cache
def names(module: str) -> set[str]:
    """What a module binds, wherever in it; strings, too, since ``vllm`` itself imports by a table of names."""
    found: set[str] = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
            found |= names(f"{module}.{node.module}" if node.level else str(node.module))
        elif isinstance(node, ast.ImportFrom | ast.Import):
            found |= {one.asname or one.name for one in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
    return found


def classes(module: str, name: str) -> list[ast.ClassDef]:
    """A class and those of its bases that are in its module."""
    here = {node.name: node for node in ast.walk(tree(module)) if isinstance(node, ast.ClassDef)}
    assert name in here, f"{module} has no class {name}"
    found, waiting = [], [name]
    while waiting:
        node = here.get(waiting.pop())
        if node is not None and node not in found:
            found.append(node)
            waiting += [base.id for base in node.bases if isinstance(base, ast.Name)]
    return found


def members(module: str, name: str) -> set[str]:
    """Methods, fields, and what methods assign to ``self`` (or to the object that ``from_...`` makes)."""
    found: set[str] = set()
    for one in classes(module, name):
        for node in ast.walk(one):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
    return found


def parameters(module: str, path: str) -> list[str]:
    """Names of the parameters of ``function`` or ``Class.method``."""
    *owner, name = path.split(".")
    bodies = [one.body for one in classes(module, owner[0])] if owner else [tree(module).body]
    for body in bodies:
        for node in body:
            if isinstance(node, ast.FunctionDef) and node.name == name:
                return [one.arg for one in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    raise AssertionError(f"{module} has no {path}")


def test_every_imported_name_is_there() -> None:
    found = 0
    for file in sorted(OURS.glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "vllm":
                for one in node.names:
                    assert one.name in names(node.module), f"{file.name}: from {node.module} import {one.name}"
                    found += 1
    assert found > 25


FIRST, SECOND = "vllm.v1.sample.logits_processor.interface", "vllm.v1.worker.gpu.sample.logits_processor.interface"
LINEAR = "vllm.model_executor.layers.linear"
EMBEDDING = "vllm.model_executor.layers.vocab_parallel_embedding"
MEMBERS = {
    (FIRST, "BatchUpdate"): "batch_size removed added moved",
    (FIRST, "MoveDirectionality"): "UNIDIRECTIONAL SWAP",
    (FIRST, "LogitsProcessor"): "validate_params is_argmax_invariant update_state apply",
    (SECOND, "LogitsProcessor"): "validate_params add_request apply_staged_writes apply",
    (SECOND, "LogitsContext"): "idx_mapping_np seq_lens_upper_bound_np",
    (SECOND, "LogitsProcRequestState"): "all_token_ids prefill_len",
    ("vllm.v1.worker.gpu.buffer_utils", "StagedWriteTensor"): "gpu",
    ("vllm.v1.worker.gpu.buffer_utils", "UvaBackedTensor"): "np",
    ("vllm.config.vllm", "VllmConfig"): "use_v2_model_runner get_quantization_config compute_hash model_config "
    "cache_config scheduler_config parallel_config compilation_config quant_config load_config speculative_config "
    "lora_config",
    ("vllm.config.model", "ModelConfig"): "hf_config hf_text_config model revision quantization trust_remote_code "
    "max_model_len original_max_model_len logits_processors enable_prompt_embeds model_arch_config "
    "get_model_arch_config get_sliding_window registry _verify_quantization maybe_untie_word_embeddings "
    "is_submodel_config tokenizer get_vocab_size",
    ("vllm.config.cache", "CacheConfig"): "kv_sharing_fast_prefill sliding_window",
    ("vllm.config.parallel", "ParallelConfig"): "pipeline_parallel_size use_ubatching",
    ("vllm.config.scheduler", "SchedulerConfig"): "max_num_batched_tokens",
    ("vllm.config.compilation", "CompilationConfig"): "static_forward_context",
    ("vllm.config.model_arch", "ModelArchitectureConfig"): "num_experts",
    ("vllm.forward_context", "ForwardContext"): "attn_metadata",
    ("vllm.v1.attention.backends.utils", "KVSharingFastPrefillMetadata"): "logits_indices_padded num_logits_indices",
    ("vllm.model_executor.layers.attention.attention", "Attention"): "layer_name impl kv_sharing_target_layer_name",
    (LINEAR, "LinearBase"): "quant_method tp_rank",
    (LINEAR, "ColumnParallelLinear"): "input_size_per_partition output_partition_sizes",
    (LINEAR, "RowParallelLinear"): "input_size_per_partition output_partition_sizes",
    (LINEAR, "QKVParallelLinear"): "output_sizes",
    (EMBEDDING, "VocabParallelEmbedding"): "shard_indices embedding_dim tp_size quant_method",
    (EMBEDDING, "VocabParallelEmbeddingShardIndices"): "org_vocab_start_index num_org_elements",
    ("vllm.model_executor.models.registry", "_ModelRegistry"): "register_model get_supported_archs inspect_model_cls",
    ("vllm.model_executor.models.registry", "_ModelInfo"): "has_inner_state is_attention_free is_hybrid",
    ("vllm.model_executor.models.utils", "WeightsMapper"): "orig_to_new_prefix get_rename_mapper",
    ("vllm.model_executor.layers.quantization.base_config", "QuantizationConfig"): "get_name apply_vllm_mapper",
    ("vllm.tokenizers.protocol", "TokenizerLike"): "max_token_id",
    ("vllm.sampling_params", "SamplingParams"): "allowed_token_ids logit_bias stop_token_ids prompt_logprobs",
}


@pytest.mark.parametrize(("module", "name"), MEMBERS, ids=[f"{module}.{name}" for module, name in MEMBERS])
def test_every_member_is_there(module: str, name: str) -> None:
    assert set(MEMBERS[module, name].split()) <= members(module, name)


SIGNATURES = {
    (FIRST, "LogitsProcessor.__init__"): ["self", "vllm_config", "device", "is_pin_memory"],
    (FIRST, "LogitsProcessor.update_state"): ["self", "batch_update"],
    (FIRST, "LogitsProcessor.apply"): ["self", "logits"],
    (SECOND, "LogitsProcessor.__init__"): ["self", "vllm_config", "req_states"],
    (SECOND, "LogitsProcessor.validate_params"): ["cls", "sampling_params"],
    (SECOND, "LogitsProcessor.add_request"): ["self", "req_idx", "sampling_params"],
    (SECOND, "LogitsProcessor.apply_staged_writes"): ["self"],
    (SECOND, "LogitsProcessor.apply"): ["self", "logits", "ctx"],
    ("vllm.model_executor.models.config", "VerifyAndUpdateConfig.verify_and_update_config"): ["vllm_config"],
    ("vllm.model_executor.models.config", "VerifyAndUpdateConfig.verify_and_update_model_config"): ["model_config"],
    (LINEAR, "LinearMethodBase.apply"): ["self", "layer", "x", "bias"],
    ("vllm.model_executor.models.registry", "_ModelRegistry.register_model"): ["self", "model_arch", "model_cls"],
    ("vllm.model_executor.models.registry", "_ModelRegistry.inspect_model_cls"): [
        "self",
        "architectures",
        "model_config",
    ],
}


@pytest.mark.parametrize(("module", "path"), SIGNATURES, ids=[f"{module}.{path}" for module, path in SIGNATURES])
def test_every_signature_is_what_the_plugin_offers(module: str, path: str) -> None:
    assert parameters(module, path) == SIGNATURES[module, path]


def test_what_is_called_with_names_takes_them() -> None:
    assert {"vllm_config", "prefix"} <= set(parameters("vllm.model_executor.model_loader.utils", "initialize_model"))
    assert {"lm_head", "hidden_states"} <= set(
        parameters("vllm.model_executor.layers.logits_processor", "LogitsProcessor.forward")
    )
    assert {"parameter", "value"} <= set(parameters("vllm.exceptions", "VLLMValidationError.__init__"))
    loader = classes("vllm.model_executor.model_loader.default_loader", "DefaultModelLoader")[0]
    (fields,) = [node for node in loader.body if isinstance(node, ast.ClassDef) and node.name == "Source"]
    found = [node.target.id for node in fields.body if isinstance(node, ast.AnnAssign)]  # type: ignore[union-attr]
    assert found[:2] == ["model_or_path", "revision"]
    assert {"prefix", "fall_back_to_pt"} <= set(found)


def test_both_runners_call_the_guard_as_it_expects() -> None:
    """In the second runner, the order that counting relies on: a step's tokens are there before requests are added,
    those of others are written over after that, and steps without requests go that way, too."""
    runner = ast.unparse(next(one for one in classes("vllm.v1.worker.gpu.model_runner", "GPUModelRunner")))
    adding = runner[runner.index("def add_requests") : runner.index("def update_requests")]
    order = ["self.sampler.add_request(", "self.req_states.apply_staged_writes()", "self.sampler.apply_staged_writes()"]
    places = [adding.index(one) for one in order]
    assert places == sorted(places)
    step = runner[runner.index("def execute_model") :]
    assert step.index("self.add_requests(") < step.index("total_num_scheduled_tokens == 0")
    sampler = ast.unparse(classes("vllm.v1.worker.gpu.sample.sampler", "Sampler")[0])
    assert "processor.apply(logits, ctx)" in sampler
    kept = "".join(ast.unparse(tree("vllm.v1.worker.gpu.input_batch")).split())
    assert re.search(r"is_chunked_prefilling=seq_len<prefill_len", kept)
    frontend = ast.unparse(tree("vllm.v1.engine.input_processor"))
    assert "use_v2_model_runner" in frontend


def test_the_entry_point_is_the_one_that_vllm_reads() -> None:
    from importlib.metadata import entry_points

    assert "vllm.general_plugins" in names("vllm.plugins")
    (ours,) = [one for one in entry_points(group="vllm.general_plugins") if one.name == "fusionroute"]
    assert ours.value == "ebpo_core.fusionroute.vllm.plugin:register"


def test_the_version_is_one_that_the_plugin_knows() -> None:
    text = (VLLM / "_version.py").read_text(encoding="utf-8")
    found = re.search(r"version = '(\d+)\.(\d+)", text)
    assert found is not None
    assert (int(found[1]), int(found[2])) in SUPPORTED


def test_another_version_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm

    from ebpo_core.fusionroute.vllm.startup import Startup

    check_version()
    for version in ((0, 31, 2), (0, 34, 0), (0, 0, "dev")):
        monkeypatch.setattr(vllm, "__version_tuple__", version)
        monkeypatch.setattr(vllm, "__version__", ".".join(map(str, version)))
        with pytest.raises(
            ValueError, match=r"in vLLM 0\.32 and 0\.33, this is 0\.\d+\.\w+: pip install 'vllm>="
        ) as error:
            Startup.verify_and_update_model_config(None)
        assert str(error.value).endswith(REMEDY)
