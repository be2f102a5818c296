"""Adapters from the command line: drawn with, trained, inspected, converted; mistakes are answered in one line."""

import argparse
import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file, save_file

import hubgen as hubgen_
from hubgen.adaptation.textual_inversion import save_embeddings
from hubgen.cli import train
from hubgen.cli.arguments import file_and_weight, file_and_word
from hubgen.hub.provenance import read_request
from hubgen.training.kit import usual
from tests import models, test_cli
from tests.adaptation import dialects
from tests.test_cli import REQUEST, Result, pixels, refused, write_chunk
from tests.training.conftest import draw_pictures

Command = Callable[..., Result]
Official = Callable[[str], Path]
hubgen = test_cli.hubgen
FEW = ("--num-inference-steps", 2, "--seed", 1, "--size", 16)


def write_lora(path: Path, seed: int = 1, layout: str = "diffusers") -> Path:
    """An adapter for the tiny model, as another program would write it."""
    known = dialects.adapter("sd3", {"transformer": models.transformer()}, seed)
    save_file(dialects.LAYOUTS[layout].write("sd3", known), path)
    return path


def differ(one: str, other: str) -> bool:
    return bool((pixels(one) != pixels(other)).any())


# ---------------------------------------------------------------------------------------------------------------------
# hubgen generate --lora


def test_a_file_and_its_weight_are_told_apart_by_the_last_colon(tmp_path: Path) -> None:
    odd = tmp_path / "style:0.5"
    odd.write_bytes(b"")
    for text, expected in {
        "style.safetensors": ("style.safetensors", 1.0),
        "style.safetensors:0.8": ("style.safetensors", 0.8),
        "style.safetensors:-1": ("style.safetensors", -1.0),
        "owner/name:1e-1": ("owner/name", 0.1),
        r"C:\loras\style.safetensors": (r"C:\loras\style.safetensors", 1.0),
        r"C:\loras\style.safetensors:.5": (r"C:\loras\style.safetensors", 0.5),
        "https://huggingface.co/a/b/blob/main/c.safetensors": (
            "https://huggingface.co/a/b/blob/main/c.safetensors",
            1.0,
        ),
        str(odd): (str(odd), 1.0),
        f"{odd}:2": (str(odd), 2.0),
    }.items():
        assert file_and_weight(text) == expected
    for text, words in {
        "style.safetensors:nan": "got the weight 'nan' for style.safetensors, expected a finite number",
        "style.safetensors:inf": "got the weight 'inf'",
        f"{odd}:strong": "got the weight 'strong'",
        ":0.5": "got ':0.5', expected a file",
        "": "got '', expected a file",
    }.items():
        with pytest.raises(argparse.ArgumentTypeError, match=words):
            file_and_weight(text)


def test_adapters_change_a_picture_which_names_them_and_is_repeated_with_them(
    hubgen: Command,
    tiny_model: Path,
) -> None:
    write_lora(Path("one.safetensors"))
    Path("folder").mkdir()
    write_lora(Path("folder/other.safetensors"), seed=2, layout="kohya, blocks")
    draw = ("generate", "a red apple", "--model", tiny_model, *FEW)
    assert hubgen(*draw, "--out", "base.png").status == 0
    result = hubgen(*draw, "--lora", "one.safetensors:0.8", "--lora", "folder", "--out", "both.png")
    assert result.status == 0, result.err
    assert "one.safetensors, weight 0.8: " in result.err and "layers of transformer" in result.err
    assert differ("base.png", "both.png")
    (one, other), _ = read_request(Path("both.png"))[0].lora, None  # type: ignore[misc]
    assert (one.file, one.weight, other.file, other.weight) == ("one.safetensors", 0.8, "folder", 1.0)
    assert len(one.sha256) == 64 and one.sha256 != other.sha256

    assert hubgen("generate", "--from", "both.png", "--out", "again.png").status == 0
    assert not differ("both.png", "again.png")
    assert read_request(Path("again.png"))[0] == read_request(Path("both.png"))[0]
    assert hubgen("generate", "--from", "both.png", "--lora", "none", "--out", "none.png").status == 0
    assert not differ("base.png", "none.png") and read_request(Path("none.png"))[0].lora is None
    assert hubgen(*draw, "--lora", "one.safetensors:0", "--out", "zero.png").status == 0
    assert np.abs(pixels("base.png") - pixels("zero.png")).max() <= 1

    write_lora(Path("one.safetensors"), seed=3)
    line = refused(hubgen("generate", "--from", "both.png", "--out", "no.png"))
    assert "--from both.png: its --lora one.safetensors: got a file with the sha256 " in line
    assert f"expected {one.sha256}, that of the one that the picture was drawn with" in line
    taken = hubgen("generate", "--from", "both.png", "--lora", "one.safetensors", "--out", "new.png")
    assert taken.status == 0 and differ("both.png", "new.png")


