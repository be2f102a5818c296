"""A whole training problem that takes seconds: drawn pictures, a tiny autoencoder and a tiny text encoder."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image, ImageDraw
from transformers import BertConfig, BertModel, BertTokenizerFast

from hubgen.autoencoders.autoencoder_kl import AutoencoderKL

COLORS = ("red", "green", "blue")
SHAPES = ("ball", "box")


def draw_pictures(folder: Path, count: int, first: int = 0) -> None:
    """`count` pictures of 16x16 pixels, a colored shape each, with metadata.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(first, first + count):
        color, shape = COLORS[number % 3], SHAPES[number % 2]
        picture = Image.new("RGB", (16, 16), "white")
        pen = ImageDraw.Draw(picture)
        (pen.ellipse if shape == "ball" else pen.rectangle)((number % 5, number % 7, 9, 12), fill=color)
        picture.save(folder / f"{number}.png")
        text = f"{color} {shape}"
        rows.append({"file_name": f"{number}.png", "text": text, "captions": [text, f"a {text}", f"{shape} {color}"]})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="session")
def problem(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Settings of train_text_to_image that name the data and the frozen parts."""
    root = tmp_path_factory.mktemp("problem")
    draw_pictures(root / "data" / "train", 14)
    draw_pictures(root / "data" / "held_out", 4, first=14)
    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        shift_factor=0.1,
        scaling_factor=0.9,
    ).save_pretrained(root / "autoencoder")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", *COLORS, *SHAPES]
    (root / "text").mkdir()
    vocabulary = root / "text" / "vocab.txt"
    vocabulary.write_text("\n".join(words))
    by_word = {word: number for number, word in enumerate(words)}
    BertTokenizerFast(vocab_file=str(vocabulary), vocab=by_word).save_pretrained(root / "text")
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
    )
    BertModel(config).save_pretrained(root / "text")
    return {
        "data_dir": str(root / "data"),
        "autoencoder": str(root / "autoencoder"),
        "text_encoder": str(root / "text"),
    }


MMDIT = {
    "patch_size": 2,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "pos_embed_max_size": 8,
    "qk_norm": "rms_norm",
}
UNET = {
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [8, 8],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
}


@pytest.fixture
def recipe(problem: dict[str, str], tmp_path: Path) -> dict[str, Any]:
    """Settings of a run of 8 steps into `tmp_path / "run"`, as a recipe would give them."""
    return {
        **problem,
        "output_dir": str(tmp_path / "run"),
        "size": 16,
        "max_text_tokens": 8,
        "backbone_config": MMDIT,
        "batch_size": 4,
        "max_train_steps": 8,
        "lr_warmup_steps": 2,
        "learning_rate": 1e-2,
        "checkpoint_steps": 3,
        "log_steps": 1,
        "report_to": "none",
        "export_dtype": "float32",
    }


@pytest.fixture
def train(tmp_path: Path) -> Iterator[Callable[[dict[str, Any]], Path]]:
    """Runs train_text_to_image in this process and returns its output folder."""
    import yaml

    from hubgen.training.settings import parse_settings
    from hubgen.training.train_text_to_image import Settings, main

    def run(recipe: dict[str, Any]) -> Path:
        # Accelerate remembers the precision of the process's first run.
        AcceleratorState._reset_state(reset_partial_state=True)
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe))
        main(parse_settings(Settings, ["--config", str(path)]))
        return Path(recipe["output_dir"])

    yield run
    AcceleratorState._reset_state(reset_partial_state=True)
