"""Shards -> vectors of their pictures, and what is found by them.

embedders         models that give vectors: CLIP, SigLIP, ConSE, thumbnails
embeddings        vectors in files beside their keys
index             the nearest of them, by faiss
duplicates        pictures that are nearly the same, marked
"""
