"""Real models, tiny ones with random weights, for tests that need a whole pipeline."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertModel, BertTokenizer, CLIPTextConfig, CLIPTextModelWithProjection

from hubgen.autoencoders.autoencoder_kl import AutoencoderKL
from hubgen.backbones.sd3 import SD3Transformer2DModel
from hubgen.backbones.unet_condition import UNet2DConditionModel
from hubgen.pipelines.text_to_image import TextToImagePipeline
from hubgen.schedulers.ddpm import DDPMScheduler
from hubgen.schedulers.flow_match_euler import FlowMatchEulerDiscreteScheduler

WORDS = ["a", "the", "red", "blue", "green", "cat", "dog", "heart", "smiling", "apple", "big", "small", "##s"]
MAX_LENGTH = 8
TEXT_WIDTH = 16


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with all parameters random, so that no zero initialisation hides a path through it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.2 if parameter.ndim > 1 else 0.1, generator=generator)
            if parameter.ndim == 1 and name.endswith("weight"):
                parameter.add_(1.0)  # norms
    return model.eval()


def tokenizer(max_length: int = MAX_LENGTH) -> BertTokenizer:
    """WordPiece over a dozen words."""
    vocab = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    return BertTokenizer(vocab, model_max_length=max_length)


def text_encoder() -> BertModel:
    config = BertConfig(
        vocab_size=len(WORDS) + 5,
        hidden_size=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    return randomised(BertModel(config))


def clip_text_encoder() -> CLIPTextModelWithProjection:
    """Reads the same tokenizer's ids; the last token is found by `[SEP]`."""
    config = CLIPTextConfig(
        vocab_size=len(WORDS) + 5,
        hidden_size=TEXT_WIDTH,
        intermediate_size=32,
        projection_dim=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
    )
    return randomised(CLIPTextModelWithProjection(config))


def vae() -> AutoencoderKL:
    """Two pixels a latent, four channels."""
    return randomised(
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            latent_channels=4,
            sample_size=16,
            scaling_factor=0.7,
            shift_factor=0.1,
        )
    )


def transformer(**config: Any) -> SD3Transformer2DModel:
    """16 pixels by default, at most 32; multiples of 4."""
    defaults: dict[str, Any] = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": TEXT_WIDTH,
        "caption_projection_dim": 16,
        "pooled_projection_dim": TEXT_WIDTH,
        "pos_embed_max_size": 8,
        "qk_norm": "rms_norm",
    }
    return randomised(SD3Transformer2DModel(**{**defaults, **config}))


def unet(**config: Any) -> UNet2DConditionModel:
    defaults: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "cross_attention_dim": TEXT_WIDTH,
    }
    return randomised(UNet2DConditionModel(**{**defaults, **config}))


def pipeline(backbone: str = "transformer", **components: Any) -> TextToImagePipeline:
    """A pipeline of an MM-DiT on a rectified flow (`transformer`), or of a U-Net on DDPM's path (`unet`)."""
    mmdit = backbone == "transformer"
    defaults: dict[str, Any] = {
        "vae": vae(),
        "text_encoder": text_encoder(),
        "tokenizer": tokenizer(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=2.0) if mmdit else DDPMScheduler(),
        backbone: transformer() if mmdit else unet(),
    }
    pipe = TextToImagePipeline(**{**defaults, **components})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def saved_pipeline(folder: Path, backbone: str = "transformer") -> Path:
    """A pipeline's folder, `folder` itself."""
    pipeline(backbone).save_pretrained(folder)
    return folder
