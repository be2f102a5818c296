"""Learned words: read from every layout, on every family, the same pictures as diffusers'; taken off again."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ByT5Tokenizer

from hubgen.adaptation.textual_inversion import EmbeddingError, save_embeddings
from hubgen.conditioning.text import spelled_out
from hubgen.diffusers_contract import forget_tokens
from hubgen.pipelines.text_to_image import TextToImagePipeline
from tests import models
from tests.models import TEXT_WIDTH
from tests.official import T5_WIDTH, clip_tokenizer

Official = Callable[[str], Path]
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


def vectors(count: int, seed: int = 0, width: int = TEXT_WIDTH) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def ours(folder: Path) -> TextToImagePipeline:
    pipe = TextToImagePipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def theirs(folder: Path) -> Any:
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def sd1(official: Official) -> TextToImagePipeline:
    """For tests that leave it as it was."""
    return ours(official("sd1"))


@pytest.fixture(scope="module")
def sdxl(official: Official) -> TextToImagePipeline:
    return ours(official("sdxl"))


def draw(pipe: Any, prompt: Any, **options: Any) -> np.ndarray:
    call = {"num_inference_steps": 2, "output_type": "np", "height": 32, "width": 32, **options}
    return pipe(prompt, **call, generator=models.seeded(1)[0]).images


def assert_same(found: Any, expected: Any, atol: float = 1e-4) -> None:
    np.testing.assert_allclose(found, expected, atol=atol, rtol=0.0)


def state(pipe: TextToImagePipeline) -> dict[str, Any]:
    """All that learning a word may change, comparable."""
    found: dict[str, Any] = {}
    for name in ENCODERS:
        encoder, tokenizer = getattr(pipe, name), getattr(pipe, name.replace("text_encoder", "tokenizer"))
        if encoder is not None:
            found[name] = {key: value.numpy().tobytes() for key, value in encoder.state_dict().items()}
            found[name + ".config"] = encoder.config.to_dict()
            found[name + ".rows"] = encoder.get_input_embeddings().num_embeddings
            words = json.loads(tokenizer.backend_tokenizer.to_str())
            found[name + ".tokens"] = {**words, "truncation": None, "padding": None}  # those of the last call
    return found


# ---- the same pictures as diffusers' ----


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", ["sd1", "sd2", "flux-dev"])
def test_pictures_of_a_word_are_those_of_diffusers(name: str, count: int, official: Official, tmp_path: Path) -> None:
    file = tmp_path / "learned_embeds.safetensors"
    save_file({"<style>": vectors(count)}, file)
    pipes = ours(official(name)), theirs(official(name))
    options: dict[str, Any] = {"max_sequence_length": 16} if name == "flux-dev" else {"negative_prompt": "<style> dog"}
    plain = draw(pipes[0], "a red <style>, big", **options)
    for pipe, source in zip(pipes, (tmp_path, str(file)), strict=True):
        pipe.load_textual_inversion(source)
    found, expected = (draw(pipe, "a red <style>, big", **options) for pipe in pipes)
    assert_same(found, expected)
    assert abs(found - plain).max() > 1e-3


def test_sdxl_learns_a_word_of_one_file_for_both_encoders_or_of_a_file_each(official: Official, tmp_path: Path) -> None:
    parts = {"clip_l": vectors(2, 1), "clip_g": vectors(2, 2)}
    save_file(parts, tmp_path / "style.safetensors")
    both, each, reference = ours(official("sdxl")), ours(official("sdxl")), theirs(official("sdxl"))
    both.load_textual_inversion(tmp_path / "style.safetensors")
    for pipe in (each, reference):
        for part, suffix in (("clip_l", ""), ("clip_g", "_2")):
            names = {"text_encoder": getattr(pipe, "text_encoder" + suffix)}
            names["tokenizer"] = getattr(pipe, "tokenizer" + suffix)
            pipe.load_textual_inversion({"style": parts[part]}, **names)
    prompt, negative = "a red style", "the style box"
    expected = draw(reference, prompt, negative_prompt=negative)
    for pipe in (both, each):
        assert_same(draw(pipe, prompt, negative_prompt=negative), expected)
    with torch.no_grad():
        call = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
        found, wanted = (pipe.encode_prompt("style", "a style", **call) for pipe in (both, reference))
    for mine, other in zip(found, wanted, strict=True):
        assert_same(mine, other, 1e-5)


def test_the_rows_of_known_tokens_under_another_name_say_the_same(official: Official) -> None:
    """On every family, CLIP and T5; the token states, for CLIP pools at the token of the highest number."""
    for name, keys in (("sd1", ["clip_l"]), ("sdxl", ["clip_l", "clip_g"]), ("sd3", ["clip_l", "clip_g", "t5xxl"])):
        pipe = ours(official(name))
        parts = {}
        for key, component in zip(keys, ENCODERS, strict=False):
            tokenizer = getattr(pipe, component.replace("text_encoder", "tokenizer"))
            ids = tokenizer("red cat", add_special_tokens=False)["input_ids"]
            parts[key] = getattr(pipe, component).get_input_embeddings().weight[ids]
        pipe.load_textual_inversion(parts, token="<it>")
        options = {"max_sequence_length": 16} if name == "sd3" else {}
        with torch.no_grad():
            found = [
                pipe.encode_prompt(prompt=prompt, negative_prompt=prompt, device="cpu", **options)[:2]
                for prompt in ("<it>", "red cat")
            ]
        for mine, other in zip(*found, strict=True):
            assert_same(mine, other, 1e-5)


def test_hubgens_own_models_learn_words_too() -> None:
    pipe = models.pipeline("unet")
    before = copy.deepcopy(state(pipe))
    row = pipe.text_encoder.get_input_embeddings().weight[[*pipe.tokenizer("cat")["input_ids"][1:-1]]]
    pipe.load_textual_inversion(torch.cat([row, row]), token="<two>")
    call = {"num_inference_steps": 2, "output_type": "np"}
    pictures = [pipe(prompt, **call, generator=models.seeded(1)).images for prompt in ("<two>", "cat cat")]
    assert_same(*pictures, 1e-5)
    pipe.unload_textual_inversion()
    assert state(pipe) == before


# ---- files ----


@pytest.mark.parametrize("layout", ["diffusers", "a1111"])
def test_a_saved_word_is_read_by_both_libraries(layout: Any, official: Official, tmp_path: Path) -> None:
    file = tmp_path / "style.safetensors"
    save_embeddings(file, {"style": vectors(2)}, layout)
    pipes = ours(official("sd1")), theirs(official("sd1"))
    pipes[0].load_textual_inversion(file)
    pipes[1].load_textual_inversion(str(file), token="style" if layout == "a1111" else None)
    assert_same(*(draw(pipe, "a style cat") for pipe in pipes))


def test_the_layouts_are_those_of_the_others(tmp_path: Path) -> None:
    save_embeddings(tmp_path / "a", {"<a>": vectors(1)[0]})
    save_embeddings(tmp_path / "b", {"<a>": vectors(2)}, "a1111")
    save_embeddings(tmp_path / "c", {"<a>": {"clip_l": vectors(2), "clip_g": vectors(2, width=20)}}, "a1111")
    found = [{key: tuple(value.shape) for key, value in load_file(tmp_path / name).items()} for name in "abc"]
    assert found == [{"<a>": (1, TEXT_WIDTH)}, {"emb_params": (2, TEXT_WIDTH)}, {"clip_l": (2, 16), "clip_g": (2, 20)}]
    for embeddings, layout, words in (
        ({"<a>": vectors(1), "<b>": vectors(1)}, "diffusers", "got 2 words, expected one"),
        ({"<a>": vectors(1)}, "kohya", "`layout`: got 'kohya'"),
        ({"<a>": {"clip_x": vectors(1)}}, "a1111", "clip_x"),
        ({"<a>": vectors(1) * torch.nan}, "a1111", "NaN"),
    ):
        with pytest.raises(ValueError, match=words):
            save_embeddings(tmp_path / "d", embeddings, layout)  # type: ignore[arg-type]
    assert not (tmp_path / "d").exists()


def test_words_come_from_lists_and_tensors_and_several_names(sd1: TextToImagePipeline, tmp_path: Path) -> None:
    before = copy.deepcopy(state(sd1))
    save_file({"<a>": vectors(1), "<b>": vectors(2)}, tmp_path / "two.safetensors")
    pickled = {"name": "old", "string_to_param": {"*": vectors(1)}, "step": 100}
    sd1.load_textual_inversion(
        [str(tmp_path / "two.safetensors"), {"<c>": vectors(1)}, pickled], token=[None, "<d>", None]
    )
    sd1.load_textual_inversion({"clip_l": vectors(2, 7)}, token=["<s0>", "<s1>"])
    sd1.load_textual_inversion(vectors(1), token="<e>")
    added = list(sd1.tokenizer.get_added_vocab())[-8:]
    assert added == ["<a>", "<b>", "<b>_1", "<d>", "old", "<s0>", "<s1>", "<e>"]
    row = sd1.text_encoder.get_input_embeddings().weight[sd1.tokenizer.convert_tokens_to_ids("<s1>")]
    assert torch.equal(row, vectors(2, 7)[1])
    sd1.unload_textual_inversion()
    assert state(sd1) == before


def test_the_encoder_is_the_first_as_wide_as_the_vectors(official: Official) -> None:
    flux = ours(official("flux-dev"))
    flux.load_textual_inversion(vectors(1), token="<clip>")
    flux.load_textual_inversion(vectors(1, width=T5_WIDTH), token="<t5>")
    assert "<clip>" in flux.tokenizer.get_vocab() and "<clip>" not in flux.tokenizer_2.get_vocab()
    assert "<t5>" in flux.tokenizer_2.get_vocab() and "<t5>" not in flux.tokenizer.get_vocab()


def test_a_part_of_a_file_goes_to_the_one_encoder_that_is_given(sdxl: TextToImagePipeline) -> None:
    before = copy.deepcopy(state(sdxl))
    parts = {"clip_l": vectors(1, 1), "clip_g": vectors(1, 2)}
    sdxl.load_textual_inversion(parts, token="<a>", text_encoder=sdxl.text_encoder_2)
    assert "<a>" not in sdxl.tokenizer.get_vocab()
    assert torch.equal(sdxl.text_encoder_2.get_input_embeddings().weight[-1:], parts["clip_g"])
    sdxl.unload_textual_inversion("<a>", tokenizer=sdxl.tokenizer_2)
    assert state(sdxl) == before


# ---- words in prompts ----


def learned(*tokens: str) -> Any:
    tokenizer = clip_tokenizer()
    tokenizer.add_tokens(list(tokens))
    return tokenizer


@pytest.mark.parametrize("prompt", ["a <s> cat", "<s>", "<one> and <s>, <s>.", "nothing", ""])
def test_words_are_spelled_out_as_by_diffusers(prompt: str, sd1: TextToImagePipeline) -> None:
    tokenizer = learned("<s>", "<s>_1", "<s>_2", "<one>")
    reference = diffusers.loaders.TextualInversionLoaderMixin().maybe_convert_prompt(prompt, tokenizer)
    assert sd1.maybe_convert_prompt(prompt, tokenizer) == reference
    assert sd1.maybe_convert_prompt([prompt], tokenizer) == [reference]


def test_spelling_out_twice_changes_nothing_and_words_in_words_are_left() -> None:
    tokenizer = learned("<s>", "<s>_1", "<s>x", "<s>x_1")
    once = spelled_out(["a <s> and <s>x"], tokenizer)
    assert once == ["a <s> <s>_1 and <s>x <s>x_1"]
    assert spelled_out(once, tokenizer) == once


# ---- taken off ----


def test_unloading_leaves_no_trace_and_the_other_words(official: Official, tmp_path: Path) -> None:
    pipe = ours(official("sdxl"))
    before = copy.deepcopy(state(pipe))
    parts = {"clip_l": vectors(2, 1), "clip_g": vectors(2, 2)}
    pipe.load_textual_inversion(parts, token="<a>")
    alone = draw(pipe, "the <a> box")
    pipe.unload_textual_inversion("<a>")
    assert state(pipe) == before
    pipe.load_textual_inversion({"clip_l": vectors(3, 3), "clip_g": vectors(1, 4)}, token="<first>")
    pipe.load_textual_inversion(parts, token="<a>")
    pipe.load_textual_inversion(vectors(1, 5), token="<last>")
    pipe.unload_textual_inversion(["<first>", "<last>"])
    assert_same(draw(pipe, "the <a> box"), alone, 1e-6)
    pipe.save_pretrained(tmp_path)
    again = ours(tmp_path)
    assert_same(draw(again, "the <a> box"), alone, 1e-6)
    again.unload_textual_inversion()
    assert state(again)["text_encoder"] == before["text_encoder"]
    assert again.text_encoder.config.vocab_size == pipe.text_encoder.config.vocab_size - 2


def test_a_table_with_spare_rows_keeps_them(official: Official) -> None:
    pipe = ours(official("sd1"))
    rows = len(pipe.tokenizer)
    pipe.text_encoder.resize_token_embeddings(rows + 8, mean_resizing=False)
    for count in (1, 2):
        pipe.load_textual_inversion(vectors(count), token=f"<{count}>")
    pipe.unload_textual_inversion("<1>")
    weight = pipe.text_encoder.get_input_embeddings().weight
    assert weight.shape == (rows + 8, TEXT_WIDTH) and torch.equal(weight[rows : rows + 2], vectors(2))


def test_tokenizers_written_in_python_forget_too() -> None:
    tokenizer = ByT5Tokenizer()
    before = tokenizer("a <x> cat")["input_ids"], len(tokenizer)
    tokenizer.add_tokens(["<x>", "<y>"])
    ids = tokenizer.convert_tokens_to_ids(["<x>", "<y>"])
    forget_tokens(tokenizer, {"<x>"})
    assert tokenizer.convert_tokens_to_ids("<y>") == ids[0]
    assert (tokenizer("a <x> cat")["input_ids"], len(tokenizer) - 1) == before


# ---- bad input ----


def wrong(tmp_path: Path) -> dict[str, tuple[dict[str, Any], str]]:
    """Arguments that are no learned words for SDXL, and what the error says."""
    pickle, lora, damaged = tmp_path / "old.pt", tmp_path / "lora.safetensors", tmp_path / "cut.safetensors"
    torch.save({"string_to_param": {"*": vectors(1)}}, pickle)
    save_file({"unet.a.lora_A.weight": vectors(1), "unet.a.lora_B.weight": vectors(1)}, lora)
    save_file({"<a>": vectors(1)}, damaged)
    damaged.write_bytes(damaged.read_bytes()[:-4])
    for folder in ("pickles", "empty"):
        (tmp_path / folder).mkdir()
    pickle.with_name("pickles").joinpath("old.bin").touch()
    source = "pretrained_model_name_or_path"
    good = {"clip_l": vectors(1)}
    return {
        "a pickle": ({source: pickle}, r"old.pt: a pickled file(.|\n)*string_to_param"),
        "a pickle on the Hub": ({source: "owner/name", "weight_name": "a.bin"}, "a.bin: a pickled file"),
        "a folder of pickles": ({source: tmp_path / "pickles"}, r"old.bin: a pickled file(.|\n)*To convert one"),
        "an empty folder": ({source: tmp_path / "empty"}, "got no safetensors file, expected learned_embeds"),
        "a folder of several": ({source: tmp_path}, "got cut.safetensors, lora.safetensors, expected `weight_name`"),
        "pickles wanted": ({source: lora, "use_safetensors": False}, "`use_safetensors`: got False"),
        "another file": ({source: lora}, r"lora.safetensors: got the tensors \[unet.a.lora_A.weight"),
        "a damaged file": ({source: damaged}, "truncated"),
        "an empty one": ({source: {}}, "expected words"),
        "another width": (
            {source: {"<a>": vectors(1, width=12)}},
            "got 12 features for '<a>', expected the 16 of `text_encoder`",
        ),
        "of one encoder": ({source: {**good, "clip_g": vectors(1, width=9)}, "token": "<a>"}, "got 9.*text_encoder_2"),
        "for no encoder": ({source: {**good, "t5xxl": vectors(1)}, "token": "<a>"}, "vectors for `t5xxl`, expected"),
        "NaN": ({source: {**good, "clip_g": vectors(1) * torch.inf}, "token": "<a>"}, "NaN or infinity in 'clip_g'"),
        "whole numbers": ({source: {"<a>": torch.ones(1, 16).int()}}, r"got \(1, 16\) of torch.int32 for '<a>'"),
        "too many axes": ({source: {"<a>": vectors(2)[None]}}, r"got \(1, 2, 16\)"),
        "too many vectors": ({source: {"<a>": vectors(76)}}, "got 76 vectors for '<a>', expected at most the 75"),
        "no name": ({source: good}, "`token`: got None for the state dict, expected a name"),
        "a known token": ({source: good, "token": "cat</w>"}, "knows the token 'cat</w>' already"),
        "a further vector": ({source: good, "token": "<old>_1"}, "read as a further vector of '<old>'"),
        "one known vector": ({source: {"<new>": vectors(3)}}, "knows the token '<new>_2' already"),
        "a further vector beside it": ({source: {"<a>": vectors(1), "<a>_1": vectors(1)}}, "further vector of '<a>'"),
        "a word twice": ({source: [vectors(1), vectors(1)], "token": ["<a>", "<a>"]}, "'<a>' a second time"),
        "too few names": (
            {source: [vectors(1)] * 3, "token": ["<a>", "<b>"]},
            "got 2 names, expected one for each of 3",
        ),
        "too many names": (
            {source: good, "token": ["<a>", "<b>"]},
            "got 2 names for the state dict, expected one, or 1",
        ),
        "names for a named file": ({source: {"<a>": vectors(1), "<b>": vectors(1)}, "token": "<c>"}, "names <a>, <b>"),
        "the second of two": ({source: [vectors(1), vectors(1, width=3)], "token": ["<a>", "<b>"]}, "got 3 features"),
    }


def test_what_does_not_fit_is_told_and_nothing_changes(sdxl: TextToImagePipeline, tmp_path: Path) -> None:
    pipe = sdxl
    pipe.load_textual_inversion(vectors(1), token=["<old>"])
    pipe.load_textual_inversion(vectors(1), token="<new>_2")
    before = copy.deepcopy(state(pipe))
    for arguments, words in wrong(tmp_path).values():
        with pytest.raises(ValueError, match=words):
            pipe.load_textual_inversion(**arguments)
    with pytest.raises(TypeError, match="unknown arguments tokens"):
        pipe.load_textual_inversion(vectors(1), tokens="<a>")
    with pytest.raises(EmbeddingError, match="`tokens`: got '<none>', expected one of .*'<new>_2', '<old>'"):
        pipe.unload_textual_inversion(["<old>", "<none>"])
    with pytest.raises(FileNotFoundError, match="neither a folder nor"):
        pipe.load_textual_inversion(str(tmp_path / "missing.safetensors"))
    assert state(pipe) == before
    pipe.unload_textual_inversion()


def test_an_error_halfway_leaves_nothing_half_loaded(
    sdxl: TextToImagePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = copy.deepcopy(state(sdxl))

    def full(*args: Any, **kwargs: Any) -> None:
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(sdxl.text_encoder_2, "resize_token_embeddings", full)
        with pytest.raises(MemoryError):
            sdxl.load_textual_inversion({"clip_l": vectors(2), "clip_g": vectors(2)}, token="<a>")
    assert state(sdxl) == before


def test_a_pipeline_without_text_encoders_says_so() -> None:
    pipe = models.pipeline("unet", text_encoder=None, tokenizer=None)
    with pytest.raises(ValueError, match="`text_encoder`, `tokenizer`: got None"):
        pipe.load_textual_inversion(vectors(1), token="<a>")
    with pytest.raises(ValueError, match="`tokenizer`: got None, expected one"):
        pipe.load_textual_inversion(vectors(1), token="<a>", text_encoder=models.text_encoder())
