"""Predicts one held-out channel with a run's result, slot by slot, for the run's page. Knows no page."""

from __future__ import annotations

from pathlib import Path

import torch

from edgelam_fl.config import RunConfig
from edgelam_fl.model.adapter import Span, read_peft_folder
from edgelam_fl.model.stage import LoraSettings, load_stages
from edgelam_fl.plan.making import task_settings
from edgelam_fl.plan.spec import RunSpec, model_of
from edgelam_fl.tasks.arrays import Sample
from edgelam_fl.tasks.channel_prediction import ChannelPrediction
from edgelam_fl.tasks.kinds import device_data
from edgelam_fl.telemetry.report.over_time import OverTime


def channel_over_time(config: RunConfig, adapter: Path, file: Path) -> OverTime | None:
    """Returns the held-out link of median speed in a base station's file, predicted before and after a run of channel prediction.

    None without one, and for a result that lacks what a prediction takes or is of the other band (task.private_modules, duplex = "fdd").
    """
    held_out = device_data(file, task_settings(config)).held_out
    links = [sample for sample in held_out if isinstance(sample, Sample)]
    if not links or config.task.private_modules or config.radio.duplex == "fdd":
        return None
    links.sort(key=lambda sample: float(sample.arrays["speed_kmh"]))
    link, spec = links[len(links) // 2], RunSpec(config, model_of(config))
    task = ChannelPrediction(spec.source.folder, task_settings(config))
    (unit,) = task.units(task.examples([link]).examples, 1)
    lora, whole = config.lora, [Span(0, spec.source.num_layers, embed=True, head=True)]
    settings = LoraSettings(lora.rank, lora.alpha, lora.targets, kind=spec.kind)
    base = "fp32" if config.model.base == "auto" else config.model.base
    (stage,) = load_stages(spec.source, whole, base, settings, values=spec.values)
    stage.load_adapter(read_peft_folder(adapter))
    with torch.no_grad():
        given_KO = stage(unit.inputs, unit.row_lengths)[0].float().numpy()
    heard, true, before, after = (tuple(map(float, part)) for part in task.over_time(link, given_KO))
    return OverTime(speed_kmh=float(link.arrays["speed_kmh"]), true=true, heard=heard, before=before, after=after)
