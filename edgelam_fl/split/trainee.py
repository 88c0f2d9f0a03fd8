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
from edgelam_fl.model.stage import LoraSettings, Stage
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
        self._prox_mu = 0.0
        self._start: list[torch.Tensor] = []  # the parameters as the round began, with prox_mu
        self._correction: list[torch.Tensor | None] = []  # of each parameter's gradient, where the round has any
        self._is_pulled = False  # whether the gradient that is set has the pull to the start and the correction
        self.lr_sum = 0.0  # of the learning rates of the round's steps

    def use(self) -> None:
        """Puts this adapter into the stages."""
        for stage, one in zip(self.stages, self._sets, strict=True):
            if stage.adapter_parameters is not one:
                stage.use(one)

    def start(
        self,
        tensors: Mapping[str, np.ndarray],
        trains: Callable[[int | None], bool],
        plan: pb.Plan,
        prox_mu: float = 0.0,
        correction: Mapping[str, np.ndarray] = {},
    ) -> bool:
        """Takes a round's first adapter. Returns whether the moments go on: they do from the very adapter they belong to.

        A factor that the plan freezes keeps its moments, untouched, for as long as the others keep theirs. `prox_mu`: how
        strongly the steps are pulled back to this adapter. `correction`: what is added to the gradient of each step. Raises
        ProtocolError where a tensor is missing or shaped otherwise.
        """
        self.use()
        given = {name: tensors[name] for name in self.named if name in tensors}
        continues = _moments_belong_to(given, plan)
        for stage in self.stages:
            stage.load_adapter(dict(tensors))
            stage.set_trainable(trains)
        in_optimizer = [p for p in self.named.values() if p.requires_grad]
        for name, parameter in self.named.items():
            if _frozen(name, plan.lora):
                parameter.requires_grad_(False)
        self.names = [name for name, p in self.named.items() if p.requires_grad]
        self.parameters = [self.named[name] for name in self.names]
        warm = self.optimizer is not None and continues == self._moments_of
        if not warm:
            self.optimizer = make_optimizer(in_optimizer, plan.optimizer)
        self._settings = plan.optimizer
        self._prox_mu = prox_mu
        self._start = [p.detach().clone() for p in self.parameters] if prox_mu else []
        self._correction = [self._checked(name, correction) for name in self.names] if correction else []
        self.lr_sum = 0.0
        return warm

    def _checked(self, name: str, correction: Mapping[str, np.ndarray]) -> torch.Tensor | None:
        found, wanted = correction.get(name), self.named[name]
        if found is None:
            return None
        if found.dtype != np.float32 or found.shape != wanted.shape:
            raise ProtocolError(
                f"the correction of {name} is {found.dtype} {list(found.shape)}; allowed: float32 {list(wanted.shape)}"
            )
        return torch.from_numpy(found.copy())

    def finish(self, plan: pb.Plan) -> adapters.Adapter:
        """The trained tensors, as the round leaves them; what the next round's moments go by."""
        self._moments_of = _moments_belong_to(self.adapter(), plan)
        return {name: _array(self.named[name]) for name in self.names}

    def adapter(self) -> adapters.Adapter:
        return {name: _array(parameter) for name, parameter in self.named.items()}

    # ---------------------------------------------------------------- a step

    def set_gradients(self, gradients: Gradients) -> None:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient

    def clear(self) -> None:
        self._is_pulled = False
        for parameter in self.parameters:
            parameter.grad = None

    def squared_norm(self) -> pb.StepReady:
        """Of the gradient that is set, for `clip = "global"`; summed in float64, whatever the order of stages."""
        self._pull()
        total = sum(float(p.grad.double().square().sum()) for p in self.parameters if p.grad is not None)
        return pb.StepReady(squared_norm=total if math.isfinite(total) else 0.0, finite=math.isfinite(total))

    def step(self, number: int, scale: float = 1.0) -> None:
        """One optimizer step at the learning rate of the phase's step `number`; the gradients are gone after it."""
        assert self._settings is not None
        if self.optimizer is None:
            return
        self._pull()
        if scale != 1.0:
            for parameter in self.parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(scale)
        if self._settings.clip == "stage":
            torch.nn.utils.clip_grad_norm_(self.parameters, self._settings.max_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self._settings.lrs[number]
        self.optimizer.step()
        self.lr_sum += self._settings.lrs[number]
        self.clear()

    def _pull(self) -> None:
        """What the aggregation adds to the gradient, once a step, before any clipping.

        FedProx (arXiv 1812.06127): the gradient of (mu/2)||w - w_start||^2. SCAFFOLD (arXiv 1910.06378): c - c_i.
        """
        if self._is_pulled:
            return
        self._is_pulled = True
        gradients = [p.grad for p in self.parameters]  # beside a start and a correction for each, or for none
        for parameter, gradient, start in zip(self.parameters, gradients, self._start, strict=False):
            if gradient is not None:
                gradient.add_(parameter.detach() - start, alpha=self._prox_mu)
        for gradient, correction in zip(gradients, self._correction, strict=False):
            if gradient is not None and correction is not None:
                gradient.add_(correction)


def _frozen(name: str, lora: pb.Lora) -> bool:
    """Whether a tensor is a factor that does not learn in this round."""
    return (lora.freeze_a and name.endswith(".lora_A.weight")) or (lora.freeze_b and name.endswith(".lora_B.weight"))


def _moments_belong_to(adapter: adapters.Adapter, plan: pb.Plan) -> tuple[Any, ...]:
    """What has to be the same again for the moments to go on. With keep = "always", not the adapter nor what is frozen."""
    lora, optimizer = plan.lora, plan.optimizer
    same: tuple[Any, ...] = (lora.train_front, lora.train_hosts, lora.train_back, optimizer.name)
    if optimizer.keep == "always":
        return same
    return (*same, lora.freeze_a, lora.freeze_b, adapters.digest(adapter))


def make_optimizer(parameters: list[torch.nn.Parameter], settings: pb.Optimizer) -> torch.optim.Optimizer | None:
    """AdamW without weight decay, or SGD without momentum; None where nothing trains."""
    if settings.name not in ("adamw", "sgd"):
        raise ProtocolError(f"optimizer {settings.name!r} is not known here; known: adamw, sgd")
    if not parameters:
        return None
    return torch.optim.SGD(parameters) if settings.name == "sgd" else torch.optim.AdamW(parameters, weight_decay=0.0)


def judge(parts: Sequence[pb.StepReady], max_norm: float) -> pb.StepApply:
    """clip = "global": one scale for all stages, from the norm over all of them, as torch's clip_grad_norm_ has it."""
    norm = math.sqrt(sum(part.squared_norm for part in parts))
    return pb.StepApply(scale=min(1.0, max_norm / (norm + 1e-6)), skip=not all(part.finite for part in parts))


def _array(parameter: torch.nn.Parameter) -> np.ndarray:
    return parameter.detach().numpy().copy()


def lora_of(plan: pb.Plan) -> LoraSettings:
    return LoraSettings(plan.lora.rank, plan.lora.alpha, tuple(plan.lora.targets), plan.lora.dropout)
