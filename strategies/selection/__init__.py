"""Selection rules: the devices of a round."""
