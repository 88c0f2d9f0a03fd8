"""Selection rules: they choose the devices of a round."""
