"""What each node holds, as far as the server knows: so that only tensors that changed are sent. Plain values.

Only digests are known, from a node's last reply. Knows nothing about messages, nor about the source of needed tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from edgelam_fl.model.adapter import Adapter, digest
from edgelam_fl.wire import edgelam_pb2 as pb
from server.replies import Reply, is_frozen


@dataclass(frozen=True, slots=True)
class NodeHoldings:
    """One node's adapter: the digest of the whole, as the node reported it, and the digests of tensors known to be there."""

    adapter_digest: str
    tensor_digests: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Holdings:
    """The holdings of all nodes that replied to their last message."""

    by_node: Mapping[str, NodeHoldings] = field(default_factory=dict)

    def lacking(self, node: str, needed: Adapter, needed_digest: str) -> Adapter | None:
        """Returns the tensors of `needed` that have to be sent; None: the node holds exactly the needed adapter.

        An empty adapter means that the node holds every tensor, and others beside them that it has to drop.
        """
        held = self.by_node.get(node)
        if held is None:
            return dict(needed)
        if held.adapter_digest == needed_digest:
            return None
        known = held.tensor_digests
        return {name: array for name, array in needed.items() if known.get(name) != _digest(name, needed)}

    def after(self, news: Mapping[str, NodeHoldings | None]) -> Holdings:
        """Returns the holdings after a round. None: nothing is known of that node any more."""
        kept = {name: held for name, held in self.by_node.items() if name not in news}
        return Holdings(kept | {name: held for name, held in news.items() if held is not None})


def holdings_after(plan: pb.Plan, start: Adapter, reply: Reply) -> NodeHoldings:
    """Returns the holdings of a node that began its part with `start` and sent `reply`.

    Every tensor is known if start and reply together have the digest that the node reports; else only the tensors that
    the plan froze are.
    """
    after = {**start, **{name: array for part in reply.tensors for name, array in part.items()}}
    reported = reply.report.adapter_digest
    if digest(after) != reported:
        after = {name: array for name, array in start.items() if is_frozen(plan, name)}
    return NodeHoldings(reported, {name: _digest(name, after) for name in after})


def _digest(name: str, adapter: Adapter) -> str:
    return digest({name: adapter[name]})
