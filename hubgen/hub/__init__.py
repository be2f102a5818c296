"""Publishing and loading: the bundled model, cards, registration with diffusers' loader."""
