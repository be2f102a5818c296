"""What learns in a stage is exactly what the papers say, and exactly what gets a gradient."""

import re

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from hubgen.captioning.captioner import Captioner, Sizes, small_captioner
from hubgen.captioning.stages import TEMPLATES, Stage, learning_blocks, set_learning
from hubgen.captioning.templates import SYSTEM, Turn, encode
from hubgen.training.kit.answers import Answers
from tests.captioning.taught import NAMED, QUESTION, SIDE

PROJECTOR = r"model\.multi_modal_projector\..*"
LANGUAGE = r"model\.language_model\..*|lm_head\.weight"
# Of the blocks 0 to 3: the upper half, without the last one, which lies behind the layer -2.
BLOCKS = r"model\.vision_tower\.(vision_model\.)?encoder\.layers\.2\..*"
EXPECTED: dict[Stage, str] = {
    "align": PROJECTOR,
    "pretrain": f"{PROJECTOR}|{LANGUAGE}|{BLOCKS}",
    "instruct": f"{PROJECTOR}|{LANGUAGE}",
}


def captioner_of(layers: int = 4) -> Captioner:
    sizes = Sizes(patch=16, width=16, layers=layers, heads=2, vocabulary=300, longest=512)
    return small_captioner([*NAMED, QUESTION, SYSTEM], SIDE, sizes)


@pytest.mark.parametrize("stage", EXPECTED)
def test_the_parameters_of_a_stage_are_the_stated_ones_and_those_with_a_gradient(stage: Stage) -> None:
    captioner = captioner_of()
    model = captioner.model
    learning = set_learning(model, stage)
    names = [name for name, _ in model.named_parameters()]
    assert learning == [name for name in names if re.fullmatch(EXPECTED[stage], name)]
    assert len(learning) == {"align": 4, "pretrain": 4 + 38 + 16, "instruct": 4 + 38}[stage]
    text = encode(
        [[Turn(QUESTION, one)] for one in NAMED], TEMPLATES[stage], captioner.processor, captioner.image_tokens
    )
    Answers(model)(text, captioner.pixels(list(NAMED.values()))).backward()
    with_gradient = {name for name, one in model.named_parameters() if one.grad is not None}
    assert with_gradient == set(learning)
    # All of them, if everything could learn, but for what lies behind the layer that is read.
    model.requires_grad_(True).zero_grad()
    Answers(model)(text, captioner.pixels(list(NAMED.values()))).backward()
    without = {name for name, one in model.named_parameters() if one.grad is None}
    assert without == {name for name in names if re.search(r"encoder\.layers\.3\.|post_layernorm", name)}


@pytest.mark.parametrize(
    ("blocks", "layer", "learning"),
    [
        (24, -2, range(12, 23)),
        (24, -1, range(12, 24)),
        (24, 23, range(12, 23)),
        (24, [-8, -2], range(12, 23)),
        (4, 1, range(0)),
    ],
)
def test_the_blocks_that_learn_are_the_upper_half_up_to_the_layer_that_is_read(
    blocks: int, layer: int | list[int], learning: range
) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**sizes, num_hidden_layers=blocks, image_size=32, patch_size=16)
    text = LlamaConfig(**sizes, num_hidden_layers=1, vocab_size=10)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(
            LlavaConfig(vision_config=vision, text_config=text, vision_feature_layer=layer)
        )
    found = {id(block) for block in learning_blocks(model)}
    every = [(name, module) for name, module in model.named_modules() if re.search(r"vision.*layers\.\d+$", name)]
    assert [int(name.rpartition(".")[2]) for name, module in every if id(module) in found] == list(learning)
