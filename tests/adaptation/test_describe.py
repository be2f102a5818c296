"""What a file of an adapter is, is told from its header: by the names that programs give, and by true widths."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hubgen.adaptation.adapters import AdapterShape, add_adapter, targets
from hubgen.adaptation.attach import layers_of
from hubgen.adaptation.describe import EMOJI, base_of, describe_adapter, describe_embeddings
from hubgen.adaptation.lora_files import as_diffusers
from hubgen.adaptation.textual_inversion import read_words
from hubgen.hub.bundled import bundled_model
from tests.adaptation import dialects

Official = Callable[[str], Path]

SAID: dict[str, Any] = {
    "diffusers": "diffusers",
    "diffusers with kohya's tensors": "diffusers",
    "diffusers 0.20": "diffusers before 0.21",
    "diffusers 0.16": "diffusers before 0.17",
    "diffusers 0.15": "diffusers before 0.17",
    "kohya": "kohya",
    "kohya, blocks": "kohya",
    "ComfyUI": "ComfyUI",
    "Black Forest Labs": "Black Forest Labs",
    "XLabs": "XLabs",
    "OneTrainer": {"transformer": "OneTrainer", "unet": "kohya"},
    "SimpleTuner": "LyCORIS, as SimpleTuner writes it",
}


def networks(folder: Path, backbone: str) -> dict[str, nn.Module]:
    from hubgen import TextToImagePipeline

    pipe = TextToImagePipeline.from_pretrained(folder)
    found = pipe.adaptable_models()
    assert backbone in found
    return found


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd3", "flux-dev"])
def test_every_layout_is_told_by_its_names(official: Official, tmp_path: Path, family: str) -> None:
    backbone = dialects.BACKBONE[family]
    models = networks(official(family), backbone)
    known = dialects.adapter(family, models, seed=1, shared=True)
    for name, layout in dialects.LAYOUTS.items():
        if family not in layout.families:
            continue
        chosen = {
            component: {key: one for key, one in layers.items() if re.fullmatch(layout.layers, key)}
            for component, layers in known.items()
            if layout.text or component == backbone
        }
        path = tmp_path / f"{name}.safetensors"
        save_file({key: one.clone().contiguous() for key, one in layout.write(family, chosen).items()}, path)
        found = describe_adapter(path)
        assert found is not None, name
        said = SAID[name]
        assert found.layout == (said if isinstance(said, str) else said[backbone])
        assert found.kinds == {"LoRA": sum(found.components.values())}
        assert backbone in found.components and found.unknown == []
        assert len(found.components) == (len(models) if layout.text else 1), (name, found.components)
        if family == "flux-dev":
            assert found.base == "FLUX.1"
        if family == "sd3":
            assert found.base == "Stable Diffusion 3 and 3.5"
        if name not in ("kohya, blocks", "Black Forest Labs"):
            assert set(found.ranks) == {4}


@pytest.mark.parametrize("name", dialects.KINDS)
def test_every_kind_is_told_by_its_tensors(tmp_path: Path, name: str) -> None:
    weight = torch.randn(8, 6, 3, 3)
    layer = dialects.KINDS[name](weight, torch.Generator().manual_seed(0))
    assert layer is not None
    key = "lora_unet_down_blocks_0_resnets_0_conv1"
    save_file({f"{key}.{end}": one for end, one in layer.tensors.items()}, tmp_path / "one.safetensors")
    found = describe_adapter(tmp_path / "one.safetensors")
    assert found is not None
    ((kind, count),) = found.kinds.items()
    assert count == 1
    expected = name.split(",")[0].split(" of ")[0]
    expected = {"LoCon with a kernel between": "LoRA with a kernel (LoCon)", "full": "difference"}.get(name, expected)
    if name.startswith("DoRA"):
        assert "(DoRA)" in kind and (name.split(", ")[1] if ", " in name else "LoRA") in kind
    else:
        assert kind == expected
    assert found.alphas in ((dialects.ALPHA,), ())


def pair(key: str, inputs: int, outputs: int = 8, rank: int = 4) -> dict[str, torch.Tensor]:
    return {f"{key}.lora_A.weight": torch.ones(rank, inputs), f"{key}.lora_B.weight": torch.ones(outputs, rank)}


BLOCK = "unet.mid_block.attentions.0.transformer_blocks.0"


@pytest.mark.parametrize(
    ("key", "inputs", "base"),
    [
        (f"{BLOCK}.attn2.to_k", 768, "Stable Diffusion 1.x"),
        (f"{BLOCK}.attn2.to_k", 1024, "Stable Diffusion 2.x"),
        (f"{BLOCK}.attn2.to_v", 2048, "Stable Diffusion XL"),
        (f"{BLOCK}.attn2.to_v", 1280, "Stable Diffusion XL's refiner"),
        (f"{BLOCK}.attn1.to_k", 1280, "Stable Diffusion 1.x or 2.x"),
        ("unet.mid_block.attentions.0.transformer_blocks.9.attn1.to_k", 1280, "Stable Diffusion XL"),
        ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj", 768, "Stable Diffusion 1.x"),
        ("text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj", 1280, "Stable Diffusion XL"),
        ("transformer.transformer_blocks.0.attn.to_q", 1536, "Stable Diffusion 3 or 3.5 medium"),
        ("transformer.transformer_blocks.0.attn2.to_q", 1536, "Stable Diffusion 3.5 medium"),
        ("transformer.transformer_blocks.0.attn.to_q", 2432, "Stable Diffusion 3.5 large"),
        ("transformer.transformer_blocks.0.attn.to_q", 3072, "FLUX.1"),
        ("transformer.single_transformer_blocks.0.attn.to_q", 3072, "FLUX.1"),
        ("something.else", 8, ""),
    ],
)
def test_the_base_is_told_by_true_widths(tmp_path: Path, key: str, inputs: int, base: str) -> None:
    save_file(pair(key, inputs), tmp_path / "one.safetensors")
    assert base_of(tmp_path / "one.safetensors") == base


def test_an_adapter_of_hubgens_own_model_says_ranks_alphas_and_words(tmp_path: Path) -> None:
    from hubgen import SD3Transformer2DModel

    model = SD3Transformer2DModel.from_config(SD3Transformer2DModel.load_config(bundled_model() / "transformer"))
    add_adapter(model, "one", AdapterShape(rank=4, alpha=2, ranks={"to_q": 2}), targets(model, "attention"))
    tensors, header = as_diffusers({"transformer": layers_of(model, "one")}, {"hubgen_prefix": "my style, "})
    save_file(tensors, tmp_path / "one.safetensors", header)
    found = describe_adapter(tmp_path / "one.safetensors")
    assert found is not None
    assert (found.base, found.layout) == (EMOJI, "diffusers")
    assert set(found.ranks) == {2, 4} and found.alphas == (1.0, 2.0)
    assert found.words == {"hubgen_prefix": "my style,"}


def test_what_headers_say_of_words_and_bases_is_found(tmp_path: Path) -> None:
    header = {
        "ss_tag_frequency": json.dumps({"10_cats": {"cat": 30, "sitting ": 4}, "5_more": {"cat": 1}}),
        "modelspec.trigger_phrase": "mycat",
        "ss_base_model_version": "sd_v1",
        "ss_sd_model_name": "None",
        "ss_network_module": "lycoris.kohya",
    }
    tensors = {"lora_unet_mid_block_x.lora_down.weight": torch.ones(2, 8)}
    tensors |= {"lora_unet_mid_block_x.lora_up.weight": torch.ones(8, 2)}
    tensors |= {"lora_unet_mid_block_x.alpha": torch.tensor(1.0), "lora_unet_y.lora_up.weight": torch.ones(8, 2)}
    save_file(tensors, tmp_path / "one.safetensors", header)
    found = describe_adapter(tmp_path / "one.safetensors")
    assert found is not None
    assert found.words == {"modelspec.trigger_phrase": "mycat", "ss_tag_frequency": "cat (31), sitting (4)"}
    assert found.named_bases == {"ss_base_model_version": "sd_v1"}
    assert found.layout == "kohya, by LyCORIS" and found.alphas == (1.0,)
    assert found.unknown == ["lora_unet_y: has up without down (LoRA)"]


@pytest.mark.parametrize("damage", ["{", "[]", '{"a": 1}', "[" * 100_000, json.dumps({"x": {"cat": "many"}})])
def test_damaged_headers_say_nothing_and_break_nothing(tmp_path: Path, damage: str) -> None:
    header = dict.fromkeys(("ss_tag_frequency", "lora_adapter_metadata", "hubgen_alpha"), damage)
    save_file(pair("unet.down_blocks.0.x", 8), tmp_path / "one.safetensors", header)
    found = describe_adapter(tmp_path / "one.safetensors")
    assert found is not None and found.words == {} and found.alphas == ()


def test_the_config_beside_a_file_of_peft_is_read(tmp_path: Path) -> None:
    save_file(pair("base_model.model.transformer_blocks.0.attn.to_q", 1536), tmp_path / "adapter_model.safetensors")
    config = {"r": 4, "lora_alpha": 8, "alpha_pattern": {"to_k": 3}, "base_model_name_or_path": "owner/base"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    found = describe_adapter(tmp_path / "adapter_model.safetensors")
    assert found is not None
    assert (found.layout, found.alphas) == ("PEFT", (3.0, 8.0))
    assert found.named_bases == {"base_model_name_or_path": "owner/base"}


@pytest.mark.parametrize(
    ("tensors", "words", "base"),
    [
        ({"<cat>": (2, 768)}, {"<cat>": (2, 768)}, "Stable Diffusion 1.x"),
        ({"<cat>": (1024,)}, {"<cat>": (1, 1024)}, "Stable Diffusion 2.x"),
        ({"emb_params": (3, 768)}, {"one": (3, 768)}, "Stable Diffusion 1.x"),
        ({"clip_l": (2, 768), "clip_g": (2, 1280)}, {"clip_l": (2, 768), "clip_g": (2, 1280)}, "Stable Diffusion XL"),
        ({"<cat>": (2, 5)}, {"<cat>": (2, 5)}, ""),
    ],
)
def test_learned_words_are_told_with_their_width(
    tmp_path: Path, tensors: dict[str, tuple[int, ...]], words: dict[str, tuple[int, int]], base: str
) -> None:
    save_file({key: torch.ones(shape) for key, shape in tensors.items()}, tmp_path / "one.safetensors")
    found = describe_embeddings(tmp_path / "one.safetensors")
    assert found is not None and (found.words, found.base) == (words, base)
    assert describe_adapter(tmp_path / "one.safetensors") is None


@pytest.mark.parametrize("keys", [("emb_params",), ("clip_l", "clip_g"), ("clip_l", "t5xxl")])
def test_a_word_whose_tensors_have_other_names_is_that_of_the_header_or_the_file(
    tmp_path: Path, keys: tuple[str, ...]
) -> None:
    tensors = {key: torch.ones(1, 768) for key in keys}
    for header, expected in (({"name": "<zog>"}, "<zog>"), ({}, "frog")):
        save_file(tensors, tmp_path / "frog.safetensors", header)
        found = describe_embeddings(tmp_path / "frog.safetensors")
        assert found is not None and found.word == expected
        assert {word.token for word in read_words(tmp_path / "frog.safetensors")} == {expected}


def test_networks_are_no_adapters_and_no_words(official: Official, tmp_path: Path) -> None:
    for part in ("unet", "vae", "text_encoder"):
        (path,) = (official("sd1") / part).glob("*.safetensors")
        assert describe_adapter(path) is None and describe_embeddings(path) is None
    save_file({}, tmp_path / "empty.safetensors")
    save_file({"numbers": torch.arange(3)}, tmp_path / "whole.safetensors")
    for name in ("empty", "whole"):
        path = tmp_path / f"{name}.safetensors"
        assert describe_adapter(path) is None and describe_embeddings(path) is None
