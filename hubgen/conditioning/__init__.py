"""Conditions: prompts, classes and sizes, how each backbone takes them (`families`, `predict`), and guidance."""
