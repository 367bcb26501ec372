"""What `benchmarks/suite.py` is made of."""
