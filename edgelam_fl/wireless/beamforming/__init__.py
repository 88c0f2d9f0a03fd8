"""Beams for several users at once, from channels or from noisy pilots. Torch tensors; knows no run, no model and no message.

    downlink    the power and the noise of a cell, and the sum rate of its beams
    precoders   MRT, ZF, RZF and WMMSE: what a learned beamformer is compared with
    estimation  pilots, and LS and MMSE estimates of a channel
    network     a graph network over users that makes beams
    learned     a trained network in the place of a precoder
    values      channels and beams as rows of values, as a task hands them to a model

Shapes: B cells, K users, M antennas, T pilot symbols. Row k of a channel is what multiplies the antennas' signals on their way
to user k; column k of the beams is what the antennas send for user k.
"""
