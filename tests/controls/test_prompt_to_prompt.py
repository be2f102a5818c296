"""Prompt-to-Prompt: rows of equal prompts stay equal, the source stays as it was, edits attend as it does where told.

Calls have two prompts, with guidance: four rows, at which equal rows come out equal to the last bit on a CPU.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from hubgen.conditioning.text import TextCondition
from hubgen.controls.attention_maps import takers_of_parts
from hubgen.controls.control import Control, Prepared, Start, Target
from hubgen.controls.local_blend import Blending, LocalBlend, span_of
from hubgen.controls.prompt_to_prompt import Edited, PromptToPrompt, looks_elsewhere
from hubgen.controls.word_alignment import Reading, refined, replaced
from hubgen.diffusers_contract import has_step_caches
from hubgen.layers.attention import AttentionCall, Part
from hubgen.pipelines.class_to_image import ClassToImagePipeline
from hubgen.pipelines.text_to_image import TextToImagePipeline
from hubgen.schedulers.ddim import DDIMScheduler
from tests import models
from tests.benchmarks import edit_figures, edits
from tests.official import clip_text, clip_tokenizer
from tests.official_images import picture

Official = Callable[[str], Path]
Pipes = Callable[[str], Any]

U_NETS, JOINT = ["sd1", "sdxl"], ["sd3", "sd3.5", "flux-dev"]
WITH_WORDS = [*U_NETS, *JOINT]
SOURCE, EDIT = "a red cat", "a blue cat"
STEPS = 4
ALL_TOKENS = {"self_tokens": 64}
"""Of tiny U-Nets' layers, so that they have some that are edited"""
MAPPERS = Path(__file__).with_name("prompt_to_prompt_mappers.json")


def drawn(pipe: Any, prompts: list[Any], *controls: Control, **options: Any) -> torch.Tensor:
    """Latents of a call that begins at the same noise for all prompts, and guides."""
    size = options.setdefault("height", 32), options.setdefault("width", 32)
    shape = pipe.latent_space.shape(1, size)
    pictures = len(prompts) * options.get("num_images_per_prompt", 1)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1)).repeat(pictures, 1, 1, 1)
    call = {
        **({"class_labels": prompts} if isinstance(pipe, ClassToImagePipeline) else {"prompt": prompts}),
        **({"true_cfg_scale": 3.0, "negative_prompt": "a dog"} if pipe.family.distilled else {"guidance_scale": 3.0}),
        **{"num_inference_steps": STEPS, "output_type": "latent", "latents": noise},
    }
    return pipe(**{**call, **options}, controls=list(controls)).images


def edit_of(pipe: Any, **settings: Any) -> PromptToPrompt:
    """An edit that also takes hold of a tiny U-Net's self-attention."""
    levels = hasattr(pipe.backbone, "mid_block")
    return PromptToPrompt(**{**(ALL_TOKENS if levels else {}), **settings})


class Seeing(Control):
    """What attention layers get and give, in the order of calls: maps, and joint attention's queries and keys."""

    def __init__(self, maps: bool = False, until: float = 1.0):
        self.with_maps, self.until = maps, until
        self.maps: list[tuple[int, torch.Tensor]] = []
        self.asked: list[tuple[int, AttentionCall, torch.Tensor, torch.Tensor]] = []

    def prepare(self, target: Target, start: Start) -> Prepared:
        seeing = self

        class Sees(Part):
            step = 0

            @property
            def wants_maps(self) -> bool:
                return seeing.with_maps and (self.step + 1) / len(target.timesteps) <= seeing.until

            def edit(self, call: AttentionCall, query: Any, key: Any, value: Any) -> Any:
                seeing.asked.append((self.step, call, query, key))
                return query, key, value

            def maps(self, call: AttentionCall, probabilities: torch.Tensor) -> torch.Tensor:
                seeing.maps.append((self.step, probabilities))
                return probabilities

        part = Sees()

        class InCall(Prepared):
            def before_call(self, call: Any) -> None:
                part.step = call.step

            def parts(self) -> Mapping[str, Any]:
                backbone: Any = target.backbone
                cross = any(looks_elsewhere(layer) for layer in backbone.modules())
                return dict.fromkeys(takers_of_parts(backbone, looks_elsewhere if cross else lambda layer: True), part)

        return InCall()