def test_a_file_and_its_word_are_told_apart_by_the_last_equals_sign(tmp_path: Path) -> None:
    odd = tmp_path / "size=2"
    odd.write_bytes(b"")
    for text, expected in {
        "frog.safetensors": ("frog.safetensors", None),
        "frog.safetensors=<zog>": ("frog.safetensors", "<zog>"),
        "owner/name=zog": ("owner/name", "zog"),
        str(odd): (str(odd), None),
        f"{odd}=zog": (str(odd), "zog"),
    }.items():
        assert file_and_word(text) == expected
    for text in ("=<zog>", "", "frog.safetensors=", "frog.safetensors= "):
        with pytest.raises(argparse.ArgumentTypeError, match="expected a file or owner/name, and =WORD behind it"):
            file_and_word(text)


def test_a_learned_word_changes_pictures_of_prompts_that_say_it(hubgen: Command, tiny_model: Path) -> None:
    encoder = hubgen_.TextToImagePipeline.from_pretrained(tiny_model).text_encoder
    width = encoder.get_input_embeddings().weight.shape[1]
    vectors = 3 * torch.randn(2, width, generator=torch.Generator().manual_seed(0))
    save_embeddings("learned.safetensors", {"<zog>": vectors}, layout="a1111")
    Path("folder").mkdir()
    save_embeddings("folder/frog.safetensors", {"<frog>": -vectors})

    def draw(prompt: str, *options: object) -> np.ndarray:
        result = hubgen("generate", prompt, "--model", tiny_model, *FEW, *options, "--out", "c.png")
        assert result.status == 0, result.err
        return pixels("c.png")

    told = ("--embedding", "learned.safetensors", "--embedding", "folder=<toad>")
    word = draw("a <zog>", *told)
    assert (word != draw("a <zog>")).any() and np.array_equal(draw("a cat", *told), draw("a cat"))
    assert (draw("a <toad>", *told) != draw("a <toad>")).any()
    assert np.array_equal(draw("a <frog>", *told), draw("a <frog>"))  # its word is another now

    result = hubgen("generate", "a <zog>", "--model", tiny_model, *FEW, *told, "--out", "c.png")
    assert "learned.safetensors: the word <zog>" in result.err and "folder: the word <toad>" in result.err
    used = read_request(Path("c.png"))[0].embedding or []
    assert [(one.file, one.word) for one in used] == [("learned.safetensors", None), ("folder", "<toad>")]
    assert hubgen("generate", "--from", "c.png", "--out", "again.png").status == 0
    assert not differ("c.png", "again.png")
    assert hubgen("generate", "--from", "c.png", "--embedding", "none", "--out", "none.png").status == 0
    assert differ("c.png", "none.png") and read_request(Path("none.png"))[0].embedding is None
    assert said(hubgen("inspect", "learned.safetensors"))["use"].endswith("--embedding learned.safetensors")

    write_lora(Path("lora.safetensors"))
    save_embeddings("wide.safetensors", {"<zog>": torch.ones(1, width + 1)})
    for options, words in {
        ("--embedding", "no.safetensors"): "--embedding no.safetensors: no such file, expected a .safetensors file",
        ("--embedding", "lora.safetensors"): "--embedding lora.safetensors: got the tensors [",
        ("--embedding", "wide.safetensors"): f"--embedding wide.safetensors: got {width + 1} features for '<zog>', ex",
        ("--embedding", "learned.safetensors=cat"): "got the word 'cat', expected another",
        ("--embedding", "learned.safetensors="): "argument --embedding: got 'learned.safetensors='",
    }.items():
        assert words in refused(hubgen("generate", "a <zog>", "--model", tiny_model, *FEW, *options))
    save_embeddings("learned.safetensors", {"<zog>": -vectors}, layout="a1111")
    line = refused(hubgen("generate", "--from", "c.png"))
    assert "--from c.png: its --embedding learned.safetensors: got a file with the sha256 " in line


