"""Radio channels as arrays: what base stations learn from. Plain numpy, but for the 3GPP model; knows no task and no run.

links        the arrays of many links, their grid, and noise on them
paths        a small generator of our own: sums of plane waves
uma          the urban macro cell of 3GPP TR 38.901, by the package sionna-no-rt
store        channels in files: what was drawn is kept in float16, a user's own file is checked
correlation  how alike a link's channel is to itself in time, frequency and space
"""
