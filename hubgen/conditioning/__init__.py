"""What a backbone is told beside x_t: prompts as embeddings (`text`), and how two predictions become one (`guidance`)."""
