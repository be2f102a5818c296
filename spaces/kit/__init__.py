"""What Spaces share: limits, uploads, the model behind its queue, recipes in pictures, and the look."""
