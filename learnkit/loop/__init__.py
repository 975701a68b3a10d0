"""The parts of a fit: its arguments, its session, evaluation, the loss, and functions as callbacks."""
