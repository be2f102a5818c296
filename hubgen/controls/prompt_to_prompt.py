"""Prompt-to-Prompt (2208.01626): pictures of edited prompts that keep the composition of the source prompt's.

    edit = PromptToPrompt("replace", cross_steps=0.8, self_steps=0.4)
    source, edited = pipe(["a red apple", "a green apple"], controls=[edit]).images

The first prompt is the source, all others are edits of it. All begin at the source's noise, and in early steps an edit
attends as the source does:

    U-Nets          cross-attention by the source's maps, moved to the edited prompt's tokens (`word_alignment`), and
                    self-attention of the coarser layers by the source's queries and keys, which makes equal maps
    SD3, FLUX       joint attention by the source's queries and keys of image tokens, those of the text stay
                    (2508.07519): whole maps would bring the source's text along
    DiT             self-attention alone, since classes are no words

Only the positive prompt's rows are edited. Source rows are computed as ever.

Shapes: P prompts or classes, n pictures of each, B = P n pictures, t = P - 1 edits, L image tokens, S text tokens,
H heads.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from hubgen.checks import is_number, is_whole
from hubgen.conditioning.guidance import POSITIVE
from hubgen.conditioning.predict import BackboneCall
from hubgen.controls.attention_maps import maps_to_text, takers_of_parts, token_grid
from hubgen.controls.control import Control, Prepared, Start, Target
from hubgen.controls.image_attention import WAYS, attention
from hubgen.controls.local_blend import Blending, LocalBlend, Share, covers, of_source, span_of
from hubgen.controls.word_alignment import Alignment, Reading, refined, replaced, unchanged
from hubgen.diffusers_contract import has_step_caches
from hubgen.layers.attention import AttentionCall, Part, QueryKeyValue, attention_maps

logger = logging.getLogger(__name__)

EDITS = ("replace", "refine", "reweight")
DEFAULT = "default_"
"""In `cross_steps` by words, that of all others; the paper's code has this name for it"""

CROSS_STEPS, SELF_STEPS, JOINT_STEPS = 0.8, 0.4, 0.2
"""Shares of the steps where none are given: of the paper's code, and of 2508.07519's for joint attention"""

CLEAREST: Mapping[int, Sequence[int]] = {24: (4, 5, 7, 8, 9), 38: (16, 18, 20, 21, 24), 57: (11, 12, 14, 17, 18)}
"""Blocks whose maps show best where a word is (2508.07519), of SD3 and SD3.5, SD3.5 large, and FLUX.1, by how many
joint attentions they have"""


