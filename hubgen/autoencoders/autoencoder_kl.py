"""The KL autoencoder of latent diffusion (Rombach et al. 2022, https://arxiv.org/abs/2112.10752, section 3.1).

    pixels (B, 3, H, W) -> Encoder -> moments (B, 2C, h, w) -> posterior -> latents (B, C, h, w) -> Decoder -> pixels

with h = H / f, w = W / f and f = 2 ** (levels - 1). The published models are functions at the end of this file.
"""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from diffusers.utils.torch_utils import randn_tensor
from torch import nn

from hubgen.autoencoders.encoder_decoder import Decoder, DecoderOutput, Encoder, check_architecture, check_pixels
from hubgen.formats.loading import StrictModelMixin
from hubgen.formats.single_file import SingleFileMixin
from hubgen.layers.attention import AttnProcessor


class DiagonalGaussianDistribution:
    """The encoder's posterior N(mean, diag(std²)) over latents.

    Args:
        parameters: Mean and log variance side by side, (B, 2C, h, w); the log variance is clamped to [-30, 20].
    """

    def __init__(self, parameters: torch.Tensor):
        self.parameters = parameters
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.std = torch.exp(0.5 * self.logvar)
        self.var = torch.exp(self.logvar)

    def sample(self, generator: torch.Generator | list[torch.Generator] | None = None) -> torch.Tensor:
        """mean + std · noise, (B, C, h, w)."""
        noise = randn_tensor(self.mean.shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype)
        return self.mean + self.std * noise

    def mode(self) -> torch.Tensor:
        """The mean, (B, C, h, w)."""
        return self.mean

    def kl(self) -> torch.Tensor:
        """KL divergence from the standard normal distribution in nats, summed over an image's latents: (B,)."""
        return 0.5 * (self.mean.square() + self.var - 1.0 - self.logvar).sum(dim=[1, 2, 3])


