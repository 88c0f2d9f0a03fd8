"""A graph network that makes beams: its nodes are users; an edge carries what two users' channels share, summed over antennas.

Per user it chooses a weight l and a power p, and the beams are (noise I + H^H diag(l) H)^-1 h_k, scaled to p_k: the form that the
best beams have under a limit on their total power (arXiv 1404.0408). With equal weights and powers this is RZF, where an
untrained network starts. Each round sees what users would hear of the beams so far, and moves weights and powers.

Antennas enter through products of channels alone, and users share all weights: another order of antennas or users gives the
same beams in that order, and one network takes any number of both. Shapes as in the package, with W the width of a node.
"""

from __future__ import annotations

import torch
from torch import nn

from edgelam_fl.wireless.beamforming.downlink import check_channels, scaled

_USER_FEATURES, _PAIR_FEATURES = 7, 4
_LEAST = 1e-20
_LEAST_LOG = -8.0  # of a share over the mean share, as a feature: below it a user is switched off


class BeamNetwork(nn.Module):
    """Learned beams from known channels, or from the least-squares estimates that noisy pilots gave."""

    def __init__(self, width: int = 32, rounds: int = 4) -> None:
        super().__init__()
        self.width = width
        self.rounds = nn.ModuleList(_Round(width) for _ in range(rounds))

    def forward(
        self, channels_BKM: torch.Tensor, noise_B: torch.Tensor, error_B: torch.Tensor | None = None, power: float = 1.0
    ) -> torch.Tensor:
        """Returns beams [B, M, K] of exactly this power.

        `noise_B`: at each user of a cell. `error_B`: the variance of an estimate's entries, None: the channels are exact.
        """
        check_channels(channels_BKM)
        error_B = torch.zeros_like(noise_B) if error_B is None else error_B
        snr_B = power / (noise_B + power * error_B)  # what is not known of a channel is noise to its user
        gram_BKK = channels_BKM @ channels_BKM.mH * snr_B[:, None, None]
        cell_B2 = torch.stack([(noise_B / power).log(), (power * error_B / noise_B).log1p()], 1)
        cells, users = gram_BKK.shape[:2]
        hidden_BKW = gram_BKK.real.new_zeros(cells, users, self.width)
        logs_BK2 = gram_BKK.real.new_zeros(cells, users, 2)
        for one in self.rounds:
            hidden_BKW, step_BK2 = one(hidden_BKW, gram_BKK, logs_BK2, cell_B2)
            logs_BK2 = logs_BK2 + step_BK2
        return scaled(channels_BKM.mH @ _mix(gram_BKK, logs_BK2), power)


def _mix(gram_BKK: torch.Tensor, logs_BK2: torch.Tensor) -> torch.Tensor:
    """Returns what the conjugate channels are multiplied with to become beams; the last axis of `logs` is (weight, power)."""
    logs_BK2 = logs_BK2.log_softmax(1)
    weights_BK, roots_BK = logs_BK2[..., 0].exp(), (logs_BK2[..., 1] / 2).exp()  # sqrt has no slope at a power of 0
    eye_KK = torch.eye(gram_BKK.shape[1], dtype=gram_BKK.dtype, device=gram_BKK.device)
    mix_BKK = torch.linalg.inv(eye_KK + weights_BK[..., None] * gram_BKK)
    power_BK = (mix_BKK.conj() * (gram_BKK @ mix_BKK)).real.sum(1)
    return mix_BKK * (roots_BK * power_BK.clamp_min(_LEAST).rsqrt())[:, None]


class _Round(nn.Module):
    """One exchange of messages between users, after which each moves the logarithms of its weight and its power."""

    def __init__(self, width: int) -> None:
        super().__init__()
        user = width + _USER_FEATURES
        self.message = nn.Sequential(
            nn.Linear(2 * user + _PAIR_FEATURES, width), nn.GELU(), nn.Linear(width, width), nn.GELU()
        )
        self.update = nn.Sequential(nn.Linear(user + 2 * width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.step = nn.Linear(width, 2)
        nn.init.zeros_(self.step.weight)  # untrained: RZF
        nn.init.zeros_(self.step.bias)

    def forward(
        self, hidden_BKW: torch.Tensor, gram_BKK: torch.Tensor, logs_BK2: torch.Tensor, cell_B2: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        users = gram_BKK.shape[1]
        gains_BKK = (gram_BKK @ _mix(gram_BKK, logs_BK2)).abs().square()  # received powers over the noise
        user_BKF = torch.cat([hidden_BKW, _of_users(gains_BKK, gram_BKK, logs_BK2, cell_B2)], 2)
        listening, speaking = (user_BKF.unsqueeze(axis).expand(-1, users, users, -1) for axis in (2, 1))
        message_BKKW = self.message(torch.cat([listening, speaking, _of_pairs(gains_BKK, gram_BKK)], 3))
        hidden_BKW = hidden_BKW + self.update(torch.cat([user_BKF, message_BKKW.mean(2), message_BKKW.amax(2)], 2))
        return hidden_BKW, self.step(hidden_BKW)


def _of_users(
    gains_BKK: torch.Tensor, gram_BKK: torch.Tensor, logs_BK2: torch.Tensor, cell_B2: torch.Tensor
) -> torch.Tensor:
    """Returns the features of users [B, K, 7]: SINR, interference, channel, weight, power, and two of their cell."""
    users = gram_BKK.shape[1]
    own_BK = gains_BKK.diagonal(dim1=1, dim2=2)
    others_BK = (gains_BKK.sum(2) - own_BK).clamp_min(0)
    norm_BK = gram_BKK.diagonal(dim1=1, dim2=2).real.clamp_min(_LEAST)
    shares_BK2 = (logs_BK2.log_softmax(1) + torch.tensor(float(users)).log()).clamp_min(_LEAST_LOG)
    measured = torch.stack([(own_BK / (1 + others_BK)).log1p(), others_BK.log1p(), norm_BK.log()], 2)
    return torch.cat([measured, shares_BK2, cell_B2[:, None].expand(-1, users, -1)], 2)


def _of_pairs(gains_BKK: torch.Tensor, gram_BKK: torch.Tensor) -> torch.Tensor:
    """Returns the features of pairs [B, K, K, 4]: what each hears of the other, how alike their channels are, whether they are one."""
    norm_BK = gram_BKK.diagonal(dim1=1, dim2=2).real.clamp_min(_LEAST)
    alike_BKK = gram_BKK.abs().square() / (norm_BK[:, :, None] * norm_BK[:, None])
    same_BKK = torch.eye(gram_BKK.shape[1], dtype=alike_BKK.dtype, device=alike_BKK.device).expand_as(alike_BKK)
    return torch.stack([gains_BKK.log1p(), gains_BKK.mT.log1p(), alike_BKK, same_BKK], 3)