class PromptToPrompt(Control):
    """Edits pictures by their prompts.

    The call's generator draws noise for the first prompt's pictures, and the edits begin at the same. A scheduler that
    draws noise in its steps (DDPM; DDIM with `eta`) needs a list of generators with one seed for a picture and its
    edits, to give them the same there too.

    Args:
        edit: "replace" swaps word for word, in prompts of equally many words; "refine" takes prompts of any length and
            keeps the attention of tokens that are in both; "reweight" keeps all of it. Joint attention has no maps of
            words that could be moved: there the three are the same.
        cross_steps: Share of the steps in which cross-attention is edited, from 0 to 1, or (start, end). By words, as
            `{"default_": 0.8, "green": (0, 0.3)}`, for these words of the edited prompts. `None`: 0.8. In joint
            attention it tells how long `weights` count.
        self_steps: Share of the steps in which image tokens attend to each other as the source's. `None`: 0.4, in joint
            attention 0.2.
        weights: By words of the edited prompts, how much more or less their tokens are looked at while cross-attention
            is edited. Maps are not normalised again, as in the paper. In joint attention this computes whole maps,
            (B, H, L + S, L + S).
        blend: Words to whose places the edit is kept, or a `LocalBlend`.
        blocks: Numbers of the layers whose image tokens attend as the source's, among those with self-attention or
            joint attention, as `attn_processors` lists them (in DiT, SD3 and FLUX: of the blocks). `None`: all. Models
            of few steps do better with some (2508.07519).
        self_tokens: Of a U-Net's layers, those of at most so many image tokens attend as the source's. `None`: a 16th
            of the latents (16x16 for 512 pixels, as in the paper's code).

    Raises:
        ValueError: A value is out of its range.
    """

    alone = True

    def __init__(
        self,
        edit: Literal["replace", "refine", "reweight"] = "replace",
        cross_steps: Share | Mapping[str, Share] | None = None,
        self_steps: Share | None = None,
        weights: Mapping[str, float] | None = None,
        blend: str | Sequence[str] | LocalBlend | None = None,
        blocks: Sequence[int] | None = None,
        self_tokens: int | None = None,
    ):
        if edit not in EDITS:
            raise ValueError(f"`edit`: got {edit!r}, expected one of {list(EDITS)}.")
        weights = {} if weights is None and edit != "reweight" else weights
        numbers = isinstance(weights, Mapping) and all(is_number(value) for value in weights.values())
        if not numbers or (edit == "reweight" and not weights):
            raise ValueError(f"`weights`: got {weights!r}, expected finite numbers by words, as in {{'red': 2.0}}.")
        if self_tokens is not None and not is_whole(self_tokens):
            raise ValueError(f"`self_tokens`: got {self_tokens!r}, expected a whole number, at least 1.")
        self.edit, self.weights, self.blocks, self.self_tokens = edit, dict(weights or {}), blocks, self_tokens
        shares = cross_steps if isinstance(cross_steps, Mapping) else {DEFAULT: cross_steps}
        self.cross_steps: dict[str, Share | None] = {DEFAULT: None, **shares}
        self.self_steps = self_steps
        if isinstance(blend, str | list | tuple):
            blend = LocalBlend(blend)
        if blend is not None and not isinstance(blend, LocalBlend):
            raise ValueError(f"`blend`: got {blend!r}, expected words or a LocalBlend.")
        self.blend = blend
        given = [("self_steps", self_steps), *(("cross_steps", share) for share in self.cross_steps.values())]
        for name, share in given:
            if share is not None:
                span_of(name, share)

    def check(self, target: Target) -> None:
        """Raises ValueError where the edit, the model and the prompts do not fit each other."""
        if target.batch == target.per_prompt:
            what = "prompt" if "tokens" in target.family.takes else "class_labels"
            raise ValueError(f"`{what}`: got one, expected a list: the source first, then one or more edits of it.")
        if has_step_caches(target.backbone):
            raise ValueError(
                "`controls`: got PromptToPrompt for a model with a step cache, expected one without "
                "(`disable_cache`): steps that are taken from the cache cannot be edited."
            )
        Layers.of(target.backbone, target.family.takes).check(target.backbone)
        for warning in Edited(self, target).warnings:
            logger.warning("%s", warning)

    def begin(self, target: Target, start: Start) -> Start:
        """All pictures begin where their source does."""

        def shared(values: torch.Tensor | None) -> torch.Tensor | None:
            return None if values is None else of_source(values, target.per_prompt)

        x_t = of_source(start.x_t, target.per_prompt)
        return Start(x_t, shared(start.data), shared(start.noise))

    def prepare(self, target: Target, start: Start) -> Prepared:
        return Edited(self, target)


@dataclass(frozen=True, eq=False)
class Layers:
    """The attention layers of a backbone, as the edit sees them."""

    reads: Literal["cross", "joint", None]
    """How it looks at words: by layers of their own, together with the image, or not at all"""
    cross: Sequence[str]
    """Names of processors of cross-attention"""
    own: Sequence[str]
    """Names of those in which image tokens attend to each other: self-attention, or joint attention"""
    levels: bool
    """Whether layers differ in their number of tokens (U-Nets)"""

    @classmethod
    def of(cls, backbone: Any, takes: Iterable[str]) -> "Layers":
        """Of a backbone whose family takes such conditions."""
        layers = {name: attention(backbone, name) for name in backbone.attn_processors}
        cross = [name for name, layer in layers.items() if looks_elsewhere(layer)]
        joint = not cross and "tokens" in takes
        own = [name for name, layer in layers.items() if (is_joint(layer) if joint else name not in cross)]
        levels = any(name.partition("_")[0] in WAYS for name in layers)
        return cls("cross" if cross else "joint" if joint else None, cross, own, levels)

    def check(self, backbone: Any) -> None:
        """Raises ValueError where a processor has no place for an edit."""
        for name in (*self.cross, *self.own):
            processor = backbone.attn_processors[name]
            if not hasattr(processor, "parts"):
                raise ValueError(
                    f"`controls`: got PromptToPrompt for {type(processor).__name__} of {type(backbone).__name__}, "
                    "expected processors that take parts, which hubgen's backbones have."
                )


