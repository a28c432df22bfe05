"""Importing ``ebpo_core`` costs NumPy and nothing else; what needs more says what to install."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = "torch transformers triton trl ray vllm verl datasets accelerate peft matplotlib pandas rich tensorboard yaml"


ROOT = Path(__file__).parents[2]


def run(code: str, cwd: Path | None = None) -> str:
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_brings_numpy_only():
    loaded = run(f"import sys, ebpo_core; print(*[name for name in {HEAVY.split()} if name in sys.modules])")
    assert loaded == ""


def test_computing_brings_numpy_only():
    code = f"""
import sys, numpy, ebpo_core
ebpo = ebpo_core.EBPO()
ebpo(numpy.array([[1.0, 0.0], [0.0, 0.0]]))
ebpo_core.advantages([1.0, 0.0, 1.0], ["a", "a", "b"])
print(*[name for name in {HEAVY.split()} if name in sys.modules])
"""
    assert run(code) == ""


def test_every_public_name_exists():
    assert run("import ebpo_core; print(*[n for n in ebpo_core.__all__ if not hasattr(ebpo_core, n)])") == ""


def test_the_version_is_the_distributions():
    module, distribution = run(
        "import ebpo_core, importlib.metadata as m; print(ebpo_core.__version__, m.version('ebpo-core'))"
    ).split()
    assert module == distribution


def test_traces_are_read_and_drawn_without_a_model():
    loaded = run(
        f"import sys, ebpo_core.fusionroute.traces.page; print(*[n for n in {HEAVY.split()} if n in sys.modules])"
    )
    assert loaded in ("", "rich")


def test_a_served_model_is_asked_without_a_model():
    code = f"import sys, ebpo_core.fusionroute.vllm.client; print(*[n for n in {HEAVY.split()} if n in sys.modules])"
    assert run(code) == ""


@pytest.mark.parametrize(
    "first",
    [
        "import ebpo_core.fusionroute",
        "import ebpo_core.fusionroute; from transformers import AutoConfig as C; C.for_model('fusionroute')",
        "import ebpo_core.fusionroute; from transformers import LlamaForCausalLM",
        "from transformers import AutoModelForCausalLM; import ebpo_core.fusionroute",
        "from ebpo_core.fusionroute import FusionRouteConfig",
    ],
)
def test_importing_fusionroute_registers_it_whatever_is_imported_first(first):
    code = f"""
{first}
from transformers import AutoConfig, AutoModelForCausalLM
print(AutoModelForCausalLM._model_mapping[type(AutoConfig.for_model("fusionroute"))].__name__)
"""
    assert run(code) == "FusionRouteForCausalLM"


def test_models_import_at_the_root_of_a_checkout():
    """Its folder ``kernels`` has the name of a package that transformers looks for."""
    assert run("import ebpo_core.fusionroute as f; print(f.FusionRouteConfig.model_type)", cwd=ROOT) == "fusionroute"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="each import gets a child of one process that has torch")
def test_every_module_that_the_model_needs_can_be_imported_first():
    """Loading the auto classes imports the model, so no module that it needs may load them while it is read itself."""
    package = ROOT / "python" / "ebpo_core" / "fusionroute"
    files = [*package.glob("[a-df-z]*.py"), *package.glob("experts/[a-z]*.py")]  # evaluation needs the harness
    names = [".".join(("ebpo_core.fusionroute", *file.relative_to(package).with_suffix("").parts)) for file in files]
    assert {"ebpo_core.fusionroute.conversion", "ebpo_core.fusionroute.experts.loading"} <= set(names)
    code = f"""
import importlib, os, sys
import torch, transformers.modeling_utils
assert "transformers.models.auto.modeling_auto" not in sys.modules
for name in {names}:
    child = os.fork()
    if child == 0:
        try:
            importlib.import_module(name)
        except ImportError as error:
            print(name, error, file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        print(name)
"""
    assert run(code) == ""
