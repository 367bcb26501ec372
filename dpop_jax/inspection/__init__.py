"""What a set of preference pairs is like, and what DPO would do to it."""
