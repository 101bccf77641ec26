"""Datasets that stage 1 and the evaluation read."""
