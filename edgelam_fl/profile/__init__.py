"""What a node can do, measured on it: never looked up by a processor's or a board's name."""
