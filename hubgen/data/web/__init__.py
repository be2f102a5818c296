"""Data from the web in shards, as LAION's were made: candidates of a crawl, and their pictures.

shards      what a shard is: a tar of pictures, a table of its rows, and what was counted, in img2dataset's layout
stages      what is done to one shard, and how the result is committed
engine      the loop over shards: in this process, in several, on Ray or Slurm (`attempts`, `engine_*`, `slurm_*`)
crawl       files of a crawl -> candidates (`wat`, `rules`, `text`, `dedup`, and the recipes)
download    candidates -> shards (`candidates`, `fetch`, `transfer`, `optout`, `turns`, `resize`)
scores      columns that say what a pair is worth (`embedding_scores`, `tags`, `heads`, `decoding`)
filters     shards -> shards with the rows to keep (`where`, `hash_lists`, and the recipes' rules)
embeddings  shards -> vectors of their pictures (`embedders`)
recaption   captions that a model writes, beside those of the web (`hubgen.captioning`)
index       vectors -> search (faiss); `duplicates` marks pictures that are nearly the same
"""
