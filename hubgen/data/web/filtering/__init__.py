"""Shards -> shards with the rows to keep.

filters           the stage and its report
where             conditions on columns
hash_lists        pictures and URLs that go unseen
"""
