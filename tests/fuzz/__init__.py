"""Fuzzing of every reader of files that strangers may have written; see `python -m fuzz`."""