def looks_elsewhere(layer: Any) -> bool:
    """Whether an attention layer has keys of the text alone."""
    return bool(getattr(layer, "is_cross_attention", False))


def is_joint(layer: Any) -> bool:
    """Whether image and text attend together in it: by projections of their own, or as one stream (FLUX)."""
    return getattr(layer, "added_kv_proj_dim", None) is not None or bool(getattr(layer, "pre_only", False))


class Words:
    """The prompts of a call, as its text encoders read them.

    Args:
        target: Of the call.

    Raises:
        ValueError: It has no prompts, or its text encoders do not all read the same.
    """

    def __init__(self, target: Target):
        condition, length = target.condition, target.max_sequence_length
        if not target.prompts or condition is None:
            raise ValueError(
                "`prompt`: got none, or others for the further text encoders, expected prompts that all of them read: "
                "PromptToPrompt looks up words in them."
            )
        self.prompts = list(target.prompts)
        self.texts = condition.in_order(length or condition.t5_tokens)
        self.length = sum(text.max_length for text in self.texts)
        """S"""
        self.places = [condition.word_places(prompt, length) for prompt in self.prompts]

    def columns(self, name: str, words: Iterable[str], first: int = 1) -> torch.Tensor:
        """(P, S) of truth values: the tokens of words, in the prompts from number `first` on.

        Raises:
            ValueError: A word is in none of these prompts, or beyond what is read of them.
        """
        found = torch.zeros(len(self.prompts), self.length, dtype=torch.bool)
        for word in words:
            for number, places in enumerate(self.places):
                if number >= first:
                    found[number, list(places.get(word, ()))] = True
            if not any(places.get(word) for places in self.places[first:]):
                known = sorted({one for places in self.places[first:] for one, own in places.items() if own})
                raise ValueError(f"`{name}`: got the word {word!r}, expected some of {known}.")
        return found

    def alignments(self, edit: str) -> list[Alignment]:
        """How maps of the source become those of each edited prompt; see `replaced` for errors."""
        (text,) = self.texts
        source, *targets = (Reading.of(text, prompt) for prompt in self.prompts)
        if edit == "reweight":
            return [unchanged(self.length)] * len(targets)
        align = replaced if edit == "replace" else refined
        return [align(source, one, self.length) for one in targets]


