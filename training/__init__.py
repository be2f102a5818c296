"""Training scripts, one a task, run by `accelerate launch -m hubgen.training.<script>`; installed as `hubgen.training`.

What they are composed of stands in `kit`; what makes a good run of each, in `recipes`.
"""
