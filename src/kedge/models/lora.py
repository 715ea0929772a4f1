"""Low-rank adapters on a frozen trunk (Hu et al. 2021), through the `peft` package."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers.pytorch_utils import Conv1D

from kedge.models.load import seeded_weights

MARK = "lora_"


def add_adapters(model: Any, rank: int, seed: int) -> Any:
    """Freeze a sequence classifier but for its score head and give every linear map of its trunk an adapter.

    The adapters start at zero, so that the model says what it did; `seed` fixes their random half. Raises
    `ModuleNotFoundError` where `peft` is not installed.
    """
    from peft import LoraConfig, inject_adapter_in_model

    transposed = any(isinstance(part, Conv1D) for part in model.base_model.modules())  # GPT-2's linear maps
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", fan_in_fan_out=transposed)
    seeded_weights(seed, lambda: inject_adapter_in_model(config, model.base_model))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(MARK in name or name.startswith("score."))
    return model.eval()


def merged(model: Any) -> Any:
    """The model with its adapters added into the weights they adapt; a model without any is left as it is."""
    if not any(MARK in name for name, _ in model.named_parameters()):
        return model
    from peft.tuners.lora import LoraLayer

    for name, layer in [(name, part) for name, part in model.named_modules() if isinstance(part, LoraLayer)]:
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    del model.base_model.peft_config
    return model


def adapted_policy(model: Any, rank: int, seed: int) -> Any:
    """Freeze a language model and give every linear map of its trunk an adapter that starts at zero."""
    adapted = add_adapters(model, rank, seed)
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_(MARK in name)
    return adapted


class WithoutAdapters:
    """A policy as it is with its adapters off: the reference that shares the policy's weights."""

    def __init__(self, policy: Any) -> None:
        self._policy = policy
        self.config = policy.config

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        from peft.tuners.lora import LoraLayer

        layers = [part for part in self._policy.modules() if isinstance(part, LoraLayer)]
        for layer in layers:
            layer.enable_adapters(False)
        try:
            return self._policy(*arguments, **named)
        finally:
            for layer in layers:
                layer.enable_adapters(True)

    def eval(self) -> WithoutAdapters:
        self._policy.eval()
        return self

    def parameters(self) -> Iterator[Any]:
        found: Iterator[Any] = self._policy.parameters()
        return found
