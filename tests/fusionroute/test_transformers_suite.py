"""transformers' own suites, for models and for ``generate``, run against a FusionRoute model of two experts."""

from __future__ import annotations

import unittest
from typing import Any

import pytest
import torch
from fusionroute_tiny import tiny_config, tiny_model
from transformers_suite import testers

from ebpo_core.fusionroute import FusionRouteConfig, FusionRouteForCausalLM
from ebpo_core.fusionroute.experts import Experts

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
ModelTesterMixin: Any
GenerationTesterMixin: Any
ModelTesterMixin, GenerationTesterMixin = testers()
EXPERTS = {"a": tiny_model("llama", 1), "b": tiny_model("qwen2", 2)}

# Tests that do not hold for FusionRoute by the beginnings of their names, and why. All others pass, or skip themselves.
EXCEPTIONS = {
    "test_correct_missing_keys": "loads the router's own checkpoint as if it were one of FusionRoute",
    "test_eager_matches_batched_and_grouped_inference": "the setting exists for routers that are mixtures, and a Llama "
    "has no experts to count; tests/fusionroute/test_families.py sets it on one that has",
    "test_generate_from_inputs_embeds": "embeddings of one model mean nothing to the others: refused",
    "test_generate_from_random_inputs_embeds": "embeddings of one model mean nothing to the others: refused",
    "test_inherits_generation_mixin": "looks at the bases of a class, not at theirs: FusionRouteForCausalLM has it",
    "test_resize_tokens_embeddings": "V stays, since the experts have no more tokens; the router alone is resized",
    "test_resize_embeddings_untied": "V stays, since the experts have no more tokens; the router alone is resized",
}


class WithExperts(FusionRouteForCausalLM):
    """A model that comes with its experts, as the suite builds models from configs alone."""

    def __init__(self, config: FusionRouteConfig) -> None:
        super().__init__(config)
        object.__setattr__(self, "_experts", Experts.load(EXPERTS))

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        return super().from_pretrained(*args, expert_paths=EXPERTS, verify_experts=False, **kwargs)


class ModelTester:
    """What the suite asks of a family: a config and inputs."""

    is_training = True
    batch_size, seq_length, num_hidden_layers, hidden_size, num_attention_heads = 3, 7, 2, 64, 4

    def __init__(self, parent: Any) -> None:
        self.parent = parent

    def get_config(self) -> FusionRouteConfig:
        references = [expert.reference.to_dict() for expert in Experts.load(EXPERTS)]
        router = tiny_config("llama", initializer_range=0.02)
        return FusionRouteConfig(router_config=router, experts=references)

    def prepare_config_and_inputs_for_common(self) -> tuple[FusionRouteConfig, dict[str, Any]]:
        ids = torch.randint(3, 200, (self.batch_size, self.seq_length))
        mask = torch.ones_like(ids)
        mask[0, 0] = 0
        return self.get_config(), {"input_ids": ids, "attention_mask": mask}


class TestFusionRoute(ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (WithExperts,)
    all_generative_model_classes = (WithExperts,)
    test_all_params_have_gradient = False  # argmax gives the route head none

    def setUp(self) -> None:
        for name, reason in EXCEPTIONS.items():
            if self._testMethodName.startswith(name):
                self.skipTest(reason)
        self.model_tester = ModelTester(self)

    def _prepare_for_class(self, inputs_dict: Any, model_class: Any, return_labels: bool = False) -> Any:
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        return {**inputs, "labels": inputs["input_ids"]} if return_labels else inputs
