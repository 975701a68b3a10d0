"""Optimizers: parameter groups, several optimizers as one, averages of weights, and saved state."""
