"""The VQ autoencoder of latent diffusion (2112.10752, section 3.1): latents from a codebook, as in VQGAN (2012.09841).

    pixels (B, 3, H, W) -> Encoder -> latents (B, D, h, w) -> nearest codes (B, D, h, w) -> Decoder -> pixels

with h = H / f, w = W / f and f = 2 ** (levels - 1). Latent diffusion works on the latents before the codebook, so
`encode` ends there and quantising is the first step of `decode`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from hubgen.autoencoders.encoder_decoder import Decoder, DecoderOutput, Encoder, check_architecture, check_pixels
from hubgen.autoencoders.quantizer import VectorQuantizer
from hubgen.formats.loading import StrictModelMixin


@dataclass
class VQEncoderOutput(BaseOutput):
    """Latents (B, D, h, w), not yet quantised."""

    latents: torch.Tensor


class VQModel(StrictModelMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin):
    """Autoencoder with a codebook; same name, same checkpoint as diffusers' class.

    Its `commit_loss` has beta on the commitment, the encoder's term, as the paper has it. diffusers has it on the other
    one; `model.quantize.legacy = True` gives that class's numbers.

    Args:
        in_channels: Channels of the pixels that are encoded.
        out_channels: Channels of the pixels that are decoded.
        down_block_types: `"DownEncoderBlock2D"` or, with attention, `"AttnDownEncoderBlock2D"` for each level.
        up_block_types: `"UpDecoderBlock2D"` or `"AttnUpDecoderBlock2D"`, likewise from the latents outwards.
        block_out_channels: Width of each level, from the pixels inwards.
        layers_per_block: Residual blocks of a level of the encoder; the decoder has one more.
        act_fn: `"silu"`, the only one that any published checkpoint uses.
        latent_channels: Channels between encoder and codebook, and between codebook and decoder.
        sample_size: Height and width in pixels of the training pictures; not read by the model.
        num_vq_embeddings: Number of codes.
        norm_num_groups: Groups of every GroupNorm.
        vq_embed_dim: Features D of a code; `None` for `latent_channels`.
        scaling_factor: One over the standard deviation of the latents, for pipelines.
        norm_type: `"group"`. The `"spatial"` norm of MoVQ (Kandinsky 2) is not supported.
        mid_block_add_attention: Whether the middles attend over all pixels.
        lookup_from_codebook: Whether `decode(..., force_not_quantize=True)` is given indices of codes.
        force_upcast: Whether half precision overflows, so that pipelines decode in float32.

    Raises:
        ValueError: The config is not one that the architecture knows.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ResnetBlock2D", "SpatialAttention", "VectorQuantizer"]
    _repeated_blocks = ["ResnetBlock2D"]
    _skip_layerwise_casting_patterns = ["quantize"]
    _group_offload_block_modules = ["quant_conv", "post_quant_conv", "quantize", "encoder", "decoder"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",),
        up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",),
        block_out_channels: tuple[int, ...] = (64,),
        layers_per_block: int = 1,
        act_fn: str = "silu",
        latent_channels: int = 3,
        sample_size: int = 32,
        num_vq_embeddings: int = 256,
        norm_num_groups: int = 32,
        vq_embed_dim: int | None = None,
        scaling_factor: float = 0.18215,
        norm_type: str = "group",
        mid_block_add_attention: bool = True,
        lookup_from_codebook: bool = False,
        force_upcast: bool = False,
    ):
        super().__init__()
        if norm_type != "group":
            raise ValueError(
                f"`norm_type`: got {norm_type!r}, expected 'group'; MoVQ's spatial norm is not supported, load such "
                "models with diffusers' VQModel."
            )
        check_architecture(down_block_types, up_block_types, block_out_channels, act_fn, norm_num_groups)
        embed_dim = latent_channels if vq_embed_dim is None else vq_embed_dim

        shared = (block_out_channels, layers_per_block, norm_num_groups, mid_block_add_attention)
        self.encoder = Encoder(in_channels, latent_channels, down_block_types, *shared)
        self.quant_conv = nn.Conv2d(latent_channels, embed_dim, 1)
        self.quantize = VectorQuantizer(num_vq_embeddings, embed_dim)
        self.post_quant_conv = nn.Conv2d(embed_dim, latent_channels, 1)
        self.decoder = Decoder(latent_channels, out_channels, up_block_types, *shared)

    @property
    def spatial_compression_ratio(self) -> int:
        """f: pixels of an image's side per latent."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    @apply_forward_hook
    def encode(self, x: torch.Tensor, return_dict: bool = True) -> VQEncoderOutput | tuple[torch.Tensor]:
        """Latents of pixels, not yet quantised.

        Args:
            x: Pixels (B, in_channels, H, W) in [-1, 1]; H and W multiples of `spatial_compression_ratio`.
            return_dict: Whether to return an output object rather than a tuple.

        Returns:
            `latents`, (B, D, h, w).

        Raises:
            ValueError: Channels or size are not what the model takes.
        """
        check_pixels("x", x, self.config.in_channels, self.spatial_compression_ratio)
        latents = self.quant_conv(self.encoder(x))
        return VQEncoderOutput(latents=latents) if return_dict else (latents,)

    @apply_forward_hook
    def decode(
        self,
        h: torch.Tensor,
        force_not_quantize: bool = False,
        return_dict: bool = True,
        shape: tuple[int, ...] | None = None,
    ) -> DecoderOutput | tuple[torch.Tensor, torch.Tensor]:
        """Pixels of latents.

        Args:
            h: Latents (B, D, h, w); or indices of codes, where the config's `lookup_from_codebook` says so and
                `force_not_quantize` is set.
            force_not_quantize: Whether the latents are decoded as they are.
            return_dict: Whether to return an output object rather than a tuple.
            shape: (B, h, w, D), of indices.

        Returns:
            `sample`, pixels (B, out_channels, h * f, w * f), about in [-1, 1]; and `commit_loss`, a scalar, or (B,)
            zeros where nothing was quantised.

        Raises:
            ValueError: Latents of other channels, or indices without a shape.
        """
        lookup = force_not_quantize and self.config.lookup_from_codebook
        dim = self.quantize.vq_embed_dim
        if lookup:
            if shape is None or len(shape) != 4 or shape[3] != dim:
                raise ValueError(f"`shape`: got {shape}, expected (B, h, w, {dim}) where codes are looked up.")
            if h.is_floating_point():
                raise ValueError(f"`h`: got {h.dtype}, expected indices where codes are looked up.")
        elif h.ndim != 4 or h.shape[1] != dim:
            raise ValueError(f"`h`: got {tuple(h.shape)}, expected (B, {dim}, h, w).")

        quantized = self.quantize.get_codebook_entry(h, shape) if lookup else h
        if force_not_quantize:
            commit_loss = torch.zeros(h.shape[0], device=quantized.device, dtype=quantized.dtype)
        else:
            quantized, commit_loss, _ = self.quantize(h)
        sample = self.decoder(self.post_quant_conv(quantized))
        return DecoderOutput(sample=sample, commit_loss=commit_loss) if return_dict else (sample, commit_loss)

    def forward(
        self, sample: torch.Tensor, return_dict: bool = True
    ) -> DecoderOutput | tuple[torch.Tensor, torch.Tensor]:
        """Encodes pixels (B, 3, H, W), quantises and decodes; the result is that of `decode`."""
        return self.decode(self.encode(sample).latents, return_dict=return_dict)


def vq_f4(**changes: Any) -> VQModel:
    """Latent diffusion's VQ-f4 (2112.10752, table 8): 4 pixels a latent, 8192 codes of 3 features."""
    return _published((128, 256, 512), 0, {"latent_channels": 3, "num_vq_embeddings": 8192}, changes)


def vq_f8(**changes: Any) -> VQModel:
    """Latent diffusion's VQ-f8: 8 pixels a latent, 16384 codes of 4 features, attention at the lowest resolution."""
    return _published((128, 256, 256, 512), 1, {"latent_channels": 4, "num_vq_embeddings": 16384}, changes)


def _published(widths: tuple[int, ...], attention: int, config: dict[str, Any], changes: dict[str, Any]) -> VQModel:
    """With attention at the `attention` lowest resolutions; its latents went into diffusion unscaled."""
    plain = len(widths) - attention
    shared = {
        "down_block_types": ("DownEncoderBlock2D",) * plain + ("AttnDownEncoderBlock2D",) * attention,
        "up_block_types": ("AttnUpDecoderBlock2D",) * attention + ("UpDecoderBlock2D",) * plain,
        "block_out_channels": widths,
        "layers_per_block": 2,
        "sample_size": 256,
        "scaling_factor": 1.0,
    }
    return VQModel(**{**shared, **config, **changes})