def test_an_adapter_on_the_hub_is_found_in_the_cache_and_named_with_its_commit(
    hubgen: Command,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    commit = "a" * 40
    repo = tmp_path / "cache" / "models--owner--style"
    (repo / "snapshots" / commit).mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    write_lora(repo / "snapshots" / commit / "pytorch_lora_weights.safetensors")
    draw = ("generate", "a red apple", "--model", tiny_model, *FEW)
    for name in ("owner/style:0.5", "owner/style/pytorch_lora_weights.safetensors:0.5"):
        result = hubgen(*draw, "--lora", name, "--out", "hub.png")
        assert result.status == 0, result.err
        (used,) = read_request(Path("hub.png"))[0].lora or ()
        assert (used.file, used.weight, used.revision) == (name.removesuffix(":0.5"), 0.5, commit)
    line = refused(hubgen(*draw, "--lora", "owner/nothing", "--out", "no.png"))
    assert line.startswith("hubgen: error: --lora owner/nothing: no such file here, and from the Hub: ")


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ("nowhere.safetensors", "--lora nowhere.safetensors: no such file, expected a .safetensors file, a folder"),
        ("no/where.safetensors", "--lora no/where.safetensors: no such file, expected"),
        ("nowhere.ckpt", "--lora nowhere.ckpt: no such file"),
        ("pickle.ckpt", "--lora pickle.ckpt: a pickled file."),
        ("text.safetensors", "--lora text.safetensors: not a"),
        ("empty.safetensors", "--lora empty.safetensors: holds no tensors, expected those of an adapter"),
        ("cut.safetensors", "--lora cut.safetensors: the file is truncated"),
        ("nothing", "--lora nothing: got no weights, expected one safetensors file"),
        ("two", "--lora two: got a.safetensors, b.safetensors, expected two/FILE to say which"),
        ("foreign.safetensors", "looks like an adapter for Stable Diffusion XL, and is for other models: nothing in"),
        (
            "nan.safetensors",
            "--lora nan.safetensors: 1 of its 2 tensors or layers cannot be used: transformer.proj_out",
        ),
        ("good.safetensors:nan", "argument --lora: got the weight 'nan' for good.safetensors, expected a finite"),
    ],
)
def test_a_file_that_cannot_be_put_on_the_model_is_told_before_the_model_loads(
    hubgen: Command,
    tiny_model: Path,
    lora: str,
    words: str,
) -> None:
    write_lora(Path("good.safetensors"))
    Path("pickle.ckpt").write_bytes(b"PK\x03\x04" + b"0" * 100)
    Path("text.safetensors").write_text("no weights")
    save_file({}, "empty.safetensors")
    Path("cut.safetensors").write_bytes(Path("good.safetensors").read_bytes()[:-10])
    for name in ("nothing", "two"):
        Path(name).mkdir()
    for name in ("two/a.safetensors", "two/b.safetensors"):
        shutil.copy("good.safetensors", name)
    foreign = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    save_file(
        {f"{foreign}.lora_A.weight": torch.ones(2, 2048), f"{foreign}.lora_B.weight": torch.ones(8, 2)},
        "foreign.safetensors",
    )
    nan = {"lora_A.weight": torch.full((2, 32), float("nan")), "lora_B.weight": torch.ones(16, 2)}
    save_file({f"transformer.proj_out.{end}": one for end, one in nan.items()}, "nan.safetensors")
    result = hubgen("generate", "a cat", "--model", tiny_model, *FEW, "--lora", lora, "--out", "c.png")
    assert words in refused(result) and "loaded in" not in result.err
    assert not Path("c.png").exists()


def test_a_model_that_draws_without_prompts_takes_no_adapter(hubgen: Command, official: Official) -> None:
    write_lora(Path("one.safetensors"))
    line = refused(hubgen("generate", "--model", official("ddpm"), "--lora", "one.safetensors", "--out", "c.png"))
    assert f"--lora: {official('ddpm')} is a DDPMPipeline, which does not take it" in line


@pytest.mark.parametrize(
    "embedding",
    [
        [],
        [{"file": "a", "weight": 1, "sha256": "0" * 64, "revision": None}],
        [{"file": "a", "word": 1, "sha256": "0" * 64, "revision": None}],
    ],
)
def test_damaged_words_in_a_picture_are_told_in_one_line(hubgen: Command, embedding: Any) -> None:
    write_chunk(Path("cat.png"), json.dumps({"request": {**vars(REQUEST), "embedding": embedding}, "versions": {}}))
    assert "cat.png: its settings hold a bad embedding" in refused(hubgen("generate", "--from", "cat.png"))


@pytest.mark.parametrize(
    "lora",
    [
        [],
        "style",
        [{"file": "a"}],
        [{"file": "a", "weight": float("nan"), "sha256": "0" * 64, "revision": None}],
        [{"file": "a", "weight": 1, "sha256": "0" * 63, "revision": None}],
        [{"file": "a", "weight": 1, "sha256": "0" * 64, "revision": 1}],
        [{"file": 1, "weight": 1, "sha256": "0" * 64, "revision": None}],
    ],
)
def test_damaged_adapters_in_a_picture_are_told_in_one_line(hubgen: Command, lora: Any) -> None:
    write_chunk(Path("cat.png"), json.dumps({"request": {**vars(REQUEST), "lora": lora}, "versions": {}}))
    assert "cat.png: its settings hold a bad lora" in refused(hubgen("generate", "--from", "cat.png"))


# ---------------------------------------------------------------------------------------------------------------------
# hubgen inspect


