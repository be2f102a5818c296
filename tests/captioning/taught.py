"""A captioner that knows eight pictures, taught in a second or two, and one that knows nothing."""

from functools import cache

import torch
from PIL import Image, ImageDraw

from hubgen.captioning.captioner import Captioner, Sizes, small_captioner
from hubgen.captioning.stages import TEMPLATES, Stage, set_learning
from hubgen.captioning.templates import SYSTEM, Turn, encode
from hubgen.training.kit.answers import Answers

SIDE = 32
SIZES = Sizes(patch=16, width=48, layers=2, heads=2, vocabulary=400, longest=512)
COLORS, SHAPES = ("red", "green", "blue", "black"), ("ball", "box")
QUESTION = "What is it?"


def drawn(color: str, shape: str, size: tuple[int, int] = (SIDE, SIDE)) -> Image.Image:
    picture = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(picture)
    (pen.ellipse if shape == "ball" else pen.rectangle)((6, 6, size[0] - 7, size[1] - 7), fill=color)
    return picture


NAMED = {f"a {color} {shape}": drawn(color, shape) for color in COLORS for shape in SHAPES}
"""Eight pictures by their captions"""


def untaught(seed: int = 0) -> Captioner:
    torch.manual_seed(seed)
    captioner = small_captioner([*NAMED, QUESTION, SYSTEM], SIDE, SIZES)
    captioner.model.eval()
    return captioner


@cache
def taught(stage: Stage = "pretrain", steps: int = 90) -> Captioner:
    """Knows the captions of `NAMED`; in the stage `instruct` as answers to `QUESTION`. Not to be changed."""
    captioner, template = untaught(), TEMPLATES[stage]
    captioner.processor.chat_template = template.chat
    captioner.model.generation_config.eos_token_id = template.end_tokens(captioner.tokenizer)
    set_learning(captioner.model, "pretrain")
    answers = Answers(captioner.model)
    text = encode([[Turn(QUESTION, one)] for one in NAMED], template, captioner.processor, captioner.image_tokens)
    pixels = captioner.pixels(list(NAMED.values()))
    learning = [one for one in captioner.model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=4e-3)
    captioner.model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1, (step + 1) / 10) * (1 - step / steps)
        (answers(text, pixels) / 40).backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    captioner.model.eval().requires_grad_(False)
    return captioner
