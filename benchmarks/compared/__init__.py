"""Ways to train the same batches, side by side: ours, and what others would use. Not benchmarks themselves."""
