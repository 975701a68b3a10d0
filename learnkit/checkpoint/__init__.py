"""Files for resuming a training: files and folders that appear completely or not at all, and the state in them."""
