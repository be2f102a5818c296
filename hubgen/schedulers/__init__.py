"""The way back from noise to data, under diffusers' scheduler mixins, names and config keys.

`variance_preserving` is the ground of `ddpm` (ancestral sampling) and `ddim` (skipping steps, and inversion) on the
discrete variance-preserving chain; `flow_match` that of `flow_match_euler` and `flow_match_heun` on the rectified flow.
`flow_match_midpoint` and `flow_match_controlled` go along flows in both directions, `ddim_inverse` goes up the chain,
and `inversion` says which of them belong together.
`score_sde_ve` follows the variance-exploding SDE by predictor and corrector.
`compatibility` says which classes understand each other's configs.
"""
