"""Errors of the libraries that load an expert, with the expert's name, what was asked for, and what can be done."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

if TYPE_CHECKING:
    from .references import Source

EXTRA = 'pip install "ebpo-core[fusionroute]"'


def require(package: str, expert: str, what: str) -> None:
    """Raise an ImportError with the remedy where a package is missing."""
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"expert {expert!r}: {what} needs the package {package!r}: {EXTRA}") from error


@contextmanager
def explained(expert: str, source: Source | None = None) -> Iterator[None]:
    """A block whose ImportError, OSError, ValueError and SafetensorError name the expert and the remedy."""
    try:
        yield
    except ImportError as error:
        raise ImportError(f"expert {expert!r}: {error}\nInstall what is named, or {EXTRA}") from error
    except OSError as error:
        if source is None or source.folder is not None:
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else OSError
            raise kind(f"expert {expert!r}: {error}") from error
        asked = f"{source.path!r} at revision {source.revision or 'main'!r}"
        raise OSError(
            f"expert {expert!r} ({asked}): {error}\nCheck its path and revision; without the hub in reach fetch it "
            "once into the local cache, or name a local folder instead"
        ) from error
    except ValueError as error:
        raise ValueError(f"expert {expert!r}: {error}") from error
    except SafetensorError as error:
        raise ValueError(f"expert {expert!r}: broken safetensors: {error}; fetch or save them again") from error


def check_complete(report: Mapping[str, Any], path: str) -> None:
    """Raise a ValueError unless every list in ``report``, of tensors by the problem they had, is empty."""
    for problem, found in report.items():
        if found:
            raise ValueError(
                f"the weights in {path!r} do not fit the model, {problem.replace('_', ' ')}: "
                f"{sorted(map(str, found))[:5]}; save them again, from the model that the config describes"
            )
