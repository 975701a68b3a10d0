"""What a fit reports: a journal for loggers, files that grow line by line, monitored values, plots."""
