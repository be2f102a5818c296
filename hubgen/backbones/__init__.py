"""Networks from (x_t, t, condition) to a prediction."""
