"""The training loop of stages one and three."""
