"""Short runs that leave the Learner unchanged: learning-rate range test, batch-size search, fast run, summary."""
