"""What measures the product, and is not needed to run it: benchmarks, evaluation, the sweep, the demo, small models."""
