"""MM-DiT: text and image tokens, each with weights of their own, meet in one attention (SD3, 2403.03206, figure 2).

           x_t                    t, pooled text            text tokens
            |                            |                       |
        pos_embed                 time_text_embed         context_embedder
            |                            |                       |
            x ------> transformer block: adaLN, joint <------ context
            |         attention, adaLN, MLP; n times
      norm_out, proj_out
            |
      the prediction (SD3: velocity)

Shapes: B batch, C channels, H and W height and width of the latents, T image tokens (patches), L text tokens,
D features of a token.
"""

from collections.abc import Iterator
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import SD3Transformer2DLoadersMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils import apply_lora_scale
from torch import nn

from hubgen.backbones.base import Backbone
from hubgen.formats.single_file import SingleFileMixin
from hubgen.layers.checks import require_shape
from hubgen.layers.conditioned import modulations
from hubgen.layers.embeddings import CombinedTimestepTextProjEmbeddings, PatchEmbed
from hubgen.layers.mmdit_blocks import JointTransformerBlock, initialize_joint_
from hubgen.layers.normalization import AdaLayerNormContinuous
from hubgen.layers.residuals import spread_evenly


def stable_diffusion_3_medium() -> dict[str, Any]:
    """Config of SD3's transformer of 2.0 billion parameters (2403.03206; d = 24, d heads and a width of 64 d)."""
    return {
        "num_layers": 24,
        "num_attention_heads": 24,
        "caption_projection_dim": 1536,
        "pos_embed_max_size": 192,
    }


def stable_diffusion_3_5_medium() -> dict[str, Any]:
    """Config of SD3.5 medium's transformer: SD3's with normalised queries and keys, and dual attention in 13 blocks."""
    return {
        **stable_diffusion_3_medium(),
        "pos_embed_max_size": 384,
        "qk_norm": "rms_norm",
        "dual_attention_layers": tuple(range(13)),
    }


def stable_diffusion_3_5_large() -> dict[str, Any]:
    """Config of SD3.5 large's transformer of 8.1 billion parameters (2403.03206, d = 38)."""
    return {
        **stable_diffusion_3_medium(),
        "num_layers": 38,
        "num_attention_heads": 38,
        "caption_projection_dim": 2432,
        "qk_norm": "rms_norm",
    }