# ---- which token stands for which ----


def test_tokens_are_aligned_as_by_the_papers_algorithm_on_200_pairs() -> None:
    """Found by the functions of diffusers' community pipeline, which are the paper's; the file says how."""
    text, length = TextCondition(clip_text(), clip_tokenizer()), 77
    pairs = json.loads(MAPPERS.read_text(encoding="utf-8"))["pairs"]
    assert len(pairs) == 200
    swaps = 0
    for source, target, refine, replace in pairs:
        one, other = Reading.of(text, source), Reading.of(text, target)
        expected, known = torch.eye(length), torch.ones(length, dtype=torch.bool)
        for token, counterpart in enumerate(refine):
            expected[:, token] = 0
            if counterpart == -1:
                known[token] = False
            else:
                expected[counterpart, token] = 1
        found = refined(one, other, length)
        assert torch.equal(found.mapper, expected) and torch.equal(found.known, known), (source, target)
        if replace is None:
            with pytest.raises(ValueError, match="swaps word for word"):
                replaced(one, other, length)
            continue
        expected = torch.eye(length)
        for row, column, share in replace:
            expected[row, column] = share
        found = replaced(one, other, length)
        torch.testing.assert_close(found.mapper, expected, rtol=0, atol=1e-6)
        assert found.known.all()
        swaps += bool(replace)
    assert swaps == 50


def test_a_learned_word_is_one_word() -> None:
    tokenizer = clip_tokenizer()
    tokenizer.add_tokens(["<me>", "<me>_1"])
    reading = Reading.of(TextCondition(clip_text(), tokenizer), "a <me> cat")
    assert reading.words == ["a", "<me>", "cat"] and reading.places == [[1], [2, 3], [4]]


# ---- truths of every backbone ----


@pytest.mark.parametrize("name", [*WITH_WORDS, "dit"])
def test_equal_prompts_give_equal_pictures(name: str, pipes: Pipes) -> None:
    pipe = pipes(name)
    if name == "dit":
        source, same = drawn(pipe, [1, 1], edit_of(pipe, self_steps=0.5))
    else:
        edit = edit_of(pipe, cross_steps=0.5, self_steps=0.75, blend="cat")
        source, same = drawn(pipe, [SOURCE, SOURCE], edit)
    assert torch.equal(same, source)


@pytest.mark.parametrize("name", [*WITH_WORDS, "dit"])
def test_an_edit_of_no_steps_is_a_plain_call_and_none_leaves_anything_behind(name: str, pipes: Pipes) -> None:
    pipe = pipes(name)
    prompts: list[Any] = [1, 2] if name == "dit" else [SOURCE, EDIT]
    plain = drawn(pipe, prompts)
    assert torch.equal(drawn(pipe, prompts, edit_of(pipe, cross_steps=0, self_steps=0)), plain)
    edited = drawn(pipe, prompts, edit_of(pipe, self_steps=1.0))
    assert (edited[1] - plain[1]).abs().max() > 0.01 * plain.std()
    assert not any(getattr(processor, "parts", ()) for processor in pipe.backbone.attn_processors.values())
    assert torch.equal(drawn(pipe, prompts), plain)


