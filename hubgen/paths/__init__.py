"""x_t and its target: probability paths, prediction types, timestep densities, loss weightings.

`path` holds the paths, `prediction` the names of what a network predicts, `betas` the discrete variance schedules,
`timesteps` the densities that training draws t from, `weighting` the weights of the loss.
"""
