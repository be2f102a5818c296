"""Captions for pictures: a vision-language model as LLaVA and ShareGPT4V are, what learns of it, and how it is asked.

captioner       the model with its processor: built, put together from parts, opened; whether they fit
stages          which parameters learn in which stage of the training
conversations   what is told about pictures: captions of our data, or the JSON of ShareGPT
templates       a conversation as text, and where in it the answers stand
generate        captions of a batch of pictures, each with a mark: ok, empty, repeating, cut_off
"""
