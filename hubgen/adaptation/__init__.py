"""Adaptation: what is added to a model's layers, trained and exchanged apart from it (LoRA and its kin)."""
