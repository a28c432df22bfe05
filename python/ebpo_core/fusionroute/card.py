"""The model card of a checkpoint, written from its config: what it is made of, and how it is loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from ebpo_core.models import PACKAGE_PREFIX

from .experts.references import EXPERTS_FOLDER, ExpertReference, is_hub_id

_HASH_DIGITS = 12
_OPTIONS = ("vocab_size", "alpha", "complementary", "route", "hysteresis", "expert_prefill", "expert_cache_budget")

_CITATION = """```bibtex
@inproceedings{xiong2026fusionroute,
  title     = {Token-Level LLM Collaboration via FusionRoute},
  author    = {Xiong and Zhou and Zeng and Chen and Huang and Bi and Zhang and Zhao},
  booktitle = {International Conference on Machine Learning},
  year      = {2026},
  note      = {arXiv:2601.05106},
}
```"""


def model_card(config: Any, *, base_name: str | None = None, report: Mapping[str, Any] | None = None) -> str:
    """``README.md`` for a checkpoint: front matter for the hub, loading, a table of experts, options, citation.

    No path of this machine is written: an expert in a local folder is shown by the folder's name, with a note that
    whoever loads the checkpoint says where it is.

    Args:
        config: a :class:`~.config.FusionRouteConfig` as it is stored (references relative to the checkpoint).
        base_name: what the router was made from; by default what its config remembers.
        report: on compiled experts, of :func:`~.compiled.report.compare`, where there is one.
    """
    experts = [ExpertReference.from_dict(expert) for expert in config.experts or []]
    base = base_name or getattr(config.router_config, "_name_or_path", None) or None
    models = [base, *(path for expert in experts for path in (expert.path, expert.adapter))]
    bases = list(dict.fromkeys(str(path) for path in models if is_hub_id(path)))
    router = f"`{_shown(base)}`, " if base else ""
    sections = [
        _front_matter(bases),
        "# FusionRoute model",
        f"A router language model ({router}architecture `{config.router_config.model_type}`) and {len(experts)} frozen "
        "expert language models. At every token the router picks one expert and adds its own logits to the expert's "
        "([FusionRoute](https://arxiv.org/abs/2601.05106)). This repository holds the router and its routing head"
        + _where(config, experts),
        "## Use",
        _usage([] if config.compiled else experts),
        "## Experts",
        _table(experts),
    ]
    if config.compiled:
        sections += ["## Compiled experts", _compiled(config.compiled, report)]
    elif any(_missing(expert) for expert in experts):
        sections.append(
            "Experts marked *local* are folders on the machine that wrote this card, by name; tell the loader where "
            "yours are, as above. Their weights are compared with the hashes in `config.json`."
        )
    with_code = [f"`{expert.name}`" for expert in experts if expert.code_hash]
    if with_code and not config.compiled:
        sections.append(
            f"{', '.join(with_code)}: models with Python code of their own, which `trust_remote_code=True` allows to "
            "run; it is compared with the hashes in `config.json`, too."
        )
    if config.max_position_embeddings is not None:
        sections.append(
            f"Prompt and answer together may have {config.max_position_embeddings} tokens, the shortest context among "
            "the models."
        )
    options = [f"| `{name}` | `{getattr(config, name)}` |" for name in _OPTIONS]
    sections += [
        "## Decoding options",
        "Defaults stored in `config.json`; each but `vocab_size` can be given to `generate`.",
        "\n".join(["| option | value |", "|---|---|", *options]),
        "## Citation",
        _CITATION,
    ]
    return "\n\n".join(sections) + "\n"


def _where(config: Any, experts: list[ExpertReference]) -> str:
    """The end of the sentence on what the repository holds."""
    if config.compiled:
        return ", and the experts as adapters of the router; the table says what they were compiled from."
    return ", and the experts." if _complete(experts) else "; experts are loaded from where the table says."


def _compiled(compiled: Mapping[str, Any], report: Mapping[str, Any] | None) -> str:
    """What compiled experts are, and how near they come to the experts."""
    text = (
        f"Each expert is a LoRA of the router, of rank {compiled['rank']}, that reads the router's key/value cache: "
        "two forwards a token, whatever the number of experts. `from_pretrained(..., compiled=False)` loads the "
        "experts themselves."
    )
    if report is None:
        return text
    lines = ["| expert | selected | KL | agreement |", "|---|---|---|---|"]
    for name, numbers in report["experts"].items():
        kl, agreement = numbers["kl"], numbers["agreement"]
        shown = ("-", "-") if kl is None else (f"{kl:.4f}", f"{agreement:.1%}")
        lines.append(f"| {name} | {numbers['share']:.1%} | {shown[0]} | {shown[1]} |")
    fused = report["fused"]
    lines.append(f"| fused | | {fused['kl']:.4f} | {fused['agreement']:.1%} |")
    exact = fused["exact"]
    rows = f"{report['rows']} held-out rows ({report['tokens']} tokens)"
    above = f"On {rows}, beside the experts themselves: KL in nats a token, agreement of the likeliest token."
    before, after = exact["uncompiled"], exact["compiled"]
    below = f"Rows of which every token is the likeliest: {before:.1%} uncompiled, {after:.1%} compiled."
    return "\n\n".join([text, above, "\n".join(lines), below])


def _front_matter(bases: list[str]) -> str:
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags:"]
    lines += ["- fusionroute", "- token-level-routing"]
    if bases:
        lines += ["base_model:", *(f"- {json.dumps(name)}" for name in bases)]
    return "\n".join([*lines, "---"])


def _usage(experts: list[ExpertReference]) -> str:
    fields = {expert.name: _missing(expert) for expert in experts}
    paths = "".join(
        f"\n    {json.dumps(name)}: {json.dumps({field: f'path/to/{name}-{field}' for field in missing})},"
        for name, missing in fields.items()
        if missing
    )
    argument = f", expert_paths={{{paths}\n}}" if paths else ""
    if any(expert.code_hash for expert in experts):
        argument += ", trust_remote_code=True"
    return f"""```python
import ebpo_core.fusionroute  # pip install "ebpo-core[fusionroute]"; registers the architecture
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "path/or/hub-id/of/this/model"
model = AutoModelForCausalLM.from_pretrained(folder{argument})
tokenizer = AutoTokenizer.from_pretrained(folder)
inputs = tokenizer("What is 12 + 7?", return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=64, output_routing=True)
print(tokenizer.decode(output.sequences[0]), output.routing[0])
```"""


def _table(experts: list[ExpertReference]) -> str:
    lines = ["| # | name | model | adapter | revision | dtype | weights |", "|---|---|---|---|---|---|---|"]
    for number, expert in enumerate(experts):
        model = _cell(expert.path)
        if expert.subfolder:
            model += f" (`{expert.subfolder}`)"
        if expert.gguf_file:
            model += f" (`{expert.gguf_file}`)"
        if expert.quantization_config:
            model += f", {expert.quantization_config.get('quant_method', 'quantized')}"
        revisions = [revision for revision in (expert.revision, expert.adapter_revision) if revision]
        weights = "not recorded"
        if expert.hash:
            kind, _, digits = expert.hash.rpartition(":")
            weights = f"`{kind}:{digits[:_HASH_DIGITS]}`"
        adapter = _cell(expert.adapter) if expert.adapter else ""
        cells = (number, expert.name, model, adapter, ", ".join(revisions), expert.dtype or "the router's", weights)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _cell(path: str | None) -> str:
    if path is None:
        return "*local*, given as a live model"
    if is_hub_id(path):
        return f"[{path}](https://huggingface.co/{path})"
    return f"*local* `{_shown(path)}`" if _is_local(path) else f"`{_shown(path)}`"


def _is_local(path: str) -> bool:
    """True for a folder on some machine, neither on the hub, nor in the checkpoint, nor in a package."""
    return not (is_hub_id(path) or path.startswith((f"{EXPERTS_FOLDER}/", "./", PACKAGE_PREFIX)))


def _missing(expert: ExpertReference) -> list[str]:
    """The fields that the loader must be told: paths of folders that do not come along."""
    missing = ["path"] if expert.path is None or _is_local(expert.path) else []
    return missing + (["adapter"] if expert.adapter and _is_local(expert.adapter) else [])


def _complete(experts: list[ExpertReference]) -> bool:
    paths = [path for expert in experts for path in (expert.path or "", expert.adapter) if path is not None]
    return all(path.startswith((f"{EXPERTS_FOLDER}/", "./")) for path in paths)


def _shown(path: str) -> str:
    """A path without what it says of a machine: hub ids, packages and folders of the checkpoint whole, else a name."""
    if _is_local(path):
        path = PureWindowsPath(path).name if "\\" in path else PurePosixPath(path).name
    return re.sub(r"[`|\s]+", "_", path) or "?"
