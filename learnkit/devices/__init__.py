"""What training runs on: the accelerator, copies between it and the host, its memory, and the other ranks."""
