"""Distances between sets of samples, figures and reports."""
