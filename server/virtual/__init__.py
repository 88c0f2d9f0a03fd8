"""Virtual time: what a round takes on the wireless model instead of the clock."""
