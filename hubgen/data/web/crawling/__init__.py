"""Files of a crawl -> candidates: tables of URLs and captions.

crawl           the stages, from files to candidates and their report
wat             pages and their links in WAT and WARC files
text            texts made clean, their language
dedup           keys of pairs, and which of them were seen
"""