def said(result: Result) -> dict[str, str]:
    assert result.status == 0, result.err
    return {line.split(" ", 1)[0]: line.split(" ", 1)[1].strip() for line in result.out.splitlines()}


def test_inspect_says_what_an_adapter_is(hubgen: Command, official: Official) -> None:
    found = said(hubgen("inspect", write_lora(Path("one.safetensors"), layout="kohya, blocks")))
    assert found["is"] == "an adapter: LoRA" and found["layout"] == "kohya"
    assert found["for"] == "Stable Diffusion 3 and 3.5" and found["layers"].endswith("of transformer")
    assert found["rank"] == "4 in 24 layers, 12 in 8 layers"[: len(found["rank"])] or "in" in found["rank"]
    assert found["precision"] == "float32" and found["size"].endswith("kB")
    assert found["use"] == "hubgen generate PROMPT --model MODEL --lora one.safetensors"
    Path("folder").mkdir()
    shutil.move("one.safetensors", "folder/one.safetensors")
    assert said(hubgen("inspect", "folder"))["file"] == "folder/one.safetensors"


def test_inspect_says_what_learned_words_and_whole_models_are(
    hubgen: Command,
    official: Official,
    tiny_model: Path,
) -> None:
    from hubgen import TextToImagePipeline

    save_file({"<cat>": torch.ones(2, 768)}, "cat.safetensors")
    found = said(hubgen("inspect", "cat.safetensors"))
    assert found["is"] == "learned words (textual inversion)" and found["word"] == "<cat>: 2 vectors of 768"
    pipe = TextToImagePipeline.from_pretrained(official("sdxl"))
    pipe.save_single_file("xl.safetensors", torch_dtype=torch.float16)
    found = said(hubgen("inspect", "xl.safetensors"))
    assert found["is"] == "a model in its original layout: Stable Diffusion XL"
    assert found["unet"].endswith("numbers in float16") and {"vae", "text_encoder", "text_encoder_2"} <= found.keys()
    save_file(pipe.vae.to_original(), "vae.safetensors")
    assert said(hubgen("inspect", "vae.safetensors"))["is"] == "an autoencoder in its original layout"
    assert said(hubgen("inspect", official("sdxl") / "unet"))["is"] == "one network: UNet2DConditionModel"
    shutil.copy(next((official("sdxl") / "unet").glob("*.safetensors")), "unet.safetensors")
    assert said(hubgen("inspect", "unet.safetensors"))["is"].startswith("one model in diffusers' layout")
    save_file({"model.diffusion_model.input_blocks.0.0.weight.absmax": torch.ones(1)}, "packed.safetensors")
    assert said(hubgen("inspect", "packed.safetensors"))["quantised"].startswith("to 4 bits by bitsandbytes")
    save_file({"numbers": torch.arange(3)}, "odd.safetensors")
    assert said(hubgen("inspect", "odd.safetensors"))["is"] == "nothing that is known; its first tensors: numbers"
    found = said(hubgen("inspect", tiny_model))
    assert found["is"] == "a pipeline: TextToImagePipeline" and found["use"] == f"hubgen generate --model {tiny_model}"
    assert found["transformer"].startswith("SD3Transformer2DModel (diffusers), ")
    found = said(hubgen("inspect", official("dit")))
    assert found["is"] == "a pipeline: DiTPipeline" and found["scheduler"] == "DDIMScheduler (diffusers)"


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("nowhere.safetensors", "nowhere.safetensors: no such file."),
        ("pickle.ckpt", "pickle.ckpt: a pickled file."),
        ("text.safetensors", "text.safetensors: not a whole safetensors file"),
        ("empty", "empty: holds no safetensors file, expected one, or a model_index.json"),
        ("pickles", "pickles: holds the pickles a.ckpt; expected a safetensors file"),
        ("two", "two: holds a.safetensors, b.safetensors; expected one file, name it"),
        ("above", "expected one, or a model_index.json; there are some in two"),
        ("broken", "model_index.json"),
    ],
)
def test_inspect_refuses_what_is_no_whole_file(hubgen: Command, file: str, words: str) -> None:
    for name in ("empty", "pickles", "above/two", "two", "broken"):
        Path(name).mkdir(parents=True)
    for name in ("pickle.ckpt", "pickles/a.ckpt"):
        Path(name).write_bytes(b"PK\x03\x04" + b"0" * 100)
    for name in ("two/a.safetensors", "two/b.safetensors", "above/two/a.safetensors"):
        save_file({"a": torch.ones(1)}, name)
    Path("text.safetensors").write_text("no weights at all, but text")
    Path("broken/model_index.json").write_text("{")
    assert words in refused(hubgen("inspect", file))


# ---------------------------------------------------------------------------------------------------------------------
# hubgen convert lora


