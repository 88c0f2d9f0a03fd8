"""Finds models for a node: on this machine, else at the hub beside its server. Measures the link to the hub.

Knows plans; knows no bytes and no gRPC.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgelam_fl.addresses import join_address
from edgelam_fl.hub.fetch import open_model
from edgelam_fl.hub.kept import leave
from edgelam_fl.hub.link_speed import LinkSpeed, measure_link
from edgelam_fl.model.source import ModelSource
from edgelam_fl.plan.reading import hosted_span
from edgelam_fl.telemetry.events import Emit
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.grpc.secure import PLAIN, Security


@dataclass(frozen=True)
class ServerHub:
    """The hub of a node's server, whose port each plan and each question names."""

    host: str  # the server's host name or address; empty: the node knows no server
    emit: Emit
    security: Security = PLAIN

    def address(self, port: int) -> str:
        """Returns HOST:PORT of the hub; empty if there is none."""
        return join_address(self.host, port) if self.host and port else ""

    def find(
        self, name: str, digest: str, port: int, token: bytes, tokenizer: bool = False, download: bool = True
    ) -> ModelSource:
        """Returns a model. Raises ModelError if it is neither here nor served.

        `token`: the run's, for the hub. `tokenizer`: whether text is handled. `download`: whether a hub of the internet may be
        asked if the server has none.
        """
        return open_model(
            name, digest, self.address(port), token=token, tokenizer=tokenizer, download=download, emit=self.emit,
            security=self.security,
        )  # fmt: skip

    def measure_link(self, port: int) -> LinkSpeed:
        """Measures the link to the hub. Raises EnvironmentProblem if no hub answers."""
        return measure_link(self.host, port, security=self.security)

    def leave(self, plan: pb.Plan, source: str, steps: tuple[int, int], data: bytes) -> None:
        """Leaves a host's state at the hub, which holds from the first to the last number of `steps`. Raises grpc.RpcError."""
        leave(self.address(plan.hub_port), plan.kept_token, source, steps, data, self.security)

    def keeps(self, plan: pb.Plan) -> bool:
        """Returns whether the hub keeps snapshots of the plan's node."""
        return bool(self.address(plan.hub_port) and plan.kept_token and plan.kept_every)

    def find_planned(self, plan: pb.Plan) -> ModelSource:
        """Returns the model of a plan, with its tokenizer if the node holds examples or the head. Raises as `find`."""
        hosted = hosted_span(plan)
        reads_text = bool(plan.routes) or (hosted is not None and hosted.head)
        return self.find(plan.model.name, plan.model.digest, plan.hub_port, plan.slices_token, reads_text)