class Edited(Prepared):
    """Prompt-to-Prompt in one call.

    Args:
        control: What the user wants.
        target: Of the call.

    Raises:
        ValueError: The two do not fit each other.
    """

    def __init__(self, control: PromptToPrompt, target: Target):
        self.backbone, self.device, self.per_prompt = target.backbone, target.device, target.per_prompt
        self.targets, self.steps = target.batch // target.per_prompt - 1, len(target.timesteps)
        self.layers = Layers.of(target.backbone, target.family.takes)
        self.grid: tuple[int, int] | None = None if self.layers.reads is None else token_grid(target)
        self.generator, self.told_of_noise = target.generator, False
        self.warnings: list[str] = []
        """About what will have no effect"""
        self._plan_own(control, target)
        self._plan_words(control, target)
        # What the step is that is now being done.
        self.first = self.last = 0
        self.swapping = self.editing = self.watching = False
        self.now = self.table[0]
        self.noise: list[torch.Tensor] = []
        self.swapped = False
        """Whether the image tokens of some layer have attended as the source's"""

    def _plan_own(self, control: PromptToPrompt, target: Target) -> None:
        """Which layers attend by the source's queries and keys, and when."""
        layers, default = self.layers, JOINT_STEPS if self.layers.reads == "joint" else SELF_STEPS
        share = default if control.self_steps is None else control.self_steps
        self.own_span = span_of("self_steps", share)
        if self.own_span is not None and not any(covers(self.own_span, step, self.steps) for step in range(self.steps)):
            self.warnings.append(f"`self_steps` has no effect: {share} of {self.steps} steps is none of them.")
        numbers = checked_blocks("blocks", control.blocks, len(layers.own))
        self.own = {id(attention(self.backbone, layers.own[number])) for number in numbers}
        self.most_tokens: int | None = control.self_tokens
        if layers.levels and self.most_tokens is None:
            self.most_tokens = target.shape[2] * target.shape[3] // 16
        elif not layers.levels and self.most_tokens is not None:
            raise ValueError(
                f"`self_tokens`: got {self.most_tokens}, expected None: all layers of this model have equally many."
            )

    def _plan_words(self, control: PromptToPrompt, target: Target) -> None:
        """What happens to words, and when."""
        reads, steps = self.layers.reads, control.cross_steps
        default = 0.0 if reads is None else CROSS_STEPS
        spans = {word: span_of("cross_steps", default if share is None else share) for word, share in steps.items()}
        wanted = any(spans.values())
        self.blending: Blending | None = None
        self.table = torch.zeros(self.steps, 1, 1, 1, dtype=torch.bool)
        """(steps, t, 1, S) of truth values: which tokens of the text are edited"""
        if reads is None:
            self._refuse_words(control, wanted)
        elif reads == "joint" and not control.weights:
            if wanted and (len(steps) > 1 or steps[DEFAULT] is not None):
                self.warnings.append(
                    "`cross_steps` has no effect without `weights`: this model's text and image attend jointly, and "
                    "`self_steps` says how long as the source's."
                )
            wanted = False
        if wanted or control.blend is not None:
            words = Words(target)
            if wanted:
                self._plan_maps(control, words, spans)
            if control.blend is not None:
                self._plan_blend(control.blend, words)
        self.active = self.table.flatten(1).any(1).tolist()
        if wanted and not any(self.active):
            self.warnings.append(
                f"`cross_steps` has no effect: {list(steps.values())} of {self.steps} steps is none of them."
            )
        self.table = self.table.to(self.device)

    def _refuse_words(self, control: PromptToPrompt, wanted: bool) -> None:
        """For models without text, raises ValueError for edits of words."""
        given = {"edit": control.edit != "replace", "cross_steps": wanted, "blend": control.blend is not None}
        for name in (name for name, asked in {**given, "weights": bool(control.weights)}.items() if asked):
            raise ValueError(
                f"`{name}`: got {getattr(control, name)!r}, expected none: this model reads no words, and "
                "`self_steps` alone edits its pictures."
            )

    def _plan_maps(self, control: PromptToPrompt, words: Words, spans: Mapping[str, Any]) -> None:
        """The edit of maps, for (t, n, H, L, S) of them."""
        weights = torch.ones(len(words.prompts), words.length)
        for word, weight in control.weights.items():
            weights[words.columns("weights", [word])] = weight
        self.weights = weights[1:, None, None, None].to(self.device)  # (t, 1, 1, 1, S)
        table = torch.zeros(self.steps, len(words.prompts), words.length, dtype=torch.bool)
        own = {word: words.columns("cross_steps", [word]) for word in spans if word != DEFAULT}
        for step in range(self.steps):
            table[step] = covers(spans[DEFAULT], step, self.steps)
            for word, columns in own.items():
                table[step, columns] = covers(spans[word], step, self.steps)
        self.table = table[:, 1:, None]  # (steps, t, 1, S)
        if self.layers.reads == "cross":
            alignments = words.alignments(control.edit)
            self.mapper = torch.stack([one.mapper for one in alignments])[:, None, None].to(self.device)
            known = torch.stack([one.known for one in alignments])
            self.known = known[:, None, None, None].to(self.device)  # (t, 1, 1, 1, S)

    def _plan_blend(self, blend: LocalBlend, words: Words) -> None:
        """Whose maps tell where the words are."""
        joint, layers = self.layers.reads == "joint", self.layers
        if blend.blocks is not None and not joint:
            raise ValueError(f"`blocks`: got {blend.blocks!r} for `blend`, expected None: a U-Net has no such blocks.")
        columns = words.columns("blend", blend.names, first=0)
        for number in range(1, len(words.prompts)):
            if not (columns[0] | columns[number]).any():
                raise ValueError(
                    f"`blend`: got {blend.names}, expected a word that is in {words.prompts[0]!r} or "
                    f"{words.prompts[number]!r}."
                )
        share = ((0.0, 0.5) if joint else (0.2, 1.0)) if blend.steps is None else blend.steps
        assert self.grid is not None
        self.blending = Blending(
            columns.to(self.device), self.per_prompt, self.grid, joint, blend.threshold, span_of("steps", share)
        )
        if joint:
            chosen = CLEAREST.get(len(layers.own)) if blend.blocks is None else blend.blocks
            names = [layers.own[number] for number in checked_blocks("blocks", chosen, len(layers.own))]
        else:
            names = [name for name in layers.cross if not name.startswith("mid_")] or list(layers.cross)
        self.watched = {id(attention(self.backbone, name)) for name in names}

    # ---- the call ----

    def before_call(self, call: BackboneCall) -> None:
        rows, step = call.rows(POSITIVE), call.step
        self.first, self.last = rows.start, rows.stop
        self.swapping = covers(self.own_span, step, self.steps)
        self.editing, self.now = self.active[step], self.table[step]
        self.watching = self.blending is not None and self.blending.watches(step, self.steps)
        self.noise = self.drawn_so_far()

    def parts(self) -> Mapping[str, Any]:
        found: dict[str, Part] = {}
        if self.own_span is not None or (self.layers.reads == "joint" and self.looks):
            found |= dict.fromkeys(takers_of_parts(self.backbone, lambda layer: not looks_elsewhere(layer)), Own(self))
        if self.layers.reads == "cross" and self.looks:
            found |= dict.fromkeys(takers_of_parts(self.backbone, looks_elsewhere), Cross(self))
        return found

    @property
    def looks(self) -> bool:
        """Whether some step edits maps of words, or looks at them."""
        return any(self.active) or (self.blending is not None and self.blending.span is not None)

    def after_step(self, step: int, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        self._tell_of_noise()
        if self.swapping and not self.swapped:
            logger.warning(
                "`self_steps` has no effect: no layer has at most %s image tokens; `self_tokens` sets another limit.",
                self.most_tokens,
            )
            self.own_span = None
        if self.blending is not None and covers(self.blending.span, step, self.steps):
            latents = self.blending.blended(latents)
        return latents

    def drawn_so_far(self) -> list[torch.Tensor]:
        """The states of the generators that the scheduler draws from."""
        if self.generator is None:
            on_cuda = self.device.type == "cuda"
            return [torch.cuda.get_rng_state(self.device) if on_cuda else torch.get_rng_state()]
        generators = self.generator if isinstance(self.generator, list) else [self.generator]
        return [generator.get_state() for generator in generators]

    def _tell_of_noise(self) -> None:
        """Warns once of a scheduler that gives a picture and its edits different noise."""
        if self.told_of_noise:
            return
        states, n = self.drawn_so_far(), self.per_prompt
        if all(torch.equal(before, after) for before, after in zip(self.noise, states, strict=True)):
            return
        each = len(states) == n * (self.targets + 1)
        if not each or not all(torch.equal(state, states[i % n]) for i, state in enumerate(states)):
            self.told_of_noise = True
            logger.warning(
                "The scheduler draws noise in its steps, other noise for the source and its edits, which drift apart "
                "by it. Choose one that draws none (DDIM), or give `generator` a list with one for each picture, of "
                "equal seeds for a picture and its edits."
            )

    # ---- the edits ----

    def as_source(self, x: torch.Tensor, tokens: slice) -> torch.Tensor:
        """Queries or keys, (rows, tokens, H, D), with the source's in the rows of its edits, for some of the tokens."""
        first, n = self.first, self.per_prompt
        x = x.clone()
        x[first + n : self.last, tokens] = x[first : first + n, tokens].repeat(self.targets, 1, 1, 1)
        return x

    def swaps(self, call: AttentionCall) -> bool:
        """Whether the image tokens of a layer attend as the source's now."""
        limit = self.most_tokens
        small = limit is None or call.image.stop - call.image.start <= limit
        return self.swapping and small and id(call.attn) in self.own

    def moved(self, probabilities: torch.Tensor) -> torch.Tensor:
        """Maps of cross-attention, (rows, H, L, S), in which edits look where the source does."""
        middle, last = self.first + self.per_prompt, self.last
        source = probabilities[self.first : middle]  # (n, H, L, S)
        own = probabilities[middle:last].unflatten(0, (self.targets, self.per_prompt))  # (t, n, H, L, S)
        edited = torch.where(self.known, source @ self.mapper, own) * self.weights
        edited = torch.where(self.now[:, None, None], edited, own).flatten(0, 1)
        return torch.cat([probabilities[:middle], edited, probabilities[last:]])

    def weighted(self, call: AttentionCall, probabilities: torch.Tensor) -> torch.Tensor:
        """Maps of joint attention, (rows, H, L + S, L + S), in which edits look more or less at some words."""
        weights = torch.where(self.now[:, None, None], self.weights, 1.0).flatten(1, 3)  # (t, 1, S)
        text = slice(call.text.start, call.text.start + weights.shape[-1])
        probabilities = probabilities.clone()
        rows = probabilities[self.first + self.per_prompt : self.last, :, call.image, text]  # (t n, H, L, S)
        rows *= weights.repeat_interleave(self.per_prompt, 0)[:, None]
        return probabilities

    def watch(self, call: AttentionCall, query: torch.Tensor, key: torch.Tensor) -> None:
        """Notes where the words of joint attention are, picture by picture, since whole maps are large."""
        assert self.blending is not None and self.grid is not None
        found = []
        for row in range(self.first, self.last):
            maps = attention_maps(query[row : row + 1], key[row : row + 1])
            to_text = maps_to_text(call, maps, self.grid)
            assert to_text is not None
            found.append(to_text.mean(1))  # (1, L, S)
        self.blending.add(torch.cat(found))


class EditPart(Part):
    """The edit's share of attention layers.

    Args:
        edited: The edit, which knows the step.
    """

    def __init__(self, edited: Edited):
        self.edited = edited

    def watches(self, call: AttentionCall) -> bool:
        """Whether this layer's maps tell where words are, now."""
        return self.edited.watching and id(call.attn) in self.edited.watched


class Own(EditPart):
    """Of self-attention and joint attention."""

    @property
    def wants_maps(self) -> bool:
        return self.edited.editing and self.edited.layers.reads == "joint"

    def edit(self, call: AttentionCall, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> QueryKeyValue:
        edited = self.edited
        if self.watches(call) and call.text.stop > call.text.start:
            edited.watch(call, query, key)
        if edited.swaps(call):
            edited.swapped = True
            query, key = edited.as_source(query, call.image), edited.as_source(key, call.image)
        return query, key, value

    def maps(self, call: AttentionCall, probabilities: torch.Tensor) -> torch.Tensor:
        if call.text.stop == call.text.start:
            return probabilities
        return self.edited.weighted(call, probabilities)


class Cross(EditPart):
    """Of cross-attention."""

    @property
    def wants_maps(self) -> bool:
        return self.edited.editing or self.edited.watching

    def maps(self, call: AttentionCall, probabilities: torch.Tensor) -> torch.Tensor:
        edited = self.edited
        if not looks_elsewhere(call.attn):
            return probabilities
        if edited.editing:
            probabilities = edited.moved(probabilities)
        if self.watches(call):
            assert edited.blending is not None
            edited.blending.add(probabilities[edited.first : edited.last].mean(1))  # (B, L, S)
        return probabilities


def checked_blocks(name: str, blocks: Sequence[int] | None, count: int) -> Sequence[int]:
    """Numbers of layers; `None` means all `count`.

    Raises:
        ValueError: There are no such layers.
    """
    if blocks is None:
        return range(count)
    if not isinstance(blocks, list | tuple | range) or not all(is_whole(one, 0, count - 1) for one in blocks):
        raise ValueError(f"`{name}`: got {blocks!r}, expected a list of numbers from 0 to {count - 1}.")
    return blocks
