"""A trainee: an adapter that trains, its optimizer, and the adapter to which the optimizer's moments belong.

A device has one trainee for its own layers; a host has one for its site, or one for each device (host_mode = "copies").
Knows gradients and steps; knows nothing about who computed a gradient or when a step is due.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from edgelam_fl.errors import ProtocolError
from edgelam_fl.model import adapter as adapters
from edgelam_fl.model.chip import CPU
from edgelam_fl.model.lora import A, B
from edgelam_fl.model.stage import LoraSettings, Stage
from edgelam_fl.plan.reading import cut_adapter_of, kind_of
from edgelam_fl.split.snapshot import Damaged, SourceState
from edgelam_fl.wire import edgelam_pb2 as pb

Gradients = Sequence[torch.Tensor | None]
_TORCHS_BETAS, _TORCHS_EPS = (0.9, 0.999), 1e-8
_ADAPTER, _MOMENTS = "adapter/", "moment/"  # what arrays of a snapshot are


class Trainee:
    """The LoRA tensors of one or more stages, and their optimizer."""

    def __init__(self, stages: Sequence[Stage], *, own: bool = False) -> None:
        """`own`: gives the trainee parameters of its own, so that several trainees can share the stages (copies)."""
        self.stages = list(stages)
        # by stage: what `Stage.use` takes
        self.sets = [stage.new_adapter_set() if own else stage.adapter_parameters for stage in stages]
        self.named = {name: p for one in self.sets for name, p in one.items()}
        self.parameters: list[torch.nn.Parameter] = []  # of the tensors that learn, in the order of the stages' names
        self.names: list[str] = []
        self.optimizer: torch.optim.Optimizer | None = None
        self._settings: pb.Optimizer | None = None
        self._moments_of = ""  # of what the moments are; empty: of a round that has not ended
        self._prox_mu = 0.0
        self._start: list[torch.Tensor] = []  # values of the parameters when the round began; only with prox_mu
        self._correction: list[torch.Tensor | None] = []  # per parameter; empty if the round has none
        self._is_pulled = False  # whether the current gradient includes the pull to the start and the correction
        self.lr_sum = 0.0  # sum of the learning rates of the round's steps

    def use(self) -> None:
        """Puts this adapter into the stages."""
        for stage, one in zip(self.stages, self.sets, strict=True):
            if stage.adapter_parameters is not one:
                stage.use(one)

    def start(
        self,
        tensors: Mapping[str, np.ndarray],
        trains: Callable[[int | None], bool],
        plan: pb.Plan,
        prox_mu: float = 0.0,
        correction: Mapping[str, np.ndarray] = {},
        kept: Iterable[SourceState] = (),
    ) -> bool:
        """Takes the adapter that a round starts from. Returns whether the optimizer's moments are kept.

        They are kept if this is the adapter to which they belong; those of a factor that the plan freezes stay untouched.
        `trains`: whether a layer learns. `prox_mu`: how strongly the steps are pulled back to this adapter. `correction`: is
        added to the gradient of each step. `kept`: `moments` of earlier rounds, for an optimizer that has none, or other ones,
        as after a restart or an attempt that failed. Raises ProtocolError if a tensor is missing or has another shape.
        """
        self.use()
        self.clear()  # what an attempt that failed within a step has left
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
            self.optimizer, self._moments_of = make_optimizer(in_optimizer, plan.optimizer), ""
            found = next((one for one in kept if one.numbers.get("moments_of") == continues), None)
            warm = found is not None and self.optimizer is not None
            if found is not None and warm:
                self._load_moments(found.arrays)
                self._moments_of = continues
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
        return torch.from_numpy(found.copy()).to(wanted.device)

    def finish(self, plan: pb.Plan) -> adapters.Adapter:
        """Ends a round: returns the trained tensors, and notes to which adapter the moments belong now."""
        self._moments_of = _moments_belong_to(self.adapter(), plan)
        return {name: _array(self.named[name]) for name in self.names}

    # ---------------------------------------------------------------- snapshots

    def moments(self) -> SourceState:
        """Returns the moments at the end of a round, with the name of what they belong to."""
        return SourceState(self._moments(), {"moments_of": self._moments_of})

    def state(self) -> SourceState:
        """Returns all that a later attempt needs to go on after the newest step."""
        arrays = {f"{_ADAPTER}{name}": array for name, array in self.adapter().items()}
        return SourceState(arrays | self._moments(), {"lr_sum": self.lr_sum})

    @torch.no_grad()
    def restore(self, state: SourceState) -> None:
        """Goes on from a state of this round, after `start`. Raises Damaged if it is not one of this adapter."""
        for name, parameter in self.named.items():
            array = state.arrays.get(f"{_ADAPTER}{name}")
            if array is None or array.shape != parameter.shape or array.dtype != np.float32:
                raise Damaged(f"it has no {name} of shape {list(parameter.shape)}")
            parameter.copy_(torch.from_numpy(array))
        self._load_moments(state.arrays)
        self._moments_of, self.lr_sum = "", float(state.numbers["lr_sum"])

    def _moments(self) -> dict[str, np.ndarray]:
        if self.optimizer is None:
            return {}
        return {
            f"{_MOMENTS}{key}/{name}": value.detach().cpu().numpy().copy()
            for name, parameter in self.named.items()
            for key, value in self.optimizer.state.get(parameter, {}).items()
            if value is not None
        }

    def _load_moments(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Puts moments into the optimizer, which has none yet. Raises Damaged for those of another adapter."""
        if self.optimizer is None:
            return
        self.optimizer.state.clear()
        for key, array in arrays.items():
            if not key.startswith(_MOMENTS):
                continue
            moment, _, name = key.removeprefix(_MOMENTS).partition("/")
            parameter = self.named.get(name)
            if parameter is None or array.shape not in ((), parameter.shape):
                raise Damaged(f"it has moments of {name}, {list(array.shape)}")
            # A count of steps, which has no dimensions, stays where torch keeps it: in the CPU's memory.
            chip = parameter.device if array.shape else CPU
            self.optimizer.state[parameter][moment] = torch.from_numpy(array.copy()).to(chip)

    # ---------------------------------------------------------------- the adapter

    @torch.no_grad()
    def replace(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Takes other values for some of its tensors, by name."""
        for name, array in tensors.items():
            self.named[name].copy_(torch.from_numpy(array))

    def adapter(self) -> adapters.Adapter:
        """Returns a copy of all tensors, trained or not."""
        return {name: _array(parameter) for name, parameter in self.named.items()}

    # ---------------------------------------------------------------- a step

    def set_gradients(self, gradients: Gradients) -> None:
        """Sets the gradient of the next step, in the order of `parameters`; None: no gradient."""
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient

    def clear(self) -> None:
        """Drops the gradient."""
        self._is_pulled = False
        for parameter in self.parameters:
            parameter.grad = None

    def squared_norm(self) -> pb.StepReady:
        """Returns the squared norm of the gradient, in float64 (clip = "global")."""
        self._pull()
        total = sum(float(p.grad.cpu().double().square().sum()) for p in self.parameters if p.grad is not None)
        return pb.StepReady(squared_norm=total if math.isfinite(total) else 0.0, finite=math.isfinite(total))

    def step(self, number: int, scale: float = 1.0) -> None:
        """Makes one optimizer step at the learning rate of the phase's step `number`, and drops the gradient.

        `scale`: multiplies the gradient first.
        """
        assert self._settings is not None
        if self.optimizer is None:
            return
        self._moments_of = ""
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
        """Adds the aggregation's part to the gradient: once per step, before any clipping.

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
    """Returns whether a tensor is a factor that does not learn in this round."""
    return (lora.freeze_a and name.endswith(A)) or (lora.freeze_b and name.endswith(B))


def _moments_belong_to(adapter: adapters.Adapter, plan: pb.Plan) -> str:
    """Returns what must be equal in the next round for the moments to be kept.

    With optimizer.keep = "always", neither the adapter nor the frozen factors count.
    """
    lora, optimizer = plan.lora, plan.optimizer
    same: tuple[Any, ...] = (lora.train_front, lora.train_hosts, lora.train_back, *_rule(optimizer))
    if optimizer.keep == "always":
        return json.dumps(same)
    return json.dumps((*same, lora.freeze_a, lora.freeze_b, adapters.digest(adapter)))


def make_optimizer(parameters: list[torch.nn.Parameter], settings: pb.Optimizer) -> torch.optim.Optimizer | None:
    """Returns torch's AdamW or SGD with the plan's settings; None if nothing trains."""
    if settings.name not in ("adamw", "sgd"):
        raise ProtocolError(f"optimizer {settings.name!r} is not known here; known: adamw, sgd")
    if not parameters:
        return None
    _, weight_decay, betas, eps, momentum = _rule(settings)
    try:
        if settings.name == "sgd":
            return torch.optim.SGD(parameters, momentum=momentum)
        return torch.optim.AdamW(parameters, betas=betas, eps=eps, weight_decay=weight_decay)
    except ValueError as error:
        raise ProtocolError(f"a plan's optimizer: {error}") from error


def _rule(settings: pb.Optimizer) -> tuple[str, float, tuple[float, float], float, float]:
    """Returns name, weight decay, betas, eps and momentum: an optimizer of other settings cannot go on with its moments."""
    first, second = settings.betas or _TORCHS_BETAS
    return settings.name, settings.weight_decay, (first, second), settings.eps or _TORCHS_EPS, settings.momentum


def judge(parts: Sequence[pb.StepReady], max_norm: float) -> pb.StepApply:
    """Returns one scale for the gradients of all stages, from the norm over all of them, as torch's clip_grad_norm_ does."""
    norm = math.sqrt(sum(part.squared_norm for part in parts))
    return pb.StepApply(scale=min(1.0, max_norm / (norm + 1e-6)), skip=not all(part.finite for part in parts))


def check_verdict(verdict: pb.StepApply) -> None:
    """Raises ProtocolError if a coordinator's decision would do more than shrink a gradient."""
    if not 0 <= verdict.scale <= 1:
        raise ProtocolError(f"a STEP_APPLY with scale {verdict.scale}; allowed: 0 to 1")


def _array(parameter: torch.nn.Parameter) -> np.ndarray:
    return parameter.detach().cpu().numpy().copy()


def lora_of(plan: pb.Plan) -> LoraSettings:
    """Returns the LoRA settings of a plan."""
    lora = plan.lora
    return LoraSettings(
        lora.rank,
        lora.alpha,
        tuple(lora.targets),
        lora.dropout,
        plan.model.own_dropout,
        cut_adapter_of(plan),
        kind_of(plan),
    )
