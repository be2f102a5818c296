"""Checkpoint files: strict checks before anything loads, and the key maps of the layouts that people trade."""
