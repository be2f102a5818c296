"""What a backbone is told beside x_t: prompts as embeddings (`text`); how two predictions become one (`guidance`)."""
