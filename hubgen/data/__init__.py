"""Image-text data: folders, the emoji builder, samplers and caches."""
