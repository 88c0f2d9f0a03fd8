"""Runs matrices of strategies, partitions and seeds; each cell is a federation on Flower's simulation engine."""
