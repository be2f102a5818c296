"""Publishing and loading.

The bundled model, model cards, what a picture says about itself, and hubgen's classes in diffusers' loader.
"""
