"""The way back from noise to data, under diffusers' scheduler mixins, names and config keys.

`ddpm` walks the variance-preserving path by ancestral sampling, `flow_match_euler` the rectified flow by Euler steps.
"""
