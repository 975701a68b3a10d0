"""Short runs that leave no trace: the learning-rate range test, the batch-size search, a fast run, a summary."""
