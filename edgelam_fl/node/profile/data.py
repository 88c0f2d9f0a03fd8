"""A node's profile as typed data, in and out of JSON. Measures nothing; imports no torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class LinkProfile(BaseModel):
    """The way to the server's hub, of one stream."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    up_bps: Positive
    down_bps: Positive
    round_trip_s: Positive


class Profile(BaseModel):
    """What a node can do. `None` and {} stand for what was not asked."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    memory_free_bytes: int = Field(ge=0, description="with the limits of its control groups")
    cpu_threads: int = Field(ge=1)
    disk_free_bytes: int = Field(ge=0, description="where the cache is")
    disk_write_bytes_per_s: Positive | None = None
    model: str = ""
    layer_seconds: dict[int, dict[str, Positive]] = Field(
        {}, description='tokens of a micro-batch -> "base/compute" -> seconds of a layer, forward and backward'
    )
    link: LinkProfile | None = None