class SD3Stem(SingleFileMixin, Backbone):
    """What SD3's transformer and ControlNets for it begin with: the embedders, and the checks of their inputs.

    A subclass has the embedders built by `build_stem`, and `inner_dim` (D), the features of a token.
    """

    inner_dim: int

    def build_stem(self) -> None:
        """Makes the embedders that the config describes."""
        config = self.config
        self.pos_embed = PatchEmbed(
            height=config.sample_size,
            width=config.sample_size,
            patch_size=config.patch_size,
            in_channels=config.in_channels,
            embed_dim=self.inner_dim,
            pos_embed_max_size=config.pos_embed_max_size,
        )
        self.time_text_embed = CombinedTimestepTextProjEmbeddings(self.inner_dim, config.pooled_projection_dim)
        self.context_embedder = nn.Linear(config.joint_attention_dim, config.caption_projection_dim)

    def embed(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        pooled_projections: torch.Tensor,
        timestep: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Image tokens (B, T, D), text tokens (B, L, D), condition (B, D); the arguments are those of `forward`."""
        x = self.pos_embed(hidden_states)  # (B, T, D)
        context = self.context_embedder(encoder_hidden_states)  # (B, L, D)
        return x, context, self.embed_time(timestep, pooled_projections)

    def embed_time(self, timestep: torch.Tensor, pooled_projections: torch.Tensor) -> torch.Tensor:
        """What modulates every block, the embedded time and pooled text: (B,), (B, P) -> (B, D)."""
        return self.time_text_embed(timestep, pooled_projections)

    def context_layers(self) -> list[nn.Module]:
        """The layers that see the text as it comes in, and nothing else."""
        return [self.context_embedder]

    def time_embedders(self) -> list[nn.Module]:
        """The modules that `modulations` depends on, besides the layers themselves."""
        return [self.time_text_embed]

    def modulations(
        self, timestep: torch.Tensor, pooled_projections: torch.Tensor
    ) -> Iterator[tuple[nn.Module, torch.Tensor]]:
        """What every layer answers that sees time and pooled text alone; the arguments are those of `forward`."""
        return modulations(self, self.embed_time(timestep, pooled_projections))

    def check_inputs(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None,
        pooled_projections: torch.Tensor | None,
        timestep: torch.Tensor | None,
    ) -> None:
        """Raises ValueError where an input is missing or its shape does not fit the config."""
        batch, config = len(hidden_states), self.config
        require_shape("hidden_states", hidden_states, (batch, config.in_channels, "height", "width"))
        require_shape("encoder_hidden_states", encoder_hidden_states, (batch, "tokens", config.joint_attention_dim))
        self.check_condition(batch, pooled_projections, timestep)

    def check_condition(
        self, batch: int, pooled_projections: torch.Tensor | None, timestep: torch.Tensor | None
    ) -> None:
        """The same for what modulates the blocks."""
        steps = 1 if timestep is not None and timestep.shape == (1,) else batch
        require_shape("pooled_projections", pooled_projections, (batch, self.config.pooled_projection_dim))
        require_shape("timestep", timestep, (steps,))


class SD3Transformer2DModel(SD3Transformer2DLoadersMixin, SD3Stem):
    """The multimodal diffusion transformer of Stable Diffusion 3 and 3.5 (2403.03206).

    Args:
        sample_size: Height and width of the latents that the model is made for; sets the scale of the positions.
        patch_size: Latent pixels along each side of a token.
        in_channels: Channels of the latents.
        num_layers: Blocks.
        attention_head_dim: Features of a head.
        num_attention_heads: Heads; the width D is heads times features.
        joint_attention_dim: Features of the text tokens.
        caption_projection_dim: Features that the text tokens are projected to; must be D.
        pooled_projection_dim: Features of the pooled text embedding.
        out_channels: Channels of the prediction; `None` for `in_channels`.
        pos_embed_max_size: Largest height and width in tokens that the table of positions serves.
        dual_attention_layers: Indices of the blocks with a second, image-only attention (SD3.5 medium).
        qk_norm: `"rms_norm"` normalises queries and keys (SD3.5, section 5.3.2), `None` does not (SD3).

    Raises:
        ValueError: `caption_projection_dim` is not D, or `dual_attention_layers` names a block that there is not.
    """

    _no_split_modules = ["JointTransformerBlock"]
    _repeated_blocks = ["JointTransformerBlock"]
    _skip_layerwise_casting_patterns = ["pos_embed", "norm"]
    _cached_blocks = {JointTransformerBlock: (1, 0)}

    @register_to_config
    def __init__(
        self,
        sample_size: int = 128,
        patch_size: int = 2,
        in_channels: int = 16,
        num_layers: int = 18,
        attention_head_dim: int = 64,
        num_attention_heads: int = 18,
        joint_attention_dim: int = 4096,
        caption_projection_dim: int = 1152,
        pooled_projection_dim: int = 2048,
        out_channels: int | None = 16,
        pos_embed_max_size: int = 96,
        dual_attention_layers: tuple[int, ...] = (),
        qk_norm: str | None = None,
    ):
        super().__init__()
        self.inner_dim = num_attention_heads * attention_head_dim
        self.out_channels = in_channels if out_channels is None else out_channels
        if caption_projection_dim != self.inner_dim:
            raise ValueError(
                f"`caption_projection_dim`: got {caption_projection_dim}, expected `num_attention_heads` * "
                f"`attention_head_dim` = {self.inner_dim}."
            )
        if not set(dual_attention_layers) <= set(range(num_layers)):
            raise ValueError(
                f"`dual_attention_layers`: got {dual_attention_layers}, expected layers from 0 to {num_layers - 1}."
            )

        self.build_stem()
        self.transformer_blocks = nn.ModuleList(
            JointTransformerBlock(
                dim=self.inner_dim,
                num_attention_heads=num_attention_heads,
                attention_head_dim=attention_head_dim,
                context_pre_only=i == num_layers - 1,
                qk_norm=qk_norm,
                use_dual_attention=i in dual_attention_layers,
            )
            for i in range(num_layers)
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
        block_controlnet_hidden_states: list[torch.Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        skip_layers: list[int] | None = None,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Predicts from noisy latents (SD3: the velocity, noise minus data).

        Args:
            hidden_states: x_t, (B, in_channels, H, W); H and W multiples of `patch_size`.
            encoder_hidden_states: Text tokens, (B, L, joint_attention_dim).
            pooled_projections: Pooled text, (B, pooled_projection_dim).
            timestep: (B,), or (1,) for all; 0 (data) to 1000 (noise), fractions allowed.
            block_controlnet_hidden_states: A ControlNet's residuals, each (B, T, D), added by the blocks but the last;
                fewer than the blocks are spread over them evenly.
            joint_attention_kwargs: Keywords for the attention processors; `scale`, the strength of LoRA layers; and
                `ip_adapter_image_embeds`, the picture of an IP-Adapter that diffusers' loader has put in.
            return_dict: Whether to return an output object rather than a tuple of one.
            skip_layers: Indices of blocks to leave out (skip-layer guidance).

        Returns:
            `sample`: (B, out_channels, H, W).

        Raises:
            ValueError: An input is missing or its shape does not fit the config.
        """
        self.check_inputs(hidden_states, encoder_hidden_states, pooled_projections, timestep)
        assert encoder_hidden_states is not None and pooled_projections is not None and timestep is not None
        height, width = hidden_states.shape[-2:]
        kwargs = dict(joint_attention_kwargs or {})
        if "ip_adapter_image_embeds" in kwargs:
            images = kwargs.pop("ip_adapter_image_embeds")
            kwargs["ip_hidden_states"], kwargs["temb"] = self.image_proj(images, timestep)
        residuals = spread_evenly(block_controlnet_hidden_states, len(self.transformer_blocks))

        x, context, temb = self.embed(hidden_states, encoder_hidden_states, pooled_projections, timestep)
        for i, (block, residual) in enumerate(zip(self.transformer_blocks, residuals, strict=True)):
            if skip_layers is None or i not in skip_layers:  # (B, L, D), (B, T, D)
                context, x = self.run(block, x, context, temb, kwargs, residual)
            elif residual is not None:
                x = x + residual  # (B, T, D)

        x = self.proj_out(self.norm_out(x, temb))  # (B, T, patch * patch * C)
        sample = self.unpatchify(x, height, width)  # (B, C, H, W)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def unpatchify(self, x: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """(B, T, patch * patch * C) -> (B, C, height, width)."""
        p = self.config.patch_size
        x = x.reshape(-1, height // p, width // p, p, p, self.out_channels)  # (B, h, w, p, p, C)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.out_channels, height, width)
