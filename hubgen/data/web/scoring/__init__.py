"""Columns that say what a pair is worth.

scores            the stage, languages, hashes, joined tables
embedding_scores  what vectors of picture and caption say: similarity, LAION's tags, heads
tags, heads       the prompts and rules of the tags; networks on vectors
"""
