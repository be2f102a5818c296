"""Candidates -> shards of pictures.

download        the stage
candidates      tables of URLs and captions, cut into shards
fetch           a URL to its bytes, or why not; transfer: one request, within limits
optout, robots  who does not want to be asked, or used
turns           how many requests a host gets at a time
resize          pictures as they are kept
"""
