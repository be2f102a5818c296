"""ControlNet: a second, trained encoder that steers a text-conditioned U-Net by a picture of edges, poses, depths, ...

Zhang et al. 2023 (https://arxiv.org/abs/2302.05543), for Stable Diffusion 1.x, 2.x and XL. The figure is drawn in
`controlnet_encoder.py`, which has the parts.

    net = ControlNetModel.from_unet(unet)                       # fresh: the base draws as it did
    down, mid = net(x_t, t, text, hint, return_dict=False)
    unet(x_t, t, text, down_block_additional_residuals=down, mid_block_additional_residual=mid)

Shapes: B batch, H and W height and width in latent pixels, C_i channels of level i (`block_out_channels`), T features
of the time embedding, S text tokens, E features of a text token, c channels of the hint.
"""

from typing import Any, Self

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.utils import apply_lora_scale

from hubgen.backbones.controlnet_encoder import ControlNetEncoder, ControlNetOutput, check_scale
from hubgen.backbones.unet_condition_config import MID_BLOCKS
from hubgen.layers.checks import require_supported


class ControlNetModel(ControlNetEncoder):
    """The ControlNet of a `UNet2DConditionModel`; arguments and weights are those of diffusers' class.

    Args:
        conditioning_channels: Channels of the hint (c).
        controlnet_conditioning_channel_order: `"rgb"`, or `"bgr"` for a network that was trained on flipped channels.
        conditioning_embedding_out_channels: Widths of the network that embeds the hint, each at half the size of the
            one before: the hint has `2 ** (len - 1)` pixels a latent, each way.
        global_pool_conditions: Whether residuals are averaged over the picture: the hint's style without its layout
            (the "shuffle" network).

    The others are those of `UNet2DConditionModel`, of which the base has the same.

    Raises:
        ValueError: An argument has a value that cannot be built, or does not fit another; the message names both.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        conditioning_channels: int = 3,
        flip_sin_to_cos: bool = True,
        freq_shift: int = 0,
        down_block_types: tuple[str, ...] = (
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "DownBlock2D",
        ),
        mid_block_type: str | None = "UNetMidBlock2DCrossAttn",
        only_cross_attention: bool | tuple[bool, ...] = False,
        block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280),
        layers_per_block: int | tuple[int, ...] = 2,
        downsample_padding: int = 1,
        mid_block_scale_factor: float = 1,
        act_fn: str = "silu",
        norm_num_groups: int | None = 32,
        norm_eps: float = 1e-5,
        cross_attention_dim: int | tuple[int, ...] = 1280,
        transformer_layers_per_block: int | tuple[int, ...] | tuple[tuple[int, ...], ...] = 1,
        encoder_hid_dim: int | None = None,
        encoder_hid_dim_type: str | None = None,
        attention_head_dim: int | tuple[int, ...] = 8,
        num_attention_heads: int | tuple[int, ...] | None = None,
        use_linear_projection: bool = False,
        class_embed_type: str | None = None,
        addition_embed_type: str | None = None,
        addition_time_embed_dim: int | None = None,
        num_class_embeds: int | None = None,
        upcast_attention: bool = False,
        resnet_time_scale_shift: str = "default",
        projection_class_embeddings_input_dim: int | None = None,
        controlnet_conditioning_channel_order: str = "rgb",
        conditioning_embedding_out_channels: tuple[int, ...] | None = (16, 32, 96, 256),
        global_pool_conditions: bool = False,
        addition_embed_type_num_heads: int = 64,
    ):
        super().__init__()
        if encoder_hid_dim is not None and encoder_hid_dim_type is None:
            self.register_to_config(encoder_hid_dim_type="text_proj")
        require_supported(self.config, {"mid_block_type": tuple(MID_BLOCKS)})
        self.build_net()

    @classmethod
    def from_unet(
        cls,
        unet: Any,
        controlnet_conditioning_channel_order: str = "rgb",
        conditioning_embedding_out_channels: tuple[int, ...] | None = (16, 32, 96, 256),
        load_weights_from_unet: bool = True,
        conditioning_channels: int = 3,
    ) -> Self:
        """A network to be trained for a base, which stays as it is; until then its residuals are zero.

        It is on the CPU and in the default type, whatever the base is.

        Args:
            unet: A `UNet2DConditionModel` of hubgen or diffusers.
            controlnet_conditioning_channel_order: See the class.
            conditioning_embedding_out_channels: See the class.
            load_weights_from_unet: Whether its encoder starts as a copy of the base's; else from fresh weights.
            conditioning_channels: See the class.

        Raises:
            ValueError: The base is another network, or has what a ControlNet has no place for.
        """
        return cls.made_for(
            unet,
            load_weights_from_unet,
            controlnet_conditioning_channel_order=controlnet_conditioning_channel_order,
            conditioning_embedding_out_channels=conditioning_embedding_out_channels,
            conditioning_channels=conditioning_channels,
        )

    @apply_lora_scale("cross_attention_kwargs")
    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        encoder_hidden_states: torch.Tensor,
        controlnet_cond: torch.Tensor,
        conditioning_scale: float = 1.0,
        class_labels: torch.Tensor | None = None,
        timestep_cond: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        added_cond_kwargs: dict[str, torch.Tensor] | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guess_mode: bool = False,
        return_dict: bool = True,
    ) -> ControlNetOutput | tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """What is to be added to the base's feature maps.

        Args:
            sample: Noisy latents as the base sees them, without extra channels, (B, `in_channels`, H, W).
            timestep: One number, or (B,).
            encoder_hidden_states: Text tokens, (B, S, E). Projected by a network with `encoder_hid_dim`, which
                diffusers' class leaves out.
            controlnet_cond: The hint, in [0, 1] for the published networks: (B, c, 8 H, 8 W), or (1, ...) for all.
            conditioning_scale: Factor on all residuals.
            class_labels: As of the base.
            timestep_cond: `None`: there is no such network.
            attention_mask: As of the base.
            added_cond_kwargs: As of the base.
            cross_attention_kwargs: As of the base.
            guess_mode: Whether early residuals weigh less: from a tenth up to the whole. For calls without a prompt.
            return_dict: Whether to return `ControlNetOutput` or a tuple.

        Returns:
            `down_block_res_samples`, one for each feature map of the base's way down, (B, C_i, H_i, W_i), and
            `mid_block_res_sample`, (B, C_last, H', W'). With `global_pool_conditions` each is (B, C_i, 1, 1).

        Raises:
            ValueError: An argument is missing, is not for this network, or has the wrong shape; before any computation.
        """
        self.check_inputs(sample, timestep, encoder_hidden_states, attention_mask, None)
        self.check_embeddings(sample, class_labels, timestep_cond, added_cond_kwargs)
        self.check_hint("controlnet_cond", controlnet_cond, sample)
        check_scale("conditioning_scale", conditioning_scale)
        if self.config.controlnet_conditioning_channel_order == "bgr":
            controlnet_cond = controlnet_cond.flip(1)
        temb = self.embed_conditions(sample, timestep, class_labels, timestep_cond, added_cond_kwargs)  # (B, T)
        attended = self.attended(encoder_hidden_states, attention_mask, None, cross_attention_kwargs, sample.dtype)

        x = self.conv_in(sample) + self.controlnet_cond_embedding(controlnet_cond)  # (B, C_0, H, W)
        return self.residuals(x, temb, attended, conditioning_scale, guess_mode, return_dict)
