"""A radio cell as numbers: where devices are, what a round takes in time and energy; and what base stations learn and do.

Learning is real and time is virtual: a run with `[wireless]` trains like any other, and this model computes how long it would
have taken in the cell. Knows no strategy, no language model and no message.

    fdma    what a share of a band carries, and its inverse
    cell    places, channels, speeds and dropouts, each from the run's seed and a device's name
    rounds  what one device does in a round, and the round as a whole

Subjects of their own:

    channels      what base stations learn from: channels over time, frequency and antennas; numpy, torch for one generator
    prediction    baselines of channel prediction, and their score; numpy
    beamforming   beams for several users at once, from channels or pilots; torch
    over_the_air  sums that a shared channel makes of what all send at once; numpy
"""
