"""The same results in less time: `optimize` chooses, `call` acts while a pipeline's call lasts, `cpu` computes."""