def deltas(folder: Path, file: str) -> dict[str, torch.Tensor]:
    from hubgen import TextToImagePipeline
    from hubgen.adaptation.locate import load_adapter
    from hubgen.adaptation.lora_files import read_adapter

    models_ = TextToImagePipeline.from_pretrained(folder).adaptable_models()
    found = read_adapter(*load_adapter(Path(file)), models_)
    weights = {part: dict(model.named_modules()) for part, model in models_.items()}
    return {
        f"{part}.{name}": layer.delta(weights[part][name].weight)
        for part, layers in found.layers.items()
        for name, layer in layers.items()
    }


@pytest.mark.parametrize("family", ["sdxl", "flux-dev"])
def test_an_adapter_is_the_same_in_every_layout_and_no_weight_is_read(
    hubgen: Command,
    official: Official,
    family: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from hubgen import TextToImagePipeline

    base = official(family)
    known = dialects.adapter(family, TextToImagePipeline.from_pretrained(base).adaptable_models(), seed=1)
    save_file(dialects.LAYOUTS["diffusers"].write(family, known), "one.safetensors", {"hubgen_prefix": "my style, "})
    expected = deltas(base, "one.safetensors")
    before = "one.safetensors"
    for layout in ("kohya", "comfyui", "diffusers"):
        after = f"{layout}.safetensors"
        with monkeypatch.context() as patch:
            patch.setattr(TextToImagePipeline, "from_pretrained", None)
            result = hubgen("convert", "lora", before, "--to", layout, "--model", base, "--out", after)
        assert result.status == 0, result.err
        assert result.out.startswith(f"wrote {after} ({layout}, ")
        before = after
    found = deltas(base, "diffusers.safetensors")
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        torch.testing.assert_close(found[name], delta, rtol=1e-5, atol=1e-6)
    assert said(hubgen("inspect", "diffusers.safetensors"))["words"] == "my style, (hubgen_prefix)"


def test_magnitudes_of_the_inputs_are_converted_with_the_weights(
    hubgen: Command,
    official: Official,
    tmp_path: Path,
) -> None:
    from hubgen import TextToImagePipeline

    unet = {"unet": TextToImagePipeline.from_pretrained(official("sd1")).unet}
    file = dialects.of_kind(dialects.KINDS["DoRA of the inputs"], "sd1", unet, every=20)
    save_file({key: one.contiguous() for key, one in file.tensors.items()}, "one.safetensors")
    result = hubgen(
        *("convert", "lora", "one.safetensors", "--to", "diffusers", "--model", official("sd1")),
        *("--dtype", "float32", "--out", "two.safetensors"),
    )
    assert result.status == 0, result.err
    assert "what the magnitudes of one.safetensors come to depends on its weights" in result.err
    found = deltas(official("sd1"), "two.safetensors")
    for name, delta in file.deltas["unet"].items():
        torch.testing.assert_close(found[f"unet.{name}"].double(), delta, rtol=1e-4, atol=1e-5)


def test_the_base_is_the_folder_that_the_file_names_or_the_bundled_model(
    hubgen: Command,
    tiny_model: Path,
) -> None:
    known = dialects.adapter("sd3", {"transformer": models.transformer()}, 1)
    tensors = dialects.LAYOUTS["diffusers"].write("sd3", known)
    save_file(tensors, "named.safetensors", {"base_model_name_or_path": str(tiny_model)})
    assert hubgen("convert", "lora", "named.safetensors", "--to", "kohya", "--out", "k.safetensors").status == 0
    save_file(tensors, "nameless.safetensors")
    line = refused(hubgen("convert", "lora", "nameless.safetensors", "--to", "kohya", "--out", "l.safetensors"))
    assert line == (
        "hubgen: error: nameless.safetensors: looks like an adapter for Stable Diffusion 3 and 3.5, and is not for the "
        "bundled model; name its base by --model"
    )
    own = {"lora_A.weight": torch.ones(2, 192), "lora_B.weight": torch.ones(192, 2)}
    save_file({f"transformer.transformer_blocks.0.attn.to_q.{end}": one for end, one in own.items()}, "own.safetensors")
    result = hubgen(
        "convert", "lora", "own.safetensors", "--to", "kohya", "--dtype", "float16", "--out", "m.safetensors"
    )
    assert result.status == 0 and "on the bundled model: 2 tensors" in result.err
    written = load_file("m.safetensors")
    key = "lora_unet_joint_blocks_0_x_block_attn_qkv"
    assert written[f"{key}.lora_down.weight"].dtype == torch.float16 and written[f"{key}.alpha"].dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["one.safetensors", "--out", "two.safetensors"], "the following arguments are required: --to"),
        (["one.safetensors", "--to", "sd-webui", "--out", "two.safetensors"], "invalid choice: 'sd-webui'"),
        (
            ["one.safetensors", "--to", "kohya", "--out", "two.ckpt"],
            "--out two.ckpt: got '.ckpt', expected a file name",
        ),
        (["one.safetensors", "--to", "kohya", "--out", "no/two.safetensors"], "the folder no does not exist"),
        (
            ["one.safetensors", "--to", "kohya", "--out", "one.safetensors"],
            "is the file that is read, expected another",
        ),
        (
            ["no.safetensors", "--to", "kohya", "--out", "two.safetensors"],
            "error: no.safetensors: no such file, expected",
        ),
        (["one.safetensors", "--to", "kohya", "--model", "no", "--out", "t.safetensors"], "--model no: no such folder"),
        (
            ["bad.safetensors", "--to", "kohya", "--model", "base", "--out", "t.safetensors"],
            "has down without up (LoRA)",
        ),
        (["sd1.safetensors", "--to", "kohya", "--model", "base", "--out", "t.safetensors"], "adapter for Stable Diff"),
    ],
)
def test_what_cannot_be_converted_is_told_in_one_line(
    hubgen: Command,
    tiny_model: Path,
    arguments: list[str],
    words: str,
) -> None:
    shutil.copytree(tiny_model, "base")
    write_lora(Path("one.safetensors"))
    save_file({"transformer.proj_out.lora_A.weight": torch.ones(2, 32)}, "bad.safetensors")
    key = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    pair = {f"{key}.lora_A.weight": torch.ones(2, 768), f"{key}.lora_B.weight": torch.ones(8, 2)}
    save_file(pair, "sd1.safetensors")
    assert words in refused(hubgen("convert", "lora", *arguments))
    assert not Path("two.safetensors").exists()


