"""Silence of other libraries on a command's screen: what is not ours and what nobody there can act on.

Only named messages and bars are silenced, and only in the commands: the libraries' other warnings and all errors are
shown, and a program that imports ``ebpo_core`` keeps its own settings.
"""

from __future__ import annotations

import logging
import os


def quiet_imports() -> None:
    """Settings that the libraries read when they are imported; imports none of them."""
    # PEFT imports bitsandbytes where it is installed, which then warns that a kernel for CPUs was not downloaded.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # Bars of reading a file of rows; HF_DATASETS_DISABLE_PROGRESS_BARS=0 shows them.
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def hide_loading_bars() -> None:
    """Hide transformers' bars of loading and saving weights, not those of downloads; imports transformers."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars  # type: ignore[attr-defined]
    from transformers.utils import logging as transformers_logging

    downloads_shown = not are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if downloads_shown:  # transformers has just hidden them too
        enable_progress_bars()