class AutoencoderKL(StrictModelMixin, SingleFileMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin):
    """Autoencoder with a Gaussian posterior over latents; same name, same checkpoint as diffusers' class.

    Latents enter a diffusion model as `(latents - shift_factor) * scaling_factor`; both are measured from data by
    `training/train_autoencoder.py`.

    Args:
        in_channels: Channels of the pixels that are encoded.
        out_channels: Channels of the pixels that are decoded.
        down_block_types: `"DownEncoderBlock2D"` or, with attention, `"AttnDownEncoderBlock2D"` for each level.
        up_block_types: `"UpDecoderBlock2D"` or `"AttnUpDecoderBlock2D"`, likewise from the latents outwards.
        block_out_channels: Width of each level, from the pixels inwards.
        layers_per_block: Residual blocks of a level of the encoder; the decoder has one more.
        act_fn: `"silu"`, the only one that any published checkpoint uses.
        latent_channels: Channels C of the latents.
        norm_num_groups: Groups of every GroupNorm.
        sample_size: Height and width in pixels of the training pictures; tiles have this size.
        scaling_factor: One over the standard deviation of the latents.
        shift_factor: Mean of the latents, `None` for 0.
        latents_mean: Mean of each channel, kept for pipelines that normalise by channel.
        latents_std: Standard deviation of each channel, likewise.
        force_upcast: Whether half precision overflows, so that pipelines decode in float32.
        use_quant_conv: Whether a 1x1 convolution follows the encoder.
        use_post_quant_conv: Whether a 1x1 convolution precedes the decoder.
        mid_block_add_attention: Whether the middles attend over all pixels.

    Raises:
        ValueError: A block type or activation is not one that the architecture knows, or lengths disagree.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ResnetBlock2D", "SpatialAttention"]
    _repeated_blocks = ["ResnetBlock2D"]
    _group_offload_block_modules = ["quant_conv", "post_quant_conv", "encoder", "decoder"]

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
        latent_channels: int = 4,
        norm_num_groups: int = 32,
        sample_size: int = 32,
        scaling_factor: float = 0.18215,
        shift_factor: float | None = None,
        latents_mean: tuple[float, ...] | None = None,
        latents_std: tuple[float, ...] | None = None,
        force_upcast: bool = True,
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
        mid_block_add_attention: bool = True,
    ):
        super().__init__()
        check_architecture(down_block_types, up_block_types, block_out_channels, act_fn, norm_num_groups)

        shared = (block_out_channels, layers_per_block, norm_num_groups, mid_block_add_attention)
        self.encoder = Encoder(in_channels, 2 * latent_channels, down_block_types, *shared)
        self.decoder = Decoder(latent_channels, out_channels, up_block_types, *shared)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1) if use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1) if use_post_quant_conv else None

        self.use_slicing = False
        self.use_tiling = False
        size = sample_size if isinstance(sample_size, int) else sample_size[0]
        self.tile_sample_min_size = size
        self.tile_latent_min_size = size // self.spatial_compression_ratio
        self.tile_overlap_factor = 0.25

    @property
    def spatial_compression_ratio(self) -> int:
        """f: pixels of an image's side per latent."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    def set_default_attn_processor(self) -> None:
        """Puts the standard attention processor back."""
        self.set_attn_processor(AttnProcessor())

    @apply_forward_hook
    def encode(
        self, x: torch.Tensor, return_dict: bool = True
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Posterior over the latents of pixels.

        Args:
            x: Pixels (B, in_channels, H, W) in [-1, 1]; H and W multiples of `spatial_compression_ratio`.
            return_dict: Whether to return an output object rather than a tuple.

        Returns:
            `latent_dist`, a `DiagonalGaussianDistribution` over (B, C, h, w).

        Raises:
            ValueError: Channels or size are not what the model takes.
        """
        check_pixels("x", x, self.config.in_channels, self.spatial_compression_ratio)
        moments = self._sliced(self._encode, x)
        posterior = DiagonalGaussianDistribution(moments)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def decode(
        self, z: torch.Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[torch.Tensor]:
        """Pixels of latents.

        Args:
            z: Latents (B, C, h, w) at the autoencoder's own scale (`scaling_factor` and `shift_factor` undone).
            return_dict: Whether to return an output object rather than a tuple.
            generator: Not used; decoding is deterministic. Part of the signature that pipelines call.

        Returns:
            `sample`, pixels (B, out_channels, h · f, w · f), about in [-1, 1].

        Raises:
            ValueError: The channels are not what the model takes.
        """
        if z.ndim != 4 or z.shape[1] != self.config.latent_channels:
            raise ValueError(f"`z`: got {tuple(z.shape)}, expected (B, {self.config.latent_channels}, h, w).")
        sample = self._sliced(self._decode, z)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(
        self,
        sample: torch.Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[torch.Tensor]:
        """Encodes pixels (B, 3, H, W) and decodes the posterior's mode, or a sample of it."""
        posterior = self.encode(sample).latent_dist
        latents = posterior.sample(generator) if sample_posterior else posterior.mode()
        return self.decode(latents, return_dict=return_dict)

    def enable_slicing(self) -> None:
        """Encode and decode one image at a time: less memory at the same result."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        """Encode and decode whole batches."""
        self.use_slicing = False

    def enable_tiling(self) -> None:
        """Encode and decode large images tile by tile: constant memory, and a result that differs at the seams."""
        self.use_tiling = True

    def disable_tiling(self) -> None:
        """Encode and decode whole images."""
        self.use_tiling = False

    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        def encode_tile(tile: torch.Tensor) -> torch.Tensor:
            moments = self.encoder(tile)
            return moments if self.quant_conv is None else self.quant_conv(moments)

        if self.use_tiling and max(x.shape[-2:]) > self.tile_sample_min_size:
            return self._tiled(encode_tile, x, self.tile_sample_min_size, self.tile_latent_min_size)
        return encode_tile(x)

    def _decode(self, z: torch.Tensor) -> torch.Tensor:
        def decode_tile(tile: torch.Tensor) -> torch.Tensor:
            return self.decoder(tile if self.post_quant_conv is None else self.post_quant_conv(tile))

        if self.use_tiling and max(z.shape[-2:]) > self.tile_latent_min_size:
            return self._tiled(decode_tile, z, self.tile_latent_min_size, self.tile_sample_min_size)
        return decode_tile(z)

    def _sliced(self, function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        if self.use_slicing and len(x) > 1:
            return torch.cat([function(part) for part in x.split(1)])
        return function(x)

    def _tiled(
        self, function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, size_in: int, size_out: int
    ) -> torch.Tensor:
        """Applies `function` to overlapping tiles of `size_in` and blends its outputs of `size_out` linearly."""
        stride = int(size_in * (1 - self.tile_overlap_factor))
        overlap = int(size_out * self.tile_overlap_factor)
        keep = size_out - overlap
        rows: list[list[torch.Tensor]] = []
        for top in range(0, x.shape[2], stride):
            row = [
                function(x[:, :, top : top + size_in, left : left + size_in]) for left in range(0, x.shape[3], stride)
            ]
            for j, tile in enumerate(row):
                if rows:
                    blend_edge(rows[-1][j], tile, overlap, dim=2)
                if j > 0:
                    blend_edge(row[j - 1], tile, overlap, dim=3)
            rows.append(row)
        return torch.cat([torch.cat([tile[:, :, :keep, :keep] for tile in row], dim=3) for row in rows], dim=2)


def blend_edge(before: torch.Tensor, tile: torch.Tensor, extent: int, dim: int) -> None:
    """Fades in place from the last `extent` lines of `before` to the first ones of `tile` along `dim`."""
    extent = min(before.shape[dim], tile.shape[dim], extent)
    shape = [1, 1, 1, 1]
    shape[dim] = extent
    weight = (torch.arange(extent, device=tile.device, dtype=tile.dtype) / max(extent, 1)).view(shape)
    end = before.narrow(dim, before.shape[dim] - extent, extent)
    start = tile.narrow(dim, 0, extent)
    start.copy_(end * (1 - weight) + start * weight)


def stable_diffusion(**changes: Any) -> AutoencoderKL:
    """That of Stable Diffusion 1 and 2 (2112.10752; trained again in 2022): 4 channels; `changes` to the config."""
    return _published({"sample_size": 512, "scaling_factor": 0.18215}, changes)


def stable_diffusion_xl(**changes: Any) -> AutoencoderKL:
    """That of SDXL (2307.01952, section 2.4): the same architecture, trained anew; overflows in float16."""
    return _published({"sample_size": 1024, "scaling_factor": 0.13025}, changes)


def stable_diffusion_3(**changes: Any) -> AutoencoderKL:
    """That of SD3 and SD3.5 (2403.03206, section 5.2.1): 16 channels, centred, without convolutions beside them."""
    return _published({**SIXTEEN_CHANNELS, "scaling_factor": 1.5305, "shift_factor": 0.0609}, changes)


def flux(**changes: Any) -> AutoencoderKL:
    """That of FLUX.1: the architecture of SD3's."""
    return _published({**SIXTEEN_CHANNELS, "scaling_factor": 0.3611, "shift_factor": 0.1159}, changes)


SIXTEEN_CHANNELS = {"sample_size": 1024, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}


def _published(config: dict[str, Any], changes: dict[str, Any]) -> AutoencoderKL:
    """Eight pixels a latent: what the four have in common."""
    shared = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
    }
    return AutoencoderKL(**{**shared, **config, **changes})
