"""One vocabulary for all: tokenizers of router and experts compared id by id, and a fingerprint of a vocabulary."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from typing import Any

from .errors import explained, require
from .references import ExpertReference, Source

# Any of them makes a folder one with a tokenizer.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "spiece.model")


def check_tokenizers(
    named: Mapping[str, Any], vocab_size: int | None = None, *, renamed_ids: Iterable[int] = ()
) -> None:
    """Raise where two tokenizers give one id two different tokens.

    Compared are the ids below ``vocab_size`` that both define. An id that only one defines is padding or an added token
    that the other never emits. End-of-sequence ids may differ: a chat model often ends its turn with another token of
    the same vocabulary than the base model does.

    Args:
        named: from names of models to their tokenizers.
        vocab_size: V, the number of leading ids that take part in the fusion; None: all.
        renamed_ids: ids that are not compared: a fine-tune gave a reserved token another name.

    Raises:
        ValueError: the first differing id, both tokens and both models; or a renamed id that has one name, or none.
    """
    renamed = set(renamed_ids)
    names: dict[int, set[str]] = {index: set() for index in renamed}
    seen: dict[int, tuple[str, str]] = {}  # the token, and who defined it first: enough to compare every pair
    for name, tokenizer in named.items():
        for index, token in _tokens(tokenizer, vocab_size):
            if index in renamed:
                names[index].add(token)
                continue
            other, first = seen.setdefault(index, (token, name))
            if token != other:
                raise ValueError(
                    f"tokenizers of {first!r} and {name!r} disagree at id {index}: {other!r} against {token!r}; "
                    "FusionRoute needs one vocabulary: router and experts must come from one model family, or share a "
                    "tokenizer. Pass a smaller vocab_size if they differ only in tokens added at the end, or "
                    f"renamed_ids=[{index}] if one of them renamed a reserved token"
                )
    for index, found in names.items():
        if len(named) > 1 and len(found) < 2:
            what = f"is {found.pop()!r} in all tokenizers" if found else "is a token of none of the tokenizers"
            raise ValueError(f"renamed_ids names {index!r}, which {what}: leave it out")


def fingerprint(tokenizer: Any, vocab_size: int | None = None) -> str:
    """A hash of the (id, token) pairs below ``vocab_size``, the same in every process: ``sha256:tokens:<hex>``."""
    digest = hashlib.sha256()
    for index, token in _tokens(tokenizer, vocab_size):
        digest.update(f"{index} {token!r}\n".encode())
    return f"sha256:tokens:{digest.hexdigest()}"


def load_tokenizer(
    reference: ExpertReference, base_dir: str | os.PathLike[str] | None = None, *, trust_remote_code: bool = False
) -> Any:
    """The tokenizer beside an expert's weights (an adapter's own, if its folder has one), or None.

    Args:
        reference: of the expert.
        base_dir: the checkpoint's folder, where relative paths are looked up.
        trust_remote_code: run the code of a tokenizer that brings its own.

    Returns:
        The tokenizer; None if the folder or repository has none, or the model was given live and never saved.

    Raises:
        FileNotFoundError: a folder that does not exist.
        OSError: a repository that is neither in reach nor in the local cache.
    """
    if reference.path is None:
        return None
    adapter = reference.adapter_source(base_dir)
    if adapter is not None and _has_tokenizer(reference.name, adapter):
        return _load(reference.name, adapter, trust_remote_code)
    source = reference.source(base_dir)
    return _load(reference.name, source, trust_remote_code) if _has_tokenizer(reference.name, source) else None


def _tokens(tokenizer: Any, vocab_size: int | None) -> list[tuple[int, str]]:
    pairs = ((index, token) for token, index in tokenizer.get_vocab().items())
    return sorted(pair for pair in pairs if vocab_size is None or pair[0] < vocab_size)


def _has_tokenizer(expert: str, source: Source) -> bool:
    if source.gguf_file:
        return True
    if source.folder is not None:
        return any((source.folder / name).is_file() for name in TOKENIZER_FILES)
    found = [_in_repository(source, name) for name in ("tokenizer_config.json", *TOKENIZER_FILES)]
    if None in found and True not in found:
        raise OSError(
            f"expert {expert!r}: cannot tell whether {source.path!r} at revision {source.revision or 'main'!r} has a "
            "tokenizer: the hub is out of reach and the local cache has none. Fetch it once, or name a local folder"
        )
    return True in found


def _in_repository(source: Source, name: str) -> bool | None:
    """True if a repository has a file; None if the hub cannot be asked."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    path = f"{source.subfolder}/{name}" if source.subfolder else name
    try:
        hf_hub_download(source.path, path, revision=source.revision)
    except LocalEntryNotFoundError:
        return None
    except EntryNotFoundError:
        return False
    return True


def _load(expert: str, source: Source, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    options: dict[str, Any] = {"revision": source.revision, "subfolder": source.subfolder}
    options["trust_remote_code"] = trust_remote_code
    if source.gguf_file:
        require("gguf", expert, f"gguf_file={source.gguf_file!r}")
        options["gguf_file"] = source.gguf_file
    with explained(expert, source):
        return AutoTokenizer.from_pretrained(source.path, **options)
