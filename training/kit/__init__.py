"""What training scripts are composed of.

parse, groups, script     settings from a recipe and the command line; exit codes
bases, pictures           what training starts from, and what it is given
objectives                what is learned
optimizers, schedules     how weights move
trained, ema, post_hoc, finite
                              a network that learns, its averages, and what stops it
run, checkpoints, signals, metrics, window
the bookkeeping around a loop
held_out, grids           what is measured and drawn beside it
publishing                what it leaves
"""
