"""Pixels <-> latents: the KL autoencoder, and the perceptual loss and patch discriminator of its training."""