@pytest.mark.parametrize("name", [*WITH_WORDS, "dit"])
def test_the_source_is_what_it_is_without_its_edit(name: str, pipes: Pipes) -> None:
    """To the last bit. Beside edited maps: without the edit, but with the same layers computed by maps."""
    pipe = pipes(name)
    prompts: list[Any] = [1, 2] if name == "dit" else [SOURCE, EDIT]
    plain = drawn(pipe, prompts)
    of_layers = drawn(pipe, prompts, edit_of(pipe, cross_steps=0, self_steps=1.0))
    assert torch.equal(of_layers[0], plain[0]) and not torch.equal(of_layers[1], plain[1])
    if name == "dit":
        return
    weights = {} if name in U_NETS else {"weights": {"blue": 3.0}}
    of_maps = drawn(pipe, prompts, edit_of(pipe, cross_steps=0.5, self_steps=1.0, **weights))
    looked_at = drawn(pipe, prompts, Seeing(maps=True, until=0.5))
    if name != "sd3.5":  # its second attention, of the image alone, is not edited, and here looked at
        assert torch.equal(of_maps[0], looked_at[0])
    assert (of_maps[0] - plain[0]).abs().max() < 1e-4 * plain.std()
    assert not torch.equal(of_maps[1], of_layers[1])


@pytest.mark.parametrize("name", ["sd1", "sd3", "dit"])
def test_each_picture_of_a_prompt_is_edited_by_its_own_source(name: str, pipes: Pipes) -> None:
    """One generator draws noise for the source's pictures; those of all other prompts begin at the same."""
    pipe = pipes(name)
    settings: dict[str, Any] = {"num_images_per_prompt": 2} if name != "dit" else {"num_images_per_label": 2}
    noise = {"latents": None, "generator": torch.Generator().manual_seed(5)}
    prompt: Any = 1 if name == "dit" else SOURCE
    pictures = drawn(pipe, [prompt] * 2, edit_of(pipe, self_steps=0.5), **{**settings, **noise})
    assert torch.equal(pictures[:2], pictures[2:]) and not torch.equal(pictures[0], pictures[1])


@pytest.mark.parametrize("name", ["sdxl", "flux-dev"])
def test_several_edits_of_a_source_are_those_of_calls_of_their_own(name: str, pipes: Pipes) -> None:
    pipe = pipes(name)
    edit = edit_of(pipe, cross_steps=0.5, self_steps=0.5)
    together = drawn(pipe, [SOURCE, EDIT, "the red dog"], edit, num_inference_steps=2)
    for number, prompt in enumerate((EDIT, "the red dog"), 1):
        alone = drawn(pipe, [SOURCE, prompt], edit, num_inference_steps=2)
        torch.testing.assert_close(together[[0, number]], alone, rtol=1e-3, atol=1e-3 * alone.std().item())


@pytest.mark.parametrize("name", ["sd1", "sd3"])
def test_a_given_picture_is_edited_from_its_inversion(name: str, official: Official) -> None:
    pipe = TextToImagePipeline.from_pretrained(official(name))
    pipe.set_progress_bar_config(disable=True)
    if name == "sd1":
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    inversion = pipe.invert(picture(1).resize((32, 32)), SOURCE, num_inference_steps=STEPS)
    edit, call = edit_of(pipe, cross_steps=0, self_steps=0.5), {"guidance_scale": 3.0, "output_type": "latent"}
    plain = pipe.reconstruct(inversion, [SOURCE, EDIT], **call).images
    edited = pipe.reconstruct(inversion, [SOURCE, EDIT], controls=[edit], **call).images
    same = pipe.reconstruct(inversion, [SOURCE, SOURCE], controls=[edit], **call).images
    assert torch.equal(edited[0], plain[0]) and not torch.equal(edited[1], plain[1])
    assert torch.equal(same[1], same[0])


# ---- U-Nets: maps ----


@pytest.mark.parametrize("name", U_NETS)
def test_unchanged_words_keep_the_sources_maps_and_a_replaced_one_takes_its_words(name: str, pipes: Pipes) -> None:
    pipe, seeing = pipes(name), Seeing(maps=True)
    drawn(pipe, [SOURCE, EDIT], edit_of(pipe, cross_steps=0.5, self_steps=0), seeing)
    assert {step for step, _ in seeing.maps} == set(range(len(pipe.scheduler.timesteps)))
    for step, maps in seeing.maps:
        _, _, source, target = maps  # the negative branch comes first
        if (step + 1) / len(pipe.scheduler.timesteps) <= 0.5:
            assert torch.equal(target, source)  # a word of one token for one of one token: all columns
        else:
            assert not torch.equal(target, source)


