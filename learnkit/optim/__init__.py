"""Optimizers: parameter groups, several optimizers as one, averages of weights, and the state that files hold."""
