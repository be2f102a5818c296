"""What every test shares: no network, few threads, nothing random that was not asked for, and a tiny model."""

import os

# Before any import of torch or huggingface_hub, which read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "2")

from pathlib import Path

import pytest
import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Every test starts from the same global seed, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a whole text-to-image pipeline of a few thousand random weights, for pictures of 16x16 pixels."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    from hubgen.autoencoders.autoencoder_kl import AutoencoderKL
    from hubgen.backbones.mmdit import SD3Transformer2DModel
    from hubgen.pipelines.text_to_image import TextToImagePipeline
    from hubgen.schedulers.flow_match_euler import FlowMatchEulerDiscreteScheduler

    folder = tmp_path_factory.mktemp("tiny-model")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "green", "blue", "smiling", "cat", "apple"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=8)
    torch.manual_seed(0)
    text_encoder = BertModel(
        BertConfig(
            vocab_size=len(words),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
        )
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
    )
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    for parameter in transformer.parameters():  # zeroed gates would hide the prompt
        torch.nn.init.normal_(parameter, std=0.2)
    pipe = TextToImagePipeline(
        vae=vae,
        transformer=transformer,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    pipe.save_pretrained(folder / "pipeline")
    return folder / "pipeline"
