"""What training runs on: the accelerator of this machine, copies between it and the host, its memory, and the ranks
beside this one.
"""
