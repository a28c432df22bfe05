"""The keys of a large prior in a file of their own, an ``.npz`` beside the JSON that refers to it. Needs NumPy alone.

In the JSON of such a state, ``"keys"`` is the reference::

    {"file": "ebpo_prior-1c291ca3.npz", "format": "ebpo-core/keys", "version": 1,
     "bytes": 10800732, "crc32": 472452259}

and the file holds the arrays that :mod:`ebpo_core.state` lists, integers as narrow as their values allow. The name ends
in the checksum of the content, so a JSON file never refers to what another one wrote. ``numpy.load`` reads it, without
pickle.
"""

from __future__ import annotations

import io
import re
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ebpo_core.files import write_bytes
from ebpo_core.state import ARRAYS

if TYPE_CHECKING:
    from numpy.typing import NDArray

FORMAT = "ebpo-core/keys"
VERSION = 1


def write_keys(json_file: Path, keys: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """Write the arrays of keys beside ``json_file``, whole or not at all, and return the reference for the JSON."""
    buffer = io.BytesIO()
    np.savez(buffer, **{name: _narrow(array) for name, array in keys.items()})  # type: ignore[arg-type]
    content = buffer.getvalue()
    checksum = zlib.crc32(content)
    name = f"{json_file.stem}-{checksum:08x}.npz"
    write_bytes(json_file.with_name(name), content)
    return {"file": name, "format": FORMAT, "version": VERSION, "bytes": len(content), "crc32": checksum}


def read_keys(json_file: Path, reference: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """The arrays of keys that a reference in ``json_file`` names.

    Raises:
        ValueError: the file is not beside ``json_file``, was cut or changed, or was written by a newer release; or the
            reference is none.
    """
    name, version = reference.get("file"), reference.get("version")
    if reference.get("format") != FORMAT or not isinstance(name, str) or Path(name).name != name:
        raise ValueError(
            f"{str(json_file)!r} refers to keys by {dict(reference)!r}, which is no reference of this package"
        )
    if version != VERSION:
        raise ValueError(
            f"{str(json_file)!r} has keys of version {version!r} and this ebpo_core reads {VERSION}: upgrade ebpo-core "
            "to the version that wrote it"
        )
    file = json_file.with_name(name)
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        raise ValueError(  # not FileNotFoundError: the prior itself is there, and must not be taken for none
            f"{str(json_file)!r} keeps its keys in {name!r}, which is not beside it: copy both files"
        ) from None
    if len(content) != reference.get("bytes") or zlib.crc32(content) != reference.get("crc32"):
        raise ValueError(
            f"{str(file)!r} has {len(content)} bytes with the checksum {zlib.crc32(content)}, and {json_file.name} "
            f"expects {reference.get('bytes')} with {reference.get('crc32')}: it is damaged, use another checkpoint"
        )
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in ARRAYS if name in arrays}
    except (ValueError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{str(file)!r} holds no arrays ({error}): it is damaged, use another checkpoint") from None


def is_reference(keys: Any) -> bool:
    """True for what :func:`write_keys` returned, as JSON gives it back."""
    return isinstance(keys, Mapping) and "file" in keys


def remove_others(json_file: Path, kept: Iterable[str]) -> None:
    """Remove the key files of ``json_file`` but those in ``kept``: of what stood there before, once it is replaced."""
    form = re.compile(re.escape(json_file.stem) + r"-[0-9a-f]{8}\.npz")
    for file in json_file.parent.glob("*.npz"):
        if form.fullmatch(file.name) and file.name not in set(kept):
            file.unlink(missing_ok=True)


def _narrow(array: NDArray[Any]) -> NDArray[Any]:
    """Integers in the narrowest type that holds them all."""
    if array.dtype.kind == "f" or not array.size:
        return array
    fits = (np.uint8, np.uint16, np.int32)  # all of them, in their order, within intp, uintp or int64
    low, high = int(array.min()), int(array.max())
    kinds = (kind for kind in fits if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max)
    return array.astype(next(kinds, array.dtype))
