"""The bandwidth half of the online Lyapunov scheduler (arXiv 2407.02924): gives shares with which all devices finish together.

The selection of the same name chooses devices by the delay that they have with these shares.
"""

from __future__ import annotations

from strategies.bandwidth.equalise import Equalise


class LyapunovBandwidth(Equalise):
    """The shares of Equalise: once devices are chosen, the drift-plus-penalty objective grows only with the delay."""
