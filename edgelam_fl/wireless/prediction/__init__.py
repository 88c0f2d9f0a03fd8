"""What a channel predictor is measured against: baselines in plain numpy, and the score. Knows no run and no network.

score          past and future of links, errors in dB, spectral efficiency
extrapolation  predictors that learn from the link's own past alone
other_band     what is predicted of one band, carried over to the band above it
ridge          linear predictors that are fitted to other links
"""
