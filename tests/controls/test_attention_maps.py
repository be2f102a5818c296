"""Attention maps are those of the positive prompt, of every family, and looking at them changes nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from hubgen import TextToImagePipeline
from hubgen.controls.attention_maps import AttentionMaps, overlay
from hubgen.controls.control import Control
from tests import models

PROMPT = "a red cat"
Official = Callable[[str], Path]


def drawn(pipe: TextToImagePipeline, prompt: str | list[str] = PROMPT, **options: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(prompt, generator=generator, output_type="latent", **{"num_inference_steps": 2, **options}).images


@pytest.mark.parametrize("layout", ["sd1", "sdxl", "sd3", "flux-dev"])
def test_every_family_shows_its_maps_and_draws_the_same(layout: str, pipes: Callable[[str], Any]) -> None:
    pipe = pipes(layout)
    plain, maps = drawn(pipe), AttentionMaps()
    seen = drawn(pipe, controls=[maps])
    assert (seen - plain).abs().max() < 1e-4 * plain.std()
    assert not any(getattr(one, "parts", ()) for one in pipe.backbone.attn_processors.values())
    assert torch.equal(drawn(pipe), plain)
    places = pipe.condition.word_places(PROMPT)
    heat = maps.heat(places["cat"])
    assert heat.shape == (1, *(side // pipe.family.patch for side in plain.shape[2:]))
    assert heat.min() == 0 and heat.max() == 1


@pytest.mark.parametrize("backbone", ["unet", "transformer"])
def test_they_are_the_positive_prompts_and_each_picture_has_its_own(backbone: str) -> None:
    """At the first step x_t is the same with guidance and without, and so must the maps be."""
    pipe = models.pipeline(backbone)
    alone, guided, batch = AttentionMaps(), AttentionMaps(), AttentionMaps()
    drawn(pipe, num_inference_steps=1, guidance_scale=1.0, controls=[alone])
    drawn(pipe, num_inference_steps=1, guidance_scale=5.0, negative_prompt="a dog", controls=[guided])
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    drawn(pipe, [PROMPT, "the blue box"], num_inference_steps=1, latents=latents, controls=[batch])
    assert alone.last is not None and guided.last is not None
    for grid, sums in alone.last.sums.items():
        torch.testing.assert_close(guided.last.sums[grid], sums, rtol=1e-4, atol=1e-6)
        if backbone == "unet":  # all that cross-attention looks at is text
            torch.testing.assert_close(sums.sum(-1), torch.full(sums.shape[:2], float(alone.last.calls[grid])))
    places = pipe.condition.word_places(PROMPT)["cat"]
    first, second = batch.heat(places)
    torch.testing.assert_close(first, alone.heat(places)[0], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(second, first, atol=1e-3)


def test_words_have_the_places_of_their_tokens(pipes: Callable[[str], Any]) -> None:
    assert models.pipeline().condition.word_places("the Cats, the cat <x>") == {
        "the": (1, 5),
        "Cats": (2, 3),
        "cat": (6,),
        "<x>": (),
    }
    sd3 = pipes("sd3").condition
    clip, t5 = sd3.text(0), sd3.text(2, sd3.t5_tokens)
    own, behind = clip.word_places(PROMPT), t5.word_places(PROMPT)
    both = tuple(clip.max_length + place for place in behind["cat"])
    assert sd3.word_places(PROMPT)["cat"] == (*own["cat"], *both) and both


def test_an_overlay_is_as_large_as_its_picture_and_brightest_where_it_is_hot() -> None:
    heat = torch.zeros(4, 4)
    heat[0, 3] = 1
    shown = overlay(Image.new("L", (40, 24)), heat, strength=1.0).convert("L")
    assert shown.size == (40, 24)
    assert shown.getpixel((38, 1)) == max(shown.get_flattened_data()) > 4 * shown.getpixel((2, 22))


def test_what_does_not_fit_is_named() -> None:
    pipe, maps = models.pipeline(), AttentionMaps()
    with pytest.raises(ValueError, match="have seen no step yet"):
        maps.heat([1])
    drawn(pipe, controls=[maps])
    with pytest.raises(ValueError, match=r"`tokens`: got \[99\], expected places from 0 to 7"):
        maps.heat([99])
    with pytest.raises(ValueError, match=r"`tokens`: got \[\]"):
        maps.heat([])
    for controls in ("maps", [AttentionMaps], AttentionMaps()):
        with pytest.raises(ValueError, match="`controls`: got .*, expected a list of controls"):
            drawn(pipe, controls=controls)


def test_a_step_that_a_control_is_told_of_has_its_branches() -> None:
    told: list[tuple[str, ...]] = []

    class Told(Control):
        def prepare(self, target: Any, start: Any) -> Any:
            from hubgen.controls.control import Prepared

            class Listening(Prepared):
                def before_call(self, call: Any) -> None:
                    assert (
                        len(call.timestep) == len(call.x_t) == len(call.condition) == len(call.branches) * target.batch
                    )
                    told.append(call.branches)

            return Listening()

    drawn(models.pipeline(), num_inference_steps=3, guidance_interval=(0.0, 0.5), controls=[Told()])
    assert {len(branches) for branches in told} == {1, 2} and len(told) == 3
    assert all(branches[-1] == "positive" for branches in told)
