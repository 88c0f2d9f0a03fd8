import logging

# peft imports bitsandbytes where it is installed, and that warns on every start of a faster kernel for single tokens
# which would have to be fetched from the network; nothing here uses it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
