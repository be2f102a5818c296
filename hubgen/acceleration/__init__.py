"""The same results in less time: `optimize` chooses, `walk` acts while a pipeline's call lasts, `cpu` computes."""
