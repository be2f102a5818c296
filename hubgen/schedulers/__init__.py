"""The way back from noise to data."""
