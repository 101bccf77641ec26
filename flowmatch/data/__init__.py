"""Data sets that stage one and the evaluation read."""
