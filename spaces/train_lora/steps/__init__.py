"""The steps of the page, a file each, and what stands behind them: pictures, recipes and runs."""
