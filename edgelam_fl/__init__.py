"""EdgeLAM-FL: federated split fine-tuning of language models on devices that keep their data.

`model` cuts and loads slices, `wire` carries tensors between them, `split` trains over a route of slices, `tasks` turn
data into batches and logits into losses, `telemetry` writes what happened. Flower's ServerApp and ClientApp live beside
this package, in `server/` and `clients/`; the strategies that they compose, in `strategies/`.
"""

__version__ = "0.1.0"
