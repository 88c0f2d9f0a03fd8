"""A round in virtual time: what each device does at any share of the band, and what the round takes with given shares.

A device receives, computes and sends, one after the other: it takes c + S / R, c being the time of the first two. The round
lasts as long as its slowest device. A device that drops out costs only the share that it had been given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np

from edgelam_fl.config import WirelessSection
from edgelam_fl.telemetry.events import VirtualDevice, VirtualRound
from edgelam_fl.wireless.cell import RadioCell, watts
from edgelam_fl.wireless.fdma import bits_per_hertz


@dataclass(frozen=True)
class Load:
    """Bytes that a device moves and operations that it computes in a round."""

    bytes_up: float  # adapter, hidden states and their gradients
    adapter_bytes_down: float
    data_bytes_down: float
    operations: float  # floating-point


@dataclass(frozen=True)
class DeviceRound:
    """One device's work and payload in a round, without its time of sending."""

    bytes_up: float
    bytes_down: float
    snr: float  # over the whole band
    compute_s: float
    download_s: float
    compute_joules: float

    @property
    def before_sending_s(self) -> float:
        return self.download_s + self.compute_s


def device_round(cell: RadioCell, name: str, round: int, load: Load, devices: int) -> DeviceRound:
    """Computes a device's round from its load: the server sends adapters on its whole band, hidden states to each of
    `devices` on an equal part of it.
    """
    down_bits = 8 * (load.adapter_bytes_down + devices * load.data_bytes_down)
    return DeviceRound(
        bytes_up=load.bytes_up,
        bytes_down=load.adapter_bytes_down + load.data_bytes_down,
        snr=cell.snr(name, round),
        compute_s=load.operations / cell.flops(name),
        download_s=down_bits / cell.downlink_bps(name, round),
        compute_joules=cell.compute_joules(name, load.operations),
    )


def virtual_round(
    settings: WirelessSection,
    parts: Mapping[str, DeviceRound],
    shares: Mapping[str, float],
    dropped: Sequence[str] = (),
) -> VirtualRound:
    """Returns the round in virtual time with these shares of the band; `dropped`: devices that failed in it."""
    devices = {name: _device(settings, parts[name], shares[name]) for name in sorted(parts)}
    return VirtualRound(
        seconds=max((device.seconds for device in devices.values()), default=0.0),
        bytes=sum(device.bytes for device in devices.values()),
        joules=sum(device.joules for device in devices.values()),
        devices=devices,
        dropped=tuple(sorted(dropped)),
    )


def recorded_device_round(device: VirtualDevice) -> DeviceRound:
    """Returns the part that a device had in a round that an event describes."""
    return DeviceRound(**{field.name: getattr(device, field.name) for field in fields(DeviceRound)})


def _device(settings: WirelessSection, part: DeviceRound, share: float) -> VirtualDevice:
    rate_bps = settings.bandwidth_hz * float(bits_per_hertz(np.asarray(share), np.asarray(part.snr)))
    upload_s = 8 * part.bytes_up / rate_bps if part.bytes_up else 0.0
    return VirtualDevice(
        seconds=part.before_sending_s + upload_s,
        upload_s=upload_s,
        bytes=part.bytes_up + part.bytes_down,
        joules=part.compute_joules + watts(settings.power_dbm) * upload_s,
        share=share,
        rate_bps=rate_bps,
        **asdict(part),
    )
