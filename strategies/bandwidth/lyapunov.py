"""The bandwidth half of the online Lyapunov scheduler (arXiv 2407.02924): the selection of the same name chooses devices by
the delay that they have when all finish together; here they get the shares that make it so.
"""

from __future__ import annotations

from strategies.bandwidth.equalise import Equalise


class LyapunovBandwidth(Equalise):
    """The drift-plus-penalty objective grows with the delay alone once the devices are chosen: the same shares."""