# ---------------------------------------------------------------------------------------------------------------------
# hubgen train

QUICK = ("--set", "validation.inference_steps=2", "--set", "run.report_to=none", "--set", "publish.dtype=float32")


@pytest.fixture
def train_(hubgen: Command) -> Iterator[Command]:
    """`hubgen train`, in this process, with few denoising steps."""

    def run(*arguments: object) -> Result:
        AcceleratorState._reset_state(reset_partial_state=True)  # it remembers the precision of the first run
        return hubgen("train", *arguments, *(QUICK if len(arguments) > 1 else ()))

    yield run
    AcceleratorState._reset_state(reset_partial_state=True)


def planned(result: Result) -> dict[str, str]:
    lines = [line for line in result.err.splitlines() if line[:1].isalpha() and "  " in line]
    return {line.split(" ", 1)[0]: line.split(" ", 1)[1].strip() for line in lines}


def test_lora_trains_with_a_plan_goes_on_and_says_how_to_use_it(
    train_: Command,
    hubgen: Command,
    tiny_model: Path,
) -> None:
    draw_pictures(Path("pictures"), 6)
    command = ("lora", "pictures", "--base", tiny_model, "--trigger", "my style", "--rank", 2)
    result = train_(*command, "--steps", 2)
    assert result.status == 0, result.err
    found = planned(result)
    assert found["base"].startswith(f"{tiny_model}: SD3Transformer2DModel, ") and found["base"].endswith("on cpu")
    assert found["learns"].startswith("a lora on ") and "transformer (attention_and_feed_forward)" in found["learns"]
    assert found["pictures"] == "6, brought to 16x16 pixels" and found["captions"] == "their own, behind 'my style, '"
    assert found["batch"] == "8 pictures a step (chosen)"
    assert found["steps"] == "2, each picture about 3 times (given)" and found["rate"] == "0.001 (chosen)"
    assert found["rank"].startswith("2: ") and found["rank"].endswith("(given)")
    assert found["samples"].startswith('"my style, red ball", "my style, green box", ')
    assert found["folder"].startswith("runs/pictures-lora, about ")
    file = Path("runs/pictures-lora/lora/pytorch_lora_weights.safetensors")
    numbers = sum(one.numel() for one in load_file(file).values())
    assert f"{numbers:,} numbers" in found["rank"] and f"{numbers:,} parameters of the adapter" in result.out
    assert f"--lora {file.parent}" in result.out
    assert (file.parent / "before.png").exists() and (file.parent / "after.png").exists()
    assert said(hubgen("inspect", file))["words"] == "my style, (hubgen_prefix)"
    drawn = hubgen(
        "generate", "my style, red ball", "--model", tiny_model, *FEW, "--lora", file.parent, "--out", "c.png"
    )
    assert drawn.status == 0, drawn.err

    again = train_(*command, "--steps", 3)
    assert again.status == 0, again.err
    steps = [json.loads(line)["step"] for line in Path("runs/pictures-lora/metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3], "the second command began anew"
    other = train_(*command, "--steps", 3, "--seed", 5)
    assert "was written by another run: settings.run.seed" in refused(without_plan(other))

    from hubgen.training import train_lora
    from hubgen.training.kit.parse import parse_settings

    recipe = parse_settings(train_lora.Settings, ["--config", "runs/pictures-lora/recipe.yaml"])
    assert (recipe.run.max_train_steps, recipe.adapter.rank, recipe.run.batch_size) == (3, 2, 8)


def without_plan(result: Result) -> Result:
    """The result with the last line of what was said alone."""
    return result._replace(err=result.err.splitlines()[-1], out="")


def test_pictures_without_captions_get_the_trigger_for_all(train_: Command, tiny_model: Path) -> None:
    draw_pictures(Path("pictures"), 4)
    Path("pictures/metadata.jsonl").unlink()
    command = ("lora", "pictures", "--base", tiny_model, "--steps", 1, "--rank", 1)
    assert refused(train_(*command)) == (
        "hubgen: error: pictures: its pictures have no captions; expected a metadata.jsonl with rows of file_name and "
        "text, a text file beside each picture (cat.txt for cat.png), or folders named 10_CAPTION; or give one caption "
        'for all: --trigger "WORDS"'
    )
    result = train_(*command, "--trigger", "a red ball", "--size", 32, "--out", "out")
    assert result.status == 0, result.err
    found = planned(result)
    assert found["captions"] == "'a red ball' for all of them"
    assert found["pictures"] == "4, brought to 32x32 pixels; 4 smaller ones are enlarged"
    assert Path("out/lora/pytorch_lora_weights.safetensors").exists() and not Path("out/class_pictures").exists()


def test_dreambooth_draws_its_class_first(train_: Command, hubgen: Command, tiny_model: Path) -> None:
    draw_pictures(Path("frog"), 3)
    Path("frog/metadata.jsonl").unlink()
    words = ("--instance-prompt", "a sks frog", "--class-prompt", "a frog", "--prompt", "a sks frog in the rain")
    few = ("--set", "prior.pictures=2", "--set", "prior.inference_steps=2", "--batch-size", 2)
    result = train_("dreambooth", "frog", "--base", tiny_model, "--steps", 2, *words, *few)
    assert result.status == 0, result.err
    found = planned(result)
    assert found["captions"] == "'a sks frog' for all of them; beside them 2 of 'a frog', drawn by the base"
    assert found["samples"] == '"a sks frog in the rain": before, every 1 steps and after'
    assert len(list(Path("runs/frog-dreambooth/class_pictures").glob("*.png"))) == 2
    file = Path("runs/frog-dreambooth/lora/pytorch_lora_weights.safetensors")
    assert said(hubgen("inspect", file))["words"] == "a sks frog (hubgen_prompt)"


def test_the_bundled_model_learns_without_a_base_being_named(train_: Command) -> None:
    draw_pictures(Path("pictures"), 2)
    for picture in Path("pictures").glob("*.png"):
        Image.open(picture).resize((64, 64)).save(picture)
    few = ("--steps", 1, "--batch-size", 1, "--prompt", "a cat", "--rank", 1)
    result = train_("lora", "pictures", "--base", "bundled", *few)
    assert result.status == 0, result.err
    assert planned(result)["base"].startswith("the bundled model: SD3Transformer2DModel, 6,5")
    assert "hubgen generate 'a cat' --lora runs/pictures-lora/lora" in result.out


def test_a_run_that_is_interrupted_or_cannot_draw_has_the_exit_status_of_its_script(
    train_: Command, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hubgen.training import train_lora
    from hubgen.training.kit.run import Run

    draw_pictures(Path("pictures"), 3)
    command = ("lora", "pictures", "--base", tiny_model, "--steps", 3, "--rank", 1)
    with monkeypatch.context() as patch:
        plain = Run.update

        def interrupted(self: Run, step: int) -> None:
            plain(self, step)
            signal.raise_signal(signal.SIGINT)

        patch.setattr(Run, "update", interrupted)
        result = train_(*command)
    assert result.status == 130
    assert "hubgen: stopped: step 1 is saved in runs/pictures-lora/checkpoints; the same command goes on" in result.err
    draw = train_lora.draw_prompts

    def broken(run: Any, pipe: Any, validation: Any, side: int, step: int) -> None:
        if step > 1:
            raise RuntimeError("no ink")
        draw(run, pipe, validation, side, step)

    monkeypatch.setattr(train_lora, "draw_prompts", broken)
    result = train_(*command)
    assert result.status == 4
    assert "hubgen: error: the training is done and saved, but the validation of step 2 failed: no ink" in result.err
    assert Path("runs/pictures-lora/lora/pytorch_lora_weights.safetensors").exists()


def test_a_large_base_learns_in_bfloat16(train_: Command, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usual, "SMALL", 1000)
    draw_pictures(Path("pictures"), 3)
    result = train_("lora", "pictures", "--base", tiny_model, "--steps", 2)
    assert result.status == 0, result.err
    found = planned(result)
    assert "numbers in bfloat16" in found["base"] and found["batch"] == "1 picture a step (chosen)"
    assert found["rate"] == "0.0001 (chosen)" and "(attention)" in found["learns"]
    recipe = yaml.safe_load(Path("runs/pictures-lora/recipe.yaml").read_text())
    assert recipe["run"]["mixed_precision"] == "bf16" and recipe["run"]["gradient_checkpointing"]


def test_what_is_chosen_follows_pictures_and_base() -> None:
    small, large = 6_000_000, 2_600_000_000
    found = {(n, size): usual.usual(n, size) for n in (1, 4, 20, 100, 900, 10_000) for size in (small, large)}
    assert [found[n, small].batch_size for n in (1, 4, 20, 100)] == [8, 8, 20, 32]
    assert [found[n, small].steps for n in (1, 20, 100, 900, 10_000)] == [500, 500, 500, 2000, 2000]
    assert {found[n, large].batch_size for n in (1, 4, 20, 100, 900)} == {1}
    assert [found[n, large].steps for n in (1, 4, 20, 100)] == [500, 500, 2000, 2000]
    assert usual.usual(20, large, batch_size=4).steps == 500
    assert {(one.rank, one.learning_rate) for one in found.values()} == {(16, 1e-3), (16, 1e-4)}


def test_missing_extras_are_named(hubgen: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    find = train.importlib.util.find_spec
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find(name))
    line = refused(hubgen("train", "lora", "pictures"))
    assert "training needs tensorboard, which is missing: pip install 'hubgen[train]'" in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "the following arguments are required: KIND"),
        (["lora"], "the following arguments are required: DIR"),
        (["lora", "nowhere"], "nowhere: no such folder, expected a folder of pictures"),
        (["lora", "file.txt"], "file.txt: is a file, expected a folder of pictures"),
        (["lora", "empty", "--trigger", "x"], "empty: got no pictures, expected some"),
        (["lora", "pictures", "--trigger", " "], "--trigger: got ' ', expected words"),
        (["lora", "pictures", "--base", "nowhere"], "--base nowhere: no such folder"),
        (["lora", "pictures", "--base", "file.txt"], "--base file.txt: is a file, expected a pipeline folder or owner"),
        (["lora", "pictures", "--base", "dit"], "--base dit: is a DiTPipeline, expected a pipeline that draws prompts"),
        (["lora", "pictures", "--steps", "0"], "argument --steps: got '0', expected a whole number from 1"),
        (["lora", "pictures", "--learning-rate", "-1"], "got '-1', expected a number above 0"),
        (["lora", "pictures", "--push", "name"], "argument --push: got 'name', expected owner/name on the Hub"),
        (["lora", "pictures", "--push", "a/b"], "--push a/b: the network is off (HF_HUB_OFFLINE=1), expected it on"),
        (["lora", "pictures", "--set", "rank"], "--set rank: expected GROUP.NAME=VALUE"),
        (["lora", "pictures", "--set", "optim.lerning_rate=1"], "unknown setting '--optim.lerning_rate=1' of --set; "),
        (
            ["lora", "pictures", "--set", "optim.learning_rate=fast"],
            "setting 'optim.learning_rate' of --set: got 'fast'",
        ),
        (["lora", "pictures", "--size", "7"], "setting 'data.size': got 7 (int), expected"),
        (["lora", "pictures", "--size", "18"], "setting 'data.size': got 18, expected a multiple of 4"),
        (["lora", "pictures", "--set", "adapter.targets=nothing"], "`targets`: got 'nothing', which no layer of"),
        (["lora", "pictures", "--out", "file.txt"], "--out file.txt: is a file, expected the folder to write"),
        (["dreambooth", "pictures"], "the following arguments are required: --instance-prompt"),
        (["dreambooth", "pictures", "--instance-prompt", ""], "--instance-prompt: got '', expected words"),
        (["dreambooth", "pictures", "--instance-prompt", "x", "--trigger", "x"], "unrecognized arguments: --trigger"),
    ],
)
def test_what_cannot_be_trained_is_told_in_one_line(
    train_: Command, official: Official, tiny_model: Path, arguments: list[str], words: str
) -> None:
    draw_pictures(Path("pictures"), 2)
    Path("empty").mkdir()
    Path("file.txt").write_text("x")
    if "dit" in arguments:
        shutil.copytree(official("dit"), "dit")
    base = () if "--base" in arguments or len(arguments) < 2 else ("--base", tiny_model)
    assert words in refused(without_plan(train_(*arguments, *base)))
    assert not list(Path().rglob("checkpoints"))
