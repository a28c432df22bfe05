"""``register``: vLLM's ``general_plugins`` entry point, run in each of its processes before it reads a model's config.

Nothing is imported by hand: where ebpo-core is installed beside vLLM, ``vllm serve ./my-fusionroute`` finds it.
"""

from __future__ import annotations

import logging

from .versions import REMEDY

ARCHITECTURE = "FusionRouteForCausalLM"
MODEL = "ebpo_core.fusionroute.vllm.model:FusionRouteForCausalLM"
COMPILED_ARCHITECTURE = "CompiledFusionRouteForCausalLM"
"""Of no checkpoint: the start of the engine puts it in the place of the other where a checkpoint is compiled."""
COMPILED_MODEL = f"ebpo_core.fusionroute.vllm.compiled:{COMPILED_ARCHITECTURE}"

logger = logging.getLogger(__name__)


def register() -> None:
    """Make FusionRoute's config, its checks at start and its model known to vLLM. May be called again.

    A vLLM this cannot work with is logged, not raised: whoever serves another model must not be stopped by a plugin.
    """
    try:
        import ebpo_core.fusionroute  # noqa: F401 -- its import registers the config with transformers

        from .startup import Startup, known_to

        known_to(Startup, ARCHITECTURE)
        known_to(Startup, COMPILED_ARCHITECTURE)
        from vllm import ModelRegistry
    except ImportError as error:
        logger.warning("ebpo-core cannot serve FusionRoute checkpoints in this vLLM (%s): %s", error, REMEDY)
        return
    for architecture, model in ((ARCHITECTURE, MODEL), (COMPILED_ARCHITECTURE, COMPILED_MODEL)):
        if architecture not in ModelRegistry.get_supported_archs():
            # By name: the class is imported in the processes that run it, after vLLM has chosen their device.
            ModelRegistry.register_model(architecture, model)
