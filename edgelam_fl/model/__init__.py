"""Slices of a model: finds, loads and quantizes their weights, and puts LoRA on them. Knows no network."""

import logging

# bitsandbytes warns whenever it is imported that a faster kernel for single tokens could be fetched from the network; nothing
# here uses that kernel.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
