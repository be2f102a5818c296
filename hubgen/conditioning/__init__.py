"""From a prompt to embeddings, and from two predictions to one: guidance."""
