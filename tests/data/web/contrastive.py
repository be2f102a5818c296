"""Tiny models of pictures and texts on the disk, with random weights: a CLIP and a SigLIP as their repositories are."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

from tests.official import clip_tokenizer
from tests.parity import randomize_

HALF: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
SEES: dict[str, Any] = {**HALF, "image_size": 16, "patch_size": 8}
SIDE, DIMENSIONS = 16, {"clip": 8, "siglip": 16}


def save_model(kind: str, folder: Path) -> Path:
    """A "clip" or "siglip" with its tokenizer and image processor, the same each time; its folder."""
    tokenizer = clip_tokenizer()
    reads = {**HALF, "vocab_size": len(tokenizer), "max_position_embeddings": 12}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "clip":
            ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
            model = CLIPModel(CLIPConfig(text_config={**reads, **ends}, vision_config=SEES, projection_dim=8))
            processor = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SIDE)
        else:
            model = SiglipModel(SiglipConfig(text_config={**reads, "projection_size": 16}, vision_config=SEES))
            processor = SiglipImageProcessor(size={"height": SIDE, "width": SIDE})
        randomize_(model)
    for part in (model, tokenizer, processor):
        part.save_pretrained(folder)
    return folder
