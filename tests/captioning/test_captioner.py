"""A captioner is transformers' Llava: what it loads, what it computes, and what does not fit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from hubgen.captioning.captioner import (
    Sizes,
    fitted_tokenizer,
    image_processor,
    open_captioner,
    put_together,
    small_captioner,
)
from hubgen.captioning.templates import IGNORED, PLAIN, V1, Turn, encode
from hubgen.hub.publish import prepare
from hubgen.training.kit.answers import Answers
from tests.captioning.taught import NAMED, QUESTION, SIDE, drawn, untaught

PICTURES = list(NAMED.values())[:2]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("captioner")
    untaught().save(folder)
    return folder


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copied"))


def test_tokens_pixels_logits_and_loss_are_those_of_transformers_llava(saved: Path) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(saved).eval()
    processor = AutoProcessor.from_pretrained(saved)
    told = processor(text=["<image>a red ball\n", "<image>a red box\n"], images=PICTURES, return_tensors="pt",
                     padding=True, padding_side="right")  # fmt: skip
    captioner = open_captioner(saved)
    conversations = [[Turn("", "a red ball")], [Turn("", "a red box")]]
    text = encode(conversations, PLAIN, captioner.processor, captioner.image_tokens)
    pixels = captioner.pixels(PICTURES)
    assert torch.equal(text.ids, told.input_ids) and torch.equal(text.mask, told.attention_mask)
    assert torch.equal(pixels, told.pixel_values)
    with torch.no_grad():
        theirs = model(**told, labels=text.labels)
        ours = captioner.model(input_ids=text.ids, attention_mask=text.mask, pixel_values=pixels)
        loss = Answers(captioner.model)(text, pixels) / (text.labels != IGNORED).sum()
    assert torch.equal(ours.logits, theirs.logits)
    assert loss.item() == pytest.approx(theirs.loss.item(), rel=1e-6)


def test_transformers_fills_the_chat_template_as_the_training_writes_conversations(saved: Path, tmp_path: Path) -> None:
    captioner = open_captioner(saved)
    captioner.processor.chat_template = V1.chat
    captioner.save(tmp_path)
    said = [("user", [{"type": "text", "text": QUESTION}, {"type": "image"}]), ("assistant", "A ball."),
            ("user", "Sure?"), ("assistant", [{"type": "text", "text": "Yes."}])]  # fmt: skip
    messages = [{"role": role, "content": content} for role, content in said]
    filled = AutoProcessor.from_pretrained(tmp_path).apply_chat_template(messages)
    assert filled == V1.write([Turn(QUESTION, "A ball."), Turn("Sure?", "Yes.")], "</s>")[0]


def test_a_padded_picture_loses_nothing_and_another_one_its_longer_ends() -> None:
    wide = drawn("black", "box", (2 * SIDE, SIDE))
    cut, padded = (image_processor(SIDE, padded=padded)([wide], return_tensors="pt").pixel_values[0]
                   for padded in (False, True))  # fmt: skip
    ends = [pixels[:, SIDE // 2, [0, -1]] for pixels in (cut, padded)]
    white = image_processor(SIDE)([drawn("white", "box")], return_tensors="pt").pixel_values[0, :, 0, 0]
    assert not torch.allclose(ends[0], white[:, None])
    assert torch.allclose(ends[1], white[:, None])
    assert padded[:, 0].abs().max() < 0.02  # the mean colour, to one of 255 steps


def test_the_same_texts_give_the_same_tokenizer_and_every_text_comes_back() -> None:
    first, second = (fitted_tokenizer(list(NAMED), 300) for _ in range(2))
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    for text in ("a red ball", "ein blåer Bär 🐻, 熊", "  two  spaces"):
        assert first.decode(first.encode(text), skip_special_tokens=True) == text


def test_all_that_transformers_needs_is_sent_to_the_hub(saved: Path) -> None:
    shipment = prepare(saved, "owner/captioner", licence_needed=False)
    assert shipment.kind.name == "captioner" and shipment.left == ()
    assert {"model.safetensors", "config.json", "tokenizer.json", "processor_config.json"} <= shipment.files.keys()


# ---- put together ----


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model without `<image>` and without a token for padding."""
    folder = tmp_path_factory.mktemp("language")
    made = fitted_tokenizer(list(NAMED), 300).backend_tokenizer.to_str()
    told = json.loads(made.replace("<image>", "<other>").replace("<pad>", "<more>"))
    path = folder / "words.json"
    path.write_text(json.dumps(told))
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path), bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


