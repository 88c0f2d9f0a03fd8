"""Holds a node's profile as typed data, and converts it to and from JSON. Measures nothing; imports no torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class LinkProfile(BaseModel):
    """The link to the server's hub, as one stream uses it: bits per second each way, round trip in seconds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    up_bps: Positive
    down_bps: Positive
    round_trip_s: Positive


class Profile(BaseModel):
    """What a node can do. None and {}: was not measured."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    memory_free_bytes: int = Field(ge=0, description="free memory within the limits of the control groups")
    cpu_threads: int = Field(ge=1)
    chip: str = Field("", description="what the layer was timed on, and whose memory is free; empty: the CPU")
    disk_free_bytes: int = Field(ge=0, description="free bytes of the file system that holds the cache")
    disk_write_bytes_per_s: Positive | None = None
    model: str = ""
    layer_seconds: dict[int, dict[str, Positive]] = Field(
        {}, description='tokens of a micro-batch -> "base/compute" -> seconds per layer, forward and backward'
    )
    link: LinkProfile | None = None
