"""What a training writes to continue later: files and folders that appear whole or not at all, and the state in
them.
"""
