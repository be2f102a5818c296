"""Learned words on a pipeline: textual inversion, by diffusers' names.

pipe.load_textual_inversion("style.safetensors", token="<style>")
pipe("a cat, <style>")                      # all of the word's vectors
pipe.unload_textual_inversion("<style>")
"""

import logging
import os
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.loaders.textual_inversion import TextualInversionLoaderMixin

from hubgen.conditioning.text import spelled_out
from hubgen.formats.loading import HUB_ARGUMENTS

logger = logging.getLogger(__name__)

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
IGNORED = ("use_safetensors", "mirror", "mean_resizing")
"""Arguments of diffusers' `load_textual_inversion` that have no meaning here"""

Embeddings = str | os.PathLike[str] | Mapping[str, Any] | torch.Tensor


class TextualInversionMixin(TextualInversionLoaderMixin):
    """Adds learned words to a pipeline's tokenizers and text encoders.

    diffusers' mixin names it; what it does is done here, because there a file for two encoders is not read, a damaged
    one is half loaded, and unloading leaves the encoder's config and a word's further vectors as they were.
    """

    def load_textual_inversion(
        self,
        pretrained_model_name_or_path: Embeddings | list[Embeddings],
        token: str | list[str] | None = None,
        tokenizer: Any = None,
        text_encoder: Any = None,
        **kwargs: Any,
    ) -> None:
        """Adds words, each one or several vectors, to the text encoders that they were learned for.

        A file for several encoders goes to all of them; one that does not say to the first that is as wide.

        Args:
            pretrained_model_name_or_path: A safetensors file in the layout of diffusers or A1111, a folder or
                repository with one, its tensors, or the vectors; or a list of them.
            token: Name of the word in the place of the file's; a list has one for each file, or, for one file, one for
                each of its vectors, which are words of their own then.
            tokenizer: Of `text_encoder`; the pipeline's by default.
            text_encoder: The only one that is to learn them.
            **kwargs: `weight_name` and `subfolder` of the file; `revision`, `hf_token`, `cache_dir` and the like for
                the Hub.

        Raises:
            ValueError: The file is damaged, a pickle, or for other encoders, or a word is known; nothing is added then.
            OSError: There is no such file or repository.
        """
        from hubgen.adaptation.textual_inversion import EmbeddingError, add_words, plan, read_words

        if kwargs.get("use_safetensors") is False:
            raise ValueError("`use_safetensors`: got False, expected True; pickles are not read.")
        weight_name, subfolder = kwargs.pop("weight_name", None), kwargs.pop("subfolder", None)
        hub = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
        hub["token"] = kwargs.pop("hf_token", None)
        unknown = sorted(kwargs.keys() - set(IGNORED))
        if unknown:
            raise TypeError(f"load_textual_inversion: got the unknown arguments {', '.join(unknown)}.")
        given = pretrained_model_name_or_path
        sources = given if isinstance(given, list) else [given]
        names = token if isinstance(token, list) else [token]
        if len(sources) == 1 and len(names) > 1:
            tokens: list[Any] = [names]
        else:
            tokens = [None if name is None else [name] for name in (names * len(sources) if token is None else names)]
        if len(tokens) != len(sources):
            raise EmbeddingError(f"`token`: got {len(names)} names, expected one for each of {len(sources)} files.")
        readers = self._readers(tokenizer, text_encoder)
        words = [
            word
            for source, own in zip(sources, tokens, strict=True)
            for word in read_words(source, own, weight_name, subfolder, hub)
        ]
        if text_encoder is not None or tokenizer is not None:
            words = [word for word in words if word.part in (None, readers[0].part)] or words
        planned = plan(words, readers)
        self._without_offloading(lambda: add_words(planned))
        for reader, word in planned:
            logger.info("%s: %r, %d vectors, in `%s`.", word.where, word.token, len(word.vectors), reader.name)

    def unload_textual_inversion(
        self, tokens: str | list[str] | None = None, tokenizer: Any = None, text_encoder: Any = None
    ) -> None:
        """Removes learned words with all their vectors.

        Args:
            tokens: The words; all by default.
            tokenizer: Of `text_encoder`; the pipeline's by default.
            text_encoder: The only one that is to forget them; all by default.

        Raises:
            ValueError: There is no such word.
        """
        from hubgen.adaptation.textual_inversion import remove_words

        names = [tokens] if isinstance(tokens, str) else tokens
        readers = self._readers(tokenizer, text_encoder)
        self._without_offloading(lambda: remove_words(readers, names))

    def maybe_convert_prompt(self, prompt: str | list[str], tokenizer: Any) -> str | list[str]:
        """Prompts with all tokens of each learned word; calls and `encode_prompt` do it by themselves."""
        return spelled_out([prompt], tokenizer)[0] if isinstance(prompt, str) else spelled_out(prompt, tokenizer)

    def _readers(self, tokenizer: Any, text_encoder: Any) -> list[Any]:
        """The text encoders that are meant: all by default, else the one given, with its tokenizer."""
        from hubgen.adaptation.textual_inversion import Reader

        own: dict[str, tuple[Any, Any]] = {
            name: (getattr(self, name), getattr(self, name.replace("text_encoder", "tokenizer"))) for name in ENCODERS
        }
        if tokenizer is None and text_encoder is None:
            found = [Reader(name, *pair) for name, pair in own.items() if None not in pair]
            if not found:
                raise ValueError("`text_encoder`, `tokenizer`: got None, expected them: the pipeline has none.")
            return found
        meant = [
            name
            for name, (encoder, words) in own.items()
            if (text_encoder is None or encoder is text_encoder) and (tokenizer is None or words is tokenizer)
        ]
        name = (meant or ENCODERS)[0]
        text_encoder = own[name][0] if text_encoder is None else text_encoder
        tokenizer = own[name][1] if tokenizer is None else tokenizer
        for argument, value in (("text_encoder", text_encoder), ("tokenizer", tokenizer)):
            if value is None:
                raise ValueError(f"`{argument}`: got None, expected one: the pipeline has none.")
        return [Reader(name, text_encoder, tokenizer)]

    def _without_offloading(self: Any, act: Any) -> None:
        """Acts while weights lie where they belong."""
        offloaded = self._optionally_disable_offloading(self)
        try:
            act()
        finally:
            self._offload_again(*offloaded)
