"""An adapter that trains: the LoRA of one or more stages, its optimizer, and what the optimizer's moments belong to.

A device has one for its ends, a host one for its site, or (copies) one for each device. Knows gradients and steps;
knows nothing about who computed a gradient or when a step is due.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from edgelam_fl.errors import ProtocolError
from edgelam_fl.model import adapter as adapters
from edgelam_fl.model.stage import Stage
from edgelam_fl.wire import edgelam_pb2 as pb

Gradients = Sequence[torch.Tensor | None]


class Trainee:
    def __init__(self, stages: Sequence[Stage], *, own: bool = False) -> None:
        """`own`: a set of parameters of its own, so that several trainees share the stages (copies)."""
        self.stages = list(stages)
        self._sets = [stage.new_adapter_set() if own else stage.adapter_parameters for stage in stages]
        self.named = {name: p for one in self._sets for name, p in one.items()}
        self.parameters: list[torch.nn.Parameter] = []  # those that learn, in the order of the stages' names
        self.names: list[str] = []
        self.optimizer: torch.optim.Optimizer | None = None
        self._settings: pb.Optimizer | None = None
        self._moments_of: tuple[Any, ...] = ()

    def use(self) -> None:
        """Puts this adapter into the stages."""
        for stage, one in zip(self.stages, self._sets, strict=True):
            if stage.adapter_parameters is not one:
                stage.use(one)

    def start(self, tensors: Mapping[str, np.ndarray], trains: Callable[[int | None], bool], plan: pb.Plan) -> bool:
        """Takes a round's first adapter. Returns whether the moments go on: they do from the very adapter they belong to.

        Raises ProtocolError where a tensor is missing or shaped otherwise.
        """
        self.use()
        flags = (plan.lora.train_front, plan.lora.train_hosts, plan.lora.train_back, plan.optimizer.name)
        given = {name: tensors[name] for name in self.named if name in tensors}
        continues = (adapters.digest(given), flags) if plan.optimizer.keep != "always" else ("", flags)
        for stage in self.stages:
            stage.load_adapter(dict(tensors))
            stage.set_trainable(trains)
        self.names = [name for name, p in self.named.items() if p.requires_grad]
        self.parameters = [self.named[name] for name in self.names]
        warm = self.optimizer is not None and continues == self._moments_of
        if not warm:
            self.optimizer = make_optimizer(self.parameters, plan.optimizer)
        self._settings = plan.optimizer
        return warm

    def finish(self, plan: pb.Plan) -> adapters.Adapter:
        """The trained tensors, as the round leaves them; what the next round's moments go by."""
        flags = (plan.lora.train_front, plan.lora.train_hosts, plan.lora.train_back, plan.optimizer.name)
        self._moments_of = (adapters.digest(self.adapter()) if plan.optimizer.keep != "always" else "", flags)
        return {name: _array(self.named[name]) for name in self.names}

    def adapter(self) -> adapters.Adapter:
        return {name: _array(parameter) for name, parameter in self.named.items()}

    # ---------------------------------------------------------------- a step

    def set_gradients(self, gradients: Gradients) -> None:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient

    def clear(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def squared_norm(self) -> pb.StepReady:
        """Of the gradient that is set, for `clip = "global"`; summed in float64, whatever the order of stages."""
        total = sum(float(p.grad.double().square().sum()) for p in self.parameters if p.grad is not None)
        return pb.StepReady(squared_norm=total if math.isfinite(total) else 0.0, finite=math.isfinite(total))

    def step(self, number: int, scale: float = 1.0) -> None:
        """One optimizer step at the learning rate of the phase's step `number`; the gradients are gone after it."""
        assert self._settings is not None
        if self.optimizer is None:
            return
        if scale != 1.0:
            for parameter in self.parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(scale)
        if self._settings.clip == "stage":
            torch.nn.utils.clip_grad_norm_(self.parameters, self._settings.max_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self._settings.lrs[number]
        self.optimizer.step()
        self.clear()


def make_optimizer(parameters: list[torch.nn.Parameter], settings: pb.Optimizer) -> torch.optim.Optimizer | None:
    """AdamW without weight decay; None where nothing trains."""
    if settings.name != "adamw":
        raise ProtocolError(f"optimizer {settings.name!r} is not known here; known: adamw")
    return torch.optim.AdamW(parameters, weight_decay=0.0) if parameters else None


def judge(parts: Sequence[pb.StepReady], max_norm: float) -> pb.StepApply:
    """clip = "global": one scale for all stages, from the norm over all of them, as torch's clip_grad_norm_ has it."""
    norm = math.sqrt(sum(part.squared_norm for part in parts))
    return pb.StepApply(scale=min(1.0, max_norm / (norm + 1e-6)), skip=not all(part.finite for part in parts))


def _array(parameter: torch.nn.Parameter) -> np.ndarray:
    return parameter.detach().numpy().copy()
