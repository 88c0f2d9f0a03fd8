"""Split federated training as one plain loop of transformers and peft: a model per device, with the hosts' LoRA shared.

Written from protocol.md section 5 alone; nothing of the split code is used. Every device has its own copy of the layers
that it holds itself; a layer that hosts compute for several devices is one set of parameters in all their models.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from edgelam_fl.config import RunConfig
from edgelam_fl.model.adapter import Adapter
from edgelam_fl.model.index import layer_number
from edgelam_fl.model.source import ModelSource
from edgelam_fl.tasks.base import Unit
from tests.fleet import plain_loss, plain_model, plain_optimizer

Batches = Mapping[str, Sequence[Sequence[Unit]]]  # device -> steps -> micro-batches


class Reference:
    def __init__(
        self, source: ModelSource, config: RunConfig, start: Adapter, kept: Mapping[str, tuple[int, int]]
    ) -> None:
        """`kept`: per device, the first layer that hosts compute and the first layer after them."""
        self.config, self.kept = config, kept
        self.devices = sorted(kept)
        self.models: dict[str, Any] = {name: plain_model(source, config, start) for name in self.devices}
        self.shared: dict[str, torch.nn.Parameter] = {}
        self.corrections: Mapping[str, Adapter] = {}
        self.own: dict[str, dict[str, torch.nn.Parameter]] = {name: {} for name in self.devices}
        for device, model in self.models.items():
            for name, parameter in list(model.named_parameters()):
                parameter.requires_grad_(".lora_" in name and self._learns(device, name))
                if ".lora_" not in name:
                    continue
                if self.crosses(device, name):
                    module, _, leaf = name.rpartition(".")
                    model.get_submodule(module)._parameters[leaf] = self.shared.setdefault(name, parameter)
                else:
                    self.own[device][name] = parameter
        self.site = plain_optimizer([p for p in self.shared.values() if p.requires_grad], config)
        self.ends = {
            device: plain_optimizer([p for p in own.values() if p.requires_grad], config)
            for device, own in self.own.items()
            if any(p.requires_grad for p in own.values())
        }

    def crosses(self, device: str, name: str) -> bool:
        first, last = self.kept[device]
        return first <= (layer_number(name) or 0) < last

    def _learns(self, device: str, name: str) -> bool:
        first, last = self.kept[device]
        layer = layer_number(name) or 0
        part = "front" if layer < first else "back" if layer >= last else "hosts"
        return part in self.config.lora.train

    # ---------------------------------------------------------------- steps

    def corrected_joint(self, batches: Batches, step: int, corrections: Mapping[str, Adapter]) -> None:
        """Makes a step in which each device adds its correction to the gradient of what it alone trains (SCAFFOLD)."""
        self.corrections = corrections
        self.joint(batches, 1, step)

    def joint(self, batches: Batches, steps: int, first: int = 0) -> None:
        for step in range(first, first + steps):
            counts = {device: sum(unit.count for unit in batches[device][step]) for device in self.devices}
            union = sum(counts.values())
            parts = {device: self._backward(device, batches[device][step], union) for device in self.devices}
            for name, parameter in self.shared.items():
                crossing = [device for device in self.devices if self.crosses(device, name)]
                found = [parts[device][name] for device in crossing if parts[device][name] is not None]
                total = found[0] if found else None
                for part in found[1:]:
                    total = total + part
                labels = sum(counts[device] for device in crossing)
                parameter.grad = total if total is None or labels == union else total * (union / labels)
            for device in self.devices:
                self._scale_own(device, union / counts[device])
            self._clip([*self.shared.values(), *(p for own in self.own.values() for p in own.values())])
            for optimizer in (self.site, *self.ends.values()):
                optimizer.step()
            self._clear()

    def sequential(self, batches: Batches, steps: int, first: int = 0) -> None:
        for step in range(first, first + steps):
            order = list(range(len(self.devices)))
            random.Random(f"{self.config.run.seed}/order/{step}").shuffle(order)
            for index in order:
                device = self.devices[index]
                units = batches[device][step]
                parts = self._backward(device, units, sum(unit.count for unit in units))
                for name, parameter in self.shared.items():
                    parameter.grad = parts[name]
                self._clip([*self.shared.values(), *self.own[device].values()])
                self.site.step()
                if device in self.ends:
                    self.ends[device].step()
                self._clear()

    def _backward(self, device: str, units: Sequence[Unit], divisor: int) -> dict[str, torch.Tensor | None]:
        """Returns the gradients of the shared parameters from one device's micro-batches; its own parameters keep theirs in `.grad`."""
        for unit in units:
            (plain_loss(self.models[device], unit) / divisor).backward()
        parts = {}
        for name, parameter in self.shared.items():
            parts[name], parameter.grad = parameter.grad, None
        return parts

    def _scale_own(self, device: str, factor: float) -> None:
        for parameter in self.own[device].values():
            if parameter.grad is not None and factor != 1.0:
                parameter.grad.mul_(factor)
        for name, array in self.corrections.get(device, {}).items():
            held = {**self.shared, **self.own[device]}
            parameter = held[name.removesuffix(".weight") + ".default.weight"]
            parameter.grad = parameter.grad + torch.from_numpy(array)

    def _clip(self, parameters: list[torch.nn.Parameter]) -> None:
        if self.config.optimizer.clip == "global":
            torch.nn.utils.clip_grad_norm_(parameters, self.config.optimizer.max_norm)

    def _clear(self) -> None:
        for model in self.models.values():
            model.zero_grad(set_to_none=True)

    # ---------------------------------------------------------------- results

    def site_adapter(self) -> Adapter:
        return _arrays({name: p for name, p in self.shared.items() if p.requires_grad})

    def own_adapter(self, device: str) -> Adapter:
        return _arrays({name: p for name, p in self.own[device].items() if p.requires_grad})


def _arrays(parameters: Mapping[str, torch.nn.Parameter]) -> Adapter:
    return {name.replace(".default.", "."): p.detach().numpy().copy() for name, p in parameters.items()}