@pytest.mark.parametrize("name", U_NETS)
def test_what_is_new_in_a_refined_prompt_has_maps_of_its_own(name: str, pipes: Pipes) -> None:
    pipe, own, edited = pipes(name), Seeing(maps=True), Seeing(maps=True)
    prompts, settings = [SOURCE, "a big red cat"], {"num_inference_steps": 1}
    drawn(pipe, prompts, own, **settings)
    drawn(pipe, prompts, edit_of(pipe, edit="refine", cross_steps=1.0, self_steps=0), edited, **settings)
    places = pipe.condition.word_places(prompts[1])
    kept, new = [0, *places["a"]], list(places["big"])
    after = [*places["red"], *places["cat"]]
    for (_, maps), (_, plain) in zip(edited.maps[:1], own.maps[:1], strict=True):
        source, target = maps[2], maps[3]
        assert torch.equal(target[..., kept], source[..., kept])
        assert torch.equal(target[..., after], source[..., [place - 1 for place in after]])
        assert torch.equal(target[..., new], plain[3][..., new])
        assert torch.equal(maps[:3], plain[:3])  # the negative prompt's rows and the source's


@pytest.mark.parametrize("name", WITH_WORDS)
def test_a_word_is_looked_at_as_many_times_as_its_weight_says(name: str, pipes: Pipes) -> None:
    """In the first step, where nothing else differs yet; and of joint attention for image tokens alone."""
    pipe, plain, edited = pipes(name), Seeing(maps=True), Seeing(maps=True)
    prompts, settings = [EDIT, EDIT], {"num_inference_steps": 1}
    drawn(pipe, prompts, plain, **settings)
    edit = edit_of(pipe, edit="reweight", cross_steps=1.0, self_steps=0, weights={"blue": 3.0, "cat": 0.5})
    drawn(pipe, prompts, edit, edited, **settings)
    words, call = pipe.condition.word_places(EDIT), edited.asked[0][1]
    maps, expected = edited.maps[0][1], plain.maps[0][1].clone()
    first = call.text.start
    for word, weight in (("blue", 3.0), ("cat", 0.5)):
        columns = torch.tensor(words[word]) + first
        image = torch.arange(maps.shape[2])[call.image]
        expected[3, :, image[:, None], columns] *= weight
    assert torch.equal(maps, expected) and not torch.equal(maps, plain.maps[0][1])


