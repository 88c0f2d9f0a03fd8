"""One process that plays all nodes of a federation: the stage hosts themselves, in one memory, with links of queues."""
