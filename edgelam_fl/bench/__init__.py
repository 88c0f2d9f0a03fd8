"""`edgelam bench`: a matrix of strategies, partitions and seeds, each cell a federation on Flower's simulation engine."""