def test_words_may_be_edited_for_a_time_of_their_own(pipes: Pipes) -> None:
    pipe, seeing = pipes("sd1"), Seeing(maps=True)
    shares = {"default_": 1.0, "blue": (0.5, 1.0), "cat": 0}
    drawn(pipe, [SOURCE, EDIT], edit_of(pipe, cross_steps=shares, self_steps=0), seeing)
    words, steps = pipe.condition.word_places(EDIT), len(pipe.scheduler.timesteps)
    for step, maps in seeing.maps[len(seeing.maps) // steps :]:  # from the second step on latents differ
        for word, edited in (("a", True), ("blue", step / steps >= 0.5), ("cat", False)):
            columns = list(words[word])
            assert torch.equal(maps[3][..., columns], maps[2][..., columns]) == edited, (step, word)


# ---- joint attention and DiT: queries and keys ----


@pytest.mark.parametrize("name", [*JOINT, "dit"])
def test_image_tokens_attend_as_the_sources_in_the_chosen_blocks_and_steps_alone(name: str, pipes: Pipes) -> None:
    pipe, seeing = pipes(name), Seeing()
    prompts: list[Any] = [1, 2] if name == "dit" else [SOURCE, EDIT]
    drawn(pipe, prompts, edit_of(pipe, self_steps=(0.25, 0.75), blocks=[1, 2]), seeing)
    order, seen = [], []
    for step, call, query, key in seeing.asked:
        alone = call.text.stop == call.text.start
        if name == "sd3.5" and alone:
            continue  # a second attention of the image alone, which stays as it is
        if id(call.attn) not in order:
            order.append(id(call.attn))
        block, image = order.index(id(call.attn)), call.image
        q, k = query[2:, image].transpose(1, 2), key[2:, image].transpose(1, 2)  # the positive prompts'
        products = q @ k.mT  # q_i k_i^T, (2, H, T, T)
        chosen = block in (1, 2) and step in (1, 2)
        assert torch.equal(products[1], products[0]) == chosen, (step, block)
        if not alone:
            assert not torch.equal(query[3, call.text], query[2, call.text])
        seen.append(chosen)
    assert any(seen) and len(order) > 2


# ---- local blend ----


class Kept(PromptToPrompt):
    """Keeps what it was in the last call."""

    last: Edited

    def prepare(self, target: Target, start: Start) -> Prepared:
        self.last = Edited(self, target)
        return self.last


@pytest.mark.parametrize("name", WITH_WORDS)
def test_outside_the_words_places_latents_are_the_sources(name: str, pipes: Pipes) -> None:
    """The maps of random weights are flat, which takes a high threshold."""
    pipe, settings = pipes(name), {"cross_steps": 0.5, "self_steps": 0.25}
    size = {"height": 64, "width": 48}
    kept = {} if name in JOINT else ALL_TOKENS
    edit = Kept(**settings, **kept, blend=LocalBlend(["cat"], threshold=0.95, steps=(0, 1)))
    source, edited = drawn(pipe, [SOURCE, EDIT], edit, **size)
    assert edit.last.blending is not None
    inside = edit.last.blending.mask((16, 12))[1, 0]
    assert 0.1 < inside.float().mean() < 0.9
    assert torch.equal(edited[:, ~inside], source[:, ~inside])
    assert not torch.equal(edited[:, inside], source[:, inside])
    without = drawn(pipe, [SOURCE, EDIT], edit_of(pipe, **settings), **size)
    assert not torch.equal(without[1][:, ~inside], without[0][:, ~inside])


def test_a_mask_is_where_source_or_edit_look_at_the_words_and_next_to_it() -> None:
    columns = torch.tensor([[False, True, False], [False, False, True]])
    blending = Blending(columns, 1, (16, 16), smooth=False, threshold=0.5, span=span_of("steps", 1.0))
    maps = torch.zeros(2, 64, 3)  # of a layer of 8x8 tokens, as U-Nets have them
    maps[0, 8 * 2 + 2, 1] = 1.0  # the source looks at its word here
    maps[1, 8 * 6 + 6, 2] = 0.5  # the edit there
    maps[1, 8 * 4 + 2, 0] = 9.0  # at another word
    maps[1, 8 * 2 + 6, 2] = 0.2  # too little
    blending.add(maps)
    expected = torch.zeros(2, 1, 8, 8, dtype=torch.bool)
    expected[0, 0, 1:4, 1:4] = expected[1, 0, 1:4, 1:4] = expected[1, 0, 5:8, 5:8] = True
    large = expected.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.equal(blending.mask((16, 16)), large)
    fine = torch.zeros(2, 256, 3)
    fine[:, 0] = 100.0
    blending.add(fine)  # a finer layer is not looked at
    assert torch.equal(blending.mask((16, 16)), large)


# ---- noise ----


def test_a_scheduler_that_draws_noise_draws_the_same_for_a_picture_and_its_edits_or_it_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """DDPM's steps are random."""
    pipe, edit = models.pipeline("unet"), PromptToPrompt(self_tokens=64)

    def call(generator: Any) -> torch.Tensor:
        options = {"num_inference_steps": 3, "output_type": "latent", "guidance_scale": 3.0}
        return pipe([SOURCE, SOURCE], generator=generator, controls=[edit], **options).images

    source, same = call(models.seeded(1, 1))
    assert torch.equal(source, same) and not caplog.records
    source, other = call(torch.Generator().manual_seed(1))
    assert not torch.equal(source, other)
    assert [record.message.partition(",")[0] for record in caplog.records] == ["The scheduler draws noise in its steps"]


# ---- what does not fit ----


def test_what_does_not_fit_is_named(pipes: Pipes) -> None:
    sd1, flux, dit = pipes("sd1"), pipes("flux-dev"), pipes("dit")
    cases: list[tuple[Any, list[Any], PromptToPrompt, dict[str, Any], str]] = [
        (sd1, [SOURCE], PromptToPrompt(), {}, "`prompt`: got one, expected a list"),
        (dit, [1], PromptToPrompt(), {}, "`class_labels`: got one, expected a list"),
        (sd1, [SOURCE, "a cat"], PromptToPrompt(), {}, "`prompt`: got 2 words in 'a cat', expected 3"),
        (sd1, [SOURCE, EDIT], PromptToPrompt("reweight", weights={"red": 2}), {}, "`weights`: got the word 'red'"),
        (flux, [SOURCE, EDIT], PromptToPrompt(weights={"dog": 2}), {}, r"'dog', expected some of \['a', 'blue', 'cat'"),
        (sd1, [SOURCE, EDIT], PromptToPrompt(blend="dog"), {}, "`blend`: got the word 'dog'"),
        (sd1, [SOURCE, EDIT, "a dog box"], PromptToPrompt(blend="blue"), {}, "`blend`: .* is in 'a red cat' or 'a dog"),
        (sd1, [SOURCE, EDIT], PromptToPrompt(cross_steps={"red": 1}), {}, "`cross_steps`: got the word"),
        (dit, [1, 2], PromptToPrompt(cross_steps=0.5), {}, "`cross_steps`: got .*, expected none: this model reads no"),
        (dit, [1, 2], PromptToPrompt("refine"), {}, "`edit`: got 'refine', expected none"),
        (dit, [1, 2], PromptToPrompt(weights={"cat": 2}), {}, "`weights`: got .*, expected none"),
        (dit, [1, 2], PromptToPrompt(blend="cat"), {}, "`blend`: got .*, expected none"),
        (dit, [1, 2], PromptToPrompt(blocks=[3]), {}, r"`blocks`: got \[3\], expected a list of numbers from 0 to 2"),
        (dit, [1, 2], PromptToPrompt(self_tokens=4), {}, "`self_tokens`: got 4, expected None"),
        (sd1, [SOURCE, EDIT], PromptToPrompt(blend=LocalBlend("cat", blocks=[0])), {}, "`blocks`: .* for `blend`"),
        (flux, [SOURCE, EDIT], PromptToPrompt(blend="cat"), {"prompt_2": "a dog"}, "`prompt`: got none, or others"),
    ]  # fmt: skip
    for pipe, prompts, edit, options, message in cases:
        with pytest.raises(ValueError, match=message):
            drawn(pipe, prompts, edit, **options)
    with pytest.raises(ValueError, match="got 2 PromptToPrompt, expected at most one"):
        drawn(sd1, [SOURCE, EDIT], PromptToPrompt(), PromptToPrompt())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"edit": "swap"}, "`edit`: got 'swap'"),
        ({"edit": "reweight"}, "`weights`: got None"),
        ({"weights": {"a": float("nan")}}, "`weights`: got"),
        ({"weights": [2.0]}, r"`weights`: got \[2.0\]"),
        ({"cross_steps": 1.5}, "`cross_steps`: got 1.5, expected a number from 0 to 1"),
        ({"cross_steps": {"a": -1}}, "`cross_steps`: got -1"),
        ({"self_steps": (0.5, 0.5)}, r"`self_steps`: got \(0.5, 0.5\)"),
        ({"self_steps": True}, "`self_steps`: got True"),
        ({"self_tokens": 0}, "`self_tokens`: got 0"),
        ({"blend": []}, r"`blend`: got \[\]"),
        ({"blend": 3}, "`blend`: got 3"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PromptToPrompt(**settings)


def test_embeddings_have_no_words_but_image_tokens(pipes: Pipes) -> None:
    pipe = pipes("sd1")
    positive, negative = pipe.encode_prompt([SOURCE, EDIT], None, 1, True)
    given = {"prompt": None, "prompt_embeds": positive, "negative_prompt_embeds": negative}
    with pytest.raises(ValueError, match="`prompt`: got none, or others"):
        drawn(pipe, [SOURCE, EDIT], edit_of(pipe), **given)
    edit = edit_of(pipe, cross_steps=0, self_steps=0.5)
    assert torch.equal(drawn(pipe, [SOURCE, EDIT], edit, **given), drawn(pipe, [SOURCE, EDIT], edit))


def test_a_step_cache_is_refused_and_other_hooks_are_not(pipes: Pipes) -> None:
    transformer = pipes("sd3").backbone
    transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    try:
        assert has_step_caches(transformer)
        with pytest.raises(ValueError, match="got PromptToPrompt for a model with a step cache"):
            drawn(pipes("sd3"), [SOURCE, EDIT], PromptToPrompt())
    finally:
        transformer.disable_cache()
    assert not has_step_caches(transformer)
    cast = models.transformer()
    cast.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)
    assert not has_step_caches(cast)


