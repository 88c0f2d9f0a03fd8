"""What each node holds, as far as the server knows: so that only tensors that changed are sent. Plain values.

Only digests are known, from a node's last reply. Knows nothing about messages, nor about the source of needed tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from edgelam_fl.model.adapter import Adapter, joined_digest, tensor_digest
from server.global_adapter import StartingPoint
from server.replies import Reply


@dataclass(frozen=True, slots=True)
class NodeHoldings:
    """One node's adapter: the digest of the whole, as the node reported it, and the digests of tensors known to be there."""

    adapter_digest: str
    tensor_digests: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Holdings:
    """The holdings of all nodes that replied to their last message."""

    by_node: Mapping[str, NodeHoldings] = field(default_factory=dict)

    def lacking(self, node: str, needed: StartingPoint) -> Adapter | None:
        """Returns the tensors of `needed` that have to be sent; None: the node holds exactly the needed adapter.

        An empty adapter means that the node holds every tensor, and others beside them that it has to drop.
        """
        held = self.by_node.get(node)
        if held is not None and held.adapter_digest == needed.digest:
            return None
        known = held.tensor_digests if held is not None else {}
        if not known:
            return dict(needed.tensors)
        return {name: array for name, array in needed.tensors.items() if known.get(name) != needed.digests[name]}

    def after(self, news: Mapping[str, NodeHoldings | None]) -> Holdings:
        """Returns the holdings after a round. None: nothing is known of that node any more."""
        kept = {name: held for name, held in self.by_node.items() if name not in news}
        return Holdings(kept | {name: held for name, held in news.items() if held is not None})


def holdings_after(start: StartingPoint, reply: Reply) -> NodeHoldings:
    """Returns the holdings of a node that began its part with `start` and sent `reply`.

    Every tensor is known if start and reply together have the digest that the node reports; else only the tensors that
    the plan froze are.
    """
    reported, changed = reply.report.adapter_digest, any(reply.tensors)
    after = start.digests
    if changed:
        trained = {name: array for part in reply.tensors for name, array in part.items()}
        after = {**after, **{name: tensor_digest(name, array) for name, array in trained.items()}}
    if (joined_digest(after) if changed else start.digest) != reported:
        after = start.frozen_digests
    return NodeHoldings(reported, after)
