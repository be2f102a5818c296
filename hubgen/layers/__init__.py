"""What the backbones are made of."""
