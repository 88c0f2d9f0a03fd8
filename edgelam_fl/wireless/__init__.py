"""A radio cell as numbers: where devices are, what their channels carry, what a round takes in time and energy.

Learning is real and time is virtual: a run with `[wireless]` trains like any other, and this model computes how long it would
have taken in the cell. Plain Python and numpy, but for `beamforming`; knows no strategy, no model and no message.

    fdma    what a share of a band carries, and its inverse
    cell    places, channels, speeds and dropouts, each from the run's seed and a device's name
    rounds  what one device does in a round, and the round as a whole
    beamforming  beams for several users at once, from channels or pilots: a subject of its own, in torch
"""
