"""Publishing and loading.

Models and adapters by name, the bundled model, model cards, what a picture says about itself, and hubgen's classes in
diffusers' loader.
"""
