"""FLUX.1's transformer: MM-DiT's double blocks, then single blocks in which text and image are one sequence.

      packed x_t             t, guidance, pooled text         text tokens
          |                            |                           |
      x_embedder                time_text_embed            context_embedder
          |                            |                           |
          x --> 19 double blocks: joint attention, two MLPs <-- context        (hubgen/layers/mmdit_blocks.py)
          |                                                        |
          +--> 38 single blocks: attention and MLP side by side <--+
          |
    norm_out, proj_out
          |
     the velocity, noise minus data

Positions (frame, row, column) enter by turning the queries and keys of every block. The weights are described by the
authors' code, black-forest-labs/flux; there is no paper. `dev` takes a guidance scale as an input, `schnell` none.

Shapes: B batch, T image tokens (2 x 2 latent pixels of 16 channels each), L text tokens, D features of a token.
"""

from collections.abc import Iterator
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import FluxTransformer2DLoadersMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils import apply_lora_scale, logging
from torch import nn

from hubgen.backbones.base import Backbone
from hubgen.formats.single_file import SingleFileMixin
from hubgen.layers.checks import require_shape
from hubgen.layers.conditioned import modulations
from hubgen.layers.embeddings import (
    CombinedTimestepGuidanceTextProjEmbeddings,
    CombinedTimestepTextProjEmbeddings,
    FluxPosEmbed,
)
from hubgen.layers.mmdit_blocks import FluxSingleTransformerBlock, FluxTransformerBlock, initialize_joint_
from hubgen.layers.normalization import AdaLayerNormContinuous
from hubgen.layers.residuals import in_turns, shared_by_neighbours

logger = logging.get_logger(__name__)


def flux_dev() -> dict[str, Any]:
    """Config of FLUX.1 dev's transformer, 11.9 billion parameters."""
    return {**flux_schnell(), "guidance_embeds": True}


def flux_schnell() -> dict[str, Any]:
    """Config of FLUX.1 schnell's transformer: the default one."""
    return {
        "in_channels": 64,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": False,
        "axes_dims_rope": (16, 56, 56),
    }


