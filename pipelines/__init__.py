"""Pipelines around the one denoising loop; installed as `hubgen.pipelines`.

A pipeline is prompt -> embeddings -> denoising loop (`denoising`) -> decode, and each arrow is a method of it.
"""
