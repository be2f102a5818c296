"""The same results in less time: what inference computes once, and kernels that fit the machine."""
