"""Data from the web in shards, as LAION's were made: candidates of a crawl, and their pictures.

shards        what a shard is: a tar of pictures, a table of its rows, and what was counted, in img2dataset's layout
stages        what is done to one shard, and how the result is committed
engines       the loop over shards: in this process, in several, on Ray or Slurm
rules         what a pair has to fulfil, and the recipes of LAION-400M, LAION-5B and DataComp
crawling      files of a crawl -> candidates
downloading   candidates -> shards
scoring       columns that say what a pair is worth
filtering     shards -> shards with the rows to keep
embedding     vectors of pictures, search, near-duplicates
recaption     captions that a model writes, beside those of the web (`hubgen.captioning`)
decoding      the pictures of a shard, read ahead
"""
