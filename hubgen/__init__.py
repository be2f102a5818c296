"""hubgen."""