SHARED = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
          "image_size": SIDE, "patch_size": 16}  # fmt: skip


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_tower_and_a_language_model_put_together_keep_their_weights(
    kind: str, language: Path, tmp_path: Path
) -> None:
    if kind == "clip":
        tower: Any = CLIPVisionModel(CLIPVisionConfig(**SHARED))
        CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SIDE).save_pretrained(tmp_path)
    else:
        tower = SiglipVisionModel(SiglipVisionConfig(**SHARED))
        SiglipImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(tmp_path)
    tower.save_pretrained(tmp_path)
    captioner = put_together(str(tmp_path), str(language))
    assert captioner.image_tokens == 4
    pixels, ids = captioner.pixels(PICTURES), torch.tensor([[5, 20, 30, 40]])
    with torch.no_grad():
        seen = captioner.model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
        assert torch.equal(seen, tower.eval()(pixels, output_hidden_states=True).hidden_states[-2])
        alone = AutoModelForCausalLM.from_pretrained(language)(ids).logits
        assert torch.equal(captioner.model(input_ids=ids).logits[..., : alone.shape[-1]], alone)
    captioner.save(tmp_path / "whole")
    assert open_captioner(tmp_path / "whole").image_tokens == 4


# ---- what does not fit ----


def config_with(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: _rewrite(folder / "config.json", changes)


def processor_with(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: _rewrite(folder / "processor_config.json", changes)


def _rewrite(path: Path, changes: dict[str, Any]) -> None:
    values = json.loads(path.read_text())
    for name, value in changes.items():
        where, _, key = name.rpartition("__")
        (values[where] if where else values)[key] = value
    path.write_text(json.dumps(values))


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"no weights")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            config_with(image_token_index=7),
            "image token '<image>': got the id 3 in the tokenizer, expected 7, ima",
        ),
        (config_with(text_config__vocab_size=100), "tokens, expected at most 100, those of the language model"),
        (
            config_with(vision_feature_select_strategy="full"),
            "vision_feature_select_strategy of its processor: got d",
        ),
        (config_with(vision_config__image_size=64), "pixels of a side of its processor: got 32, expected 64"),
        (config_with(model_type="llama"), "got a model of the type 'llama', expected 'llava'"),
        (config_with(model_type="nonsense"), "its config.json cannot be read"),
        (processor_with(patch_size=8), "patch_size of its processor: got 8, expected 16"),
        (processor_with(patch_size=None), "its processor, LlavaProcessor: got no patch_size, expected those of"),
        (
            processor_with(num_additional_image_tokens=0),
            "got 3 image tokens for a picture, expected 4: the vision",
        ),
        (processor_with(image_token="picture"), "the image token 'picture': got the ids ["),
        (without_weights, "its weights cannot be read"),
        (lambda folder: (folder / "config.json").unlink(), "holds no config.json, expected a captioner"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "its processor cannot be read"),
    ],
)
def test_what_does_not_fit_is_named_in_one_line(copied: Path, change: Callable[[Path], None], words: str) -> None:
    change(copied)
    with pytest.raises(ValueError) as refused:
        open_captioner(copied)
    assert words in str(refused.value) and str(copied) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_captioner_that_is_nowhere_and_sizes_that_do_not_fit_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place, words in (("nowhere", "no such folder"), (str(tmp_path / "file"), "is a file, expected the folder")):
        with pytest.raises(ValueError, match=words):
            open_captioner(place)
    with pytest.raises(ValueError, match="`side`: got 30, expected a multiple of 16"):
        small_captioner(["a"], 30, Sizes())
