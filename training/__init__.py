"""Training scripts, one a task, run by `accelerate launch -m hubgen.training.<script>`; installed as `hubgen.training`.

What two scripts share stands beside them: `settings` (recipe and command line), `checkpoints` (atomic save, exact
resume), `ema`, `interruption` (signals).
"""