def test_processors_without_parts_are_refused(official: Official) -> None:
    theirs = diffusers.UNet2DConditionModel.from_pretrained(official("sd1"), subfolder="unet")
    pipe = TextToImagePipeline.from_pretrained(official("sd1"), unet=theirs)
    with pytest.raises(ValueError, match="got PromptToPrompt for AttnProcessor2_0 of UNet2DConditionModel"):
        drawn(pipe, [SOURCE, EDIT], PromptToPrompt())


def test_what_has_no_effect_is_said(pipes: Pipes, caplog: pytest.LogCaptureFixture) -> None:
    drawn(pipes("flux-dev"), [SOURCE, EDIT], PromptToPrompt(cross_steps=0.5, self_steps=0.1))
    drawn(pipes("sd1"), [SOURCE, EDIT], PromptToPrompt(cross_steps=0.1))
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        "`self_steps` has no effect",
        "`cross_steps` has no effect without `weights`",
        "`cross_steps` has no effect",
        "`self_steps` has no effect",
    ]


# ---- pictures for the README ----


def test_strips_of_edits_are_drawn(tiny_model: Path, tmp_path: Path) -> None:
    prompts = ["--source", SOURCE, "--edit", EDIT, "--blend", "cat"]
    edits.main(["--model", str(tiny_model), *prompts, "--steps", "4", "--output", str(tmp_path)])
    assert {path.stem for path in tmp_path.iterdir()} == set(edits.STRIPS)


def test_figures_of_edits_are_stored_and_are_1_and_0_where_an_edit_is_the_source_or_none(
    tiny_model: Path, tmp_path: Path
) -> None:
    arguments = ["--model", str(tiny_model), "--steps", "2", "--output", str(tmp_path)]
    edit_figures.main(arguments)
    found = json.loads((tmp_path / "edits.json").read_text())
    assert found["null-text"].keys() == {"without", "with"} and "| euler |" in (tmp_path / "edits.md").read_text()
    source, plain = torch.ones(3, 8, 8), torch.ones(3, 8, 8)
    source[1:, 2:6], plain[[0, 2], 1:5] = 0.1, 0.1  # a red stripe, and a green one elsewhere
    assert edit_figures.kept_and_shown(source, plain, source, "green") == (1.0, 0.0)
    assert edit_figures.kept_and_shown(source, plain, plain, "green") == (0.0, 1.0)
    recoloured = source[[1, 0, 2]]
    assert edit_figures.kept_and_shown(source, plain, recoloured, "green") == (1.0, 1.0)
