"""LAION's tags: which of some prompts are nearest to a picture, and what follows.

    tags = Tags(model.texts(PROMPTS))                # (76, D)
    tags.columns(picture_embeddings)                 # nsfw, under_age_prompts, animal_prompts

What a picture may show is told by the two nearest of 35 prompts, and by those of 8 and of 33 others; the rules of a
recipe read their numbers (`hubgen.data.web.rules`: `nsfw_tag`, `under_age`, `animals`).

The prompts are LAION-400M's (https://laion.ai/blog/laion-400-open-dataset; words and order as in the workers' code,
github.com/rvencu/crawlingathome-gpu-hcloud). There, a comma is missing between the last animals and the first fashion
of prompt 5, which joins two prompts with "insectfashion" in the middle; here prompt 5 has the comma and stays one, so
that the numbers of all others are theirs, and the first unsafe one is 18. Many words are explicit.
"""

from typing import Any

import numpy as np

from hubgen.data.web.rules import nsfw_tag

NSFW = (
    "neutral",
    "selfie",
    "illustration, drawing",
    "toys, play, kids, children",
    "teddy bear, puppet",
    "animal, bird, mammal, insect, fashion, clothes",
    "logo, commercial, ad, advertisement",
    "drawing, painting",
    "anime, cartoon",
    "comedy, fun",
    "romance, love story",
    "thriller, suspense, crime story",
    "action, action movie",
    "horror, monster movie",
    "documentary",
    "news, journalism",
    "entertainment",
    "talk show",
    "porn, sex, sperm, nipples, breats, tits, boops, penis, dick, cock, clitoris, vagina, fuck, lust, horny, sexual, "
    "lick, licking",
    "porn, sex, sperm, nipples",
    "porn, sex, sperm, penis, dick, cock",
    "nipples, breasts, tits, boops, sexy",
    "penis, dick, cock",
    "clitoris, vagina",
    "sex, fuck, lust, horny, sexual, lick, licking",
    "porn, sex, sexy",
    "sexy, hot",
    "sperm, skin",
    "lust, horny, sexual",
    "lick, licking, body",
    "anime, hentai, sexy",
    "cartoon, sexy, sex",
    "hentai",
    "anime, sexy, breasts",
    "hentai",
)
"""35; those from `hubgen.data.web.rules.FIRST_UNSAFE` on are unsafe"""

UNDER_AGE = (
    "teenager, teen",
    "kid, child, teenager, teen, baby or toddler, underaged, little girl, little boy",
    "kid, child, little girl, little boy",
    "baby, toddler",
    "adult, woman, man, grownup, grown person,full-aged of legal age",
    "full-aged, of legal age, adult",
    "woman, man",
    "adult, woman, man, grownup, grown person,full-aged of legal age",
)
"""8; the first four name the young"""

ANIMALS = (
    "lifeless object, thing", "thing, object", "material", "furniture", "wall", "house", "tree", "wood", "ground",
    "industry", "table", "bed", "tool", "dress, clothes", "door", "chair", "rock, stone", "human", "man", "woman",
    "man, woman", "animal", "cat", "dog", "cow", "pig", "goat", "sheep", "elephant", "horse",
    "horse, elephant, pig, dog, cat, sheep, goat, animal", "life", "wildlife",
)  # fmt: skip
"""33; the first 21 are no animals"""

PROMPTS = (*NSFW, *UNDER_AGE, *ANIMALS)
NEAREST = 2
"""How many of each list are noted"""
COLUMNS = ("nsfw", "under_age_prompts", "animal_prompts")


class Tags:
    """Compares pictures with the prompts.

    Args:
        prompts: Embeddings of `PROMPTS`, (76, D).
    """

    def __init__(self, prompts: Any) -> None:
        ends = np.cumsum([len(NSFW), len(UNDER_AGE), len(ANIMALS)])
        if len(prompts) != ends[-1]:
            raise ValueError(f"`prompts`: got {len(prompts)} embeddings, expected {ends[-1]}, those of PROMPTS.")
        self._lists = np.split(np.asarray(prompts, np.float32), ends[:-1])

    def columns(self, pictures: Any) -> dict[str, list[Any]]:
        """`nsfw` (NSFW, UNSURE or UNLIKELY) of each picture, and the numbers of the nearest of the other prompts.

        Args:
            pictures: Embeddings, (N, D).
        """
        nearest = [self._nearest(pictures, prompts) for prompts in self._lists]
        return dict(zip(COLUMNS, ([nsfw_tag(pair) for pair in nearest[0]], *nearest[1:]), strict=True))

    def _nearest(self, pictures: Any, prompts: Any) -> list[list[int]]:
        """The numbers of the nearest prompts, of equally near ones the first."""
        order = np.argsort(-(pictures @ prompts.T), axis=1, kind="stable")
        found: list[list[int]] = order[:, :NEAREST].tolist()
        return found