class FluxStem(SingleFileMixin, Backbone):
    """What FLUX's transformer and ControlNets for it begin with: the embedders, and the checks of their inputs.

    A subclass has the embedders built by `build_stem`, and `inner_dim` (D), the features of a token.
    """

    inner_dim: int

    def build_stem(self) -> None:
        """Makes the embedders that the config describes."""
        config = self.config
        self.pos_embed = FluxPosEmbed(theta=10000, axes_dim=tuple(config.axes_dims_rope))
        self._kept_rotary: tuple[Any, ...] | None = None
        embeddings = (
            CombinedTimestepGuidanceTextProjEmbeddings if config.guidance_embeds else CombinedTimestepTextProjEmbeddings
        )
        self.time_text_embed = embeddings(self.inner_dim, config.pooled_projection_dim)
        self.context_embedder = nn.Linear(config.joint_attention_dim, self.inner_dim)
        self.x_embedder = nn.Linear(config.in_channels, self.inner_dim)

    def check_axes(self) -> None:
        """Raises ValueError unless the axes of the positions share out a head's features in even parts."""
        axes, head = tuple(self.config.axes_dims_rope), self.config.attention_head_dim
        if sum(axes) != head or any(dim % 2 for dim in axes):
            raise ValueError(
                f"`axes_dims_rope`: got {axes}, expected even numbers that add up to `attention_head_dim` = {head}."
            )

    def embed(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        pooled_projections: torch.Tensor,
        timestep: torch.Tensor,
        guidance: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Image tokens (B, T, D), text tokens (B, L, D), condition (B, D); the arguments are those of `forward`."""
        x = self.x_embedder(hidden_states)  # (B, T, D)
        context = self.context_embedder(encoder_hidden_states)  # (B, L, D)
        return x, context, self.embed_time(timestep, pooled_projections, guidance, x.dtype)

    def embed_time(
        self,
        timestep: torch.Tensor,
        pooled_projections: torch.Tensor,
        guidance: torch.Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """What modulates every block, the embedded time, guidance and pooled text: (B,), (B, P), (B,) -> (B, D).

        `dtype` is the precision of the tokens, to which time and guidance are rounded before they grow by 1000, as
        they were when the weights were trained; the model's own by default.
        """
        dtype = self.dtype if dtype is None else dtype
        scales = [1000 * scale.to(dtype) for scale in (timestep, guidance) if scale is not None]
        return self.time_text_embed(*scales, pooled_projections)

    def context_layers(self) -> list[nn.Module]:
        """The layers that see the text as it comes in, and nothing else."""
        return [self.context_embedder]

    def time_embedders(self) -> list[nn.Module]:
        """The modules that `modulations` depends on, besides the layers themselves."""
        return [self.time_text_embed]

    def modulations(
        self, timestep: torch.Tensor, pooled_projections: torch.Tensor, guidance: torch.Tensor | None = None
    ) -> Iterator[tuple[nn.Module, torch.Tensor]]:
        """What every layer answers that sees time and pooled text alone; the arguments are those of `forward`."""
        return modulations(self, self.embed_time(timestep, pooled_projections, guidance))

    def rotary_tables(self, txt_ids: torch.Tensor, img_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of all positions, text first, each (L + T, features of a head).

        Kept for the next call: in a sampling loop every call has the very same tensors of positions.
        """
        if torch.compiler.is_compiling() or txt_ids.is_inference() or img_ids.is_inference():
            return self.pos_embed(torch.cat([txt_ids, img_ids]))
        stamp = (txt_ids._version, img_ids._version)
        kept = self._kept_rotary
        if kept is None or kept[0] is not txt_ids or kept[1] is not img_ids or kept[2] != stamp:
            kept = (txt_ids, img_ids, stamp, self.pos_embed(torch.cat([txt_ids, img_ids])))
            self._kept_rotary = kept
        return kept[3]

    def check_inputs(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None,
        pooled_projections: torch.Tensor | None,
        timestep: torch.Tensor | None,
        img_ids: torch.Tensor | None,
        txt_ids: torch.Tensor | None,
        guidance: torch.Tensor | None,
    ) -> None:
        """Raises ValueError where an input is missing or its shape does not fit the config."""
        batch, config, axes = len(hidden_states), self.config, len(self.config.axes_dims_rope)
        require_shape("hidden_states", hidden_states, (batch, "tokens", config.in_channels))
        require_shape("encoder_hidden_states", encoder_hidden_states, (batch, "tokens", config.joint_attention_dim))
        require_shape("pooled_projections", pooled_projections, (batch, config.pooled_projection_dim))
        require_shape("img_ids", img_ids, (hidden_states.shape[1], axes))
        require_shape("txt_ids", txt_ids, (encoder_hidden_states.shape[1], axes))
        if guidance is not None and not config.guidance_embeds:
            raise ValueError("`guidance`: got a tensor, expected None for a model without `guidance_embeds`.")
        scales = {"timestep": timestep} | ({"guidance": guidance} if config.guidance_embeds else {})
        for name, value in scales.items():
            require_shape(name, value, (1 if value is not None and value.shape == (1,) else batch,))


class FluxTransformer2DModel(FluxTransformer2DLoadersMixin, FluxStem):
    """The transformer of FLUX.1; same name, same checkpoint as diffusers' class, of which a fresh model predicts 0.

    Args:
        patch_size: Side of the square of pixels that one token's prediction holds; 1, as tokens are packed outside.
        in_channels: Features of a packed token of latents.
        out_channels: Features of a packed token of the prediction; `None` for `in_channels`.
        num_layers: Double blocks.
        num_single_layers: Single blocks.
        attention_head_dim: Features of a head.
        num_attention_heads: Heads; the width D is heads times features.
        joint_attention_dim: Features of the text tokens.
        pooled_projection_dim: Features of the pooled text embedding.
        guidance_embeds: Whether the guidance scale is an input (dev), for guidance was distilled into the weights.
        axes_dims_rope: Features of a head that each axis of the positions turns.

    Raises:
        ValueError: `axes_dims_rope` do not share a head's features out in even parts.
    """

    _no_split_modules = ["FluxTransformerBlock", "FluxSingleTransformerBlock"]
    _repeated_blocks = ["FluxTransformerBlock", "FluxSingleTransformerBlock"]
    _skip_layerwise_casting_patterns = ["pos_embed", "norm"]
    _cached_blocks = {FluxTransformerBlock: (1, 0), FluxSingleTransformerBlock: (1, 0)}

    @register_to_config
    def __init__(
        self,
        patch_size: int = 1,
        in_channels: int = 64,
        out_channels: int | None = None,
        num_layers: int = 19,
        num_single_layers: int = 38,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 4096,
        pooled_projection_dim: int = 768,
        guidance_embeds: bool = False,
        axes_dims_rope: tuple[int, ...] = (16, 56, 56),
    ):
        super().__init__()
        self.check_axes()
        self.inner_dim = num_attention_heads * attention_head_dim
        self.out_channels = in_channels if out_channels is None else out_channels

        self.build_stem()
        block = {
            "dim": self.inner_dim,
            "num_attention_heads": num_attention_heads,
            "attention_head_dim": attention_head_dim,
        }
        self.transformer_blocks = nn.ModuleList(FluxTransformerBlock(**block) for _ in range(num_layers))
        self.single_transformer_blocks = nn.ModuleList(
            FluxSingleTransformerBlock(**block) for _ in range(num_single_layers)
        )
        self.norm_out = AdaLayerNormContinuous(self.inner_dim, self.inner_dim, elementwise_affine=False, eps=1e-6)
        self.proj_out = nn.Linear(self.inner_dim, patch_size * patch_size * self.out_channels)
        initialize_joint_(self)

    @apply_lora_scale("joint_attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        pooled_projections: torch.Tensor | None = None,
        timestep: torch.Tensor | None = None,
        img_ids: torch.Tensor | None = None,
        txt_ids: torch.Tensor | None = None,
        guidance: torch.Tensor | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        controlnet_block_samples: list[torch.Tensor] | None = None,
        controlnet_single_block_samples: list[torch.Tensor] | None = None,
        return_dict: bool = True,
        controlnet_blocks_repeat: bool = False,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Predicts the velocity, noise minus data, of packed latents.

        Args:
            hidden_states: Packed x_t, (B, T, in_channels).
            encoder_hidden_states: Text tokens, (B, L, joint_attention_dim).
            pooled_projections: Pooled text, (B, pooled_projection_dim).
            timestep: (B,), or (1,) for all; 0 (data) to 1 (noise).
            img_ids: Positions of the image tokens on every axis, (T, axes).
            txt_ids: Positions of the text tokens, (L, axes); zeros in FLUX.1.
            guidance: Guidance scale, (B,), or (1,) for all; `None` for a model without `guidance_embeds`.
            joint_attention_kwargs: Keywords for the attention processors; `scale`, the strength of LoRA layers; and
                `ip_adapter_image_embeds`, the pictures of loaded IP-Adapters.
            controlnet_block_samples: A ControlNet's residuals, each (B, T, D), added to the image tokens by the double
                blocks, to the first T where `hidden_states` holds tokens of other pictures behind those of x_t; fewer
                than the blocks serve several neighbouring blocks each.
            controlnet_single_block_samples: The same for the single blocks.
            return_dict: Whether to return an output object rather than a tuple of one.
            controlnet_blocks_repeat: Whether `controlnet_block_samples` serve the double blocks in turns instead.

        Returns:
            `sample`: (B, T, out_channels).

        Raises:
            ValueError: An input is missing or its shape does not fit the config.
        """
        img_ids, txt_ids = without_batch("img_ids", img_ids), without_batch("txt_ids", txt_ids)
        self.check_inputs(
            hidden_states, encoder_hidden_states, pooled_projections, timestep, img_ids, txt_ids, guidance
        )
        assert encoder_hidden_states is not None and pooled_projections is not None and timestep is not None
        assert img_ids is not None and txt_ids is not None
        double_kwargs, single_kwargs = self._split_kwargs(joint_attention_kwargs)

        double_rule = in_turns if controlnet_blocks_repeat else shared_by_neighbours
        residuals = double_rule(controlnet_block_samples, len(self.transformer_blocks))
        single_residuals = shared_by_neighbours(controlnet_single_block_samples, len(self.single_transformer_blocks))

        x, context, temb = self.embed(
            hidden_states, encoder_hidden_states, pooled_projections, timestep, guidance
        )  # (B, T, D), (B, L, D), (B, D)
        rotary = self.rotary_tables(txt_ids, img_ids)  # (L + T, features of a head), twice
        for block, residual in zip(self.transformer_blocks, residuals, strict=True):  # (B, L, D), (B, T, D)
            context, x = self.run(block, x, context, temb, rotary, double_kwargs, residual)
        for block, residual in zip(self.single_transformer_blocks, single_residuals, strict=True):
            context, x = self.run(block, x, context, temb, rotary, single_kwargs, residual)

        sample = self.proj_out(self.norm_out(x, temb))  # (B, T, out_channels)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _split_kwargs(self, kwargs: dict[str, Any] | None) -> tuple[dict[str, Any], dict[str, Any]]:
        """Keywords of the double and of the single blocks' processors; IP-Adapters speak to the double blocks alone."""
        double = dict(kwargs or {})
        if "ip_adapter_image_embeds" in double:
            double["ip_hidden_states"] = self.encoder_hid_proj(double.pop("ip_adapter_image_embeds"))
        return double, {name: value for name, value in double.items() if not name.startswith("ip_")}


def without_batch(name: str, ids: torch.Tensor | None) -> torch.Tensor | None:
    """(T, axes), or one of (B, T, axes), which older code passes; every picture of a batch has the same positions."""
    if ids is not None and ids.ndim == 3:
        logger.warning(
            f"`{name}`: got {tuple(ids.shape)}, which is deprecated, expected (tokens, axes): the first is taken."
        )
        return ids[0]
    return ids
