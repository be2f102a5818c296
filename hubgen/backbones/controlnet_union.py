"""ControlNet Union: one network for many types of hints, and for several of them at once.

By xinsir (https://huggingface.co/xinsir/controlnet-union-sdxl-1.0), for Stable Diffusion XL; there is no paper. A
ControlNet (2302.05543, drawn in `controlnet_encoder.py`) whose first feature map is

    hint i ─> embedding ─┬─────────────────────────────────── + ──┐
                         └─> mean, + task_embedding[type i] ─┐    ^ spatial_ch_projs, starts at zero
                                                             v    │
                                        transformer of one layer ─┘
                                                             ^
    sample ─> conv_in ─┬─> mean ─────────────────────────────┘                  + ─> the encoder
                       └────────────────────────────────────────────────────────┘

and which is told all types that are there beside the timestep. Types of the published networks: 0 pose, 1 depth, 2
scribble, 3 canny and other lines, 4 normals, 5 segmentation; of "ProMax" also 6 tiles and 7 inpainting.

Names of weights are misspelt as in the published files (`transformer_layes`).

Shapes: B batch, H and W height and width in latent pixels, C_i channels of level i, T features of the time embedding,
S text tokens, E features of a text token, c channels of a hint, N hints, K types (`num_control_type`).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import nn

from hubgen.backbones.controlnet_encoder import ControlNetEncoder, ControlNetOutput, check_scale, zeroed
from hubgen.checks import is_whole, whole
from hubgen.layers.checks import require_all_positive, require_shape, require_supported
from hubgen.layers.conditioned import modulations
from hubgen.layers.embeddings import TimestepEmbedding, Timesteps

TIME_ID_WIDTH = 256
"""Features of an embedded number where the base embeds none, as in SDXL"""


class RowAttention(nn.Module):
    """Multi-head self-attention among the *rows of the batch*, each of the tokens by itself: (B, N, D) -> (B, N, D).

    A slip of the published network, which hands (B, N, D) to a layer that wants (N, B, D); its weights were trained so.
    So what a picture gets depends on the others of its batch. Parameter names are those of `nn.MultiheadAttention`.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        nn.init.xavier_uniform_(self.in_proj_weight)
        self.out_proj = nn.Linear(dim, dim)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 1, 3, 0, 4)  # (N, heads, B, D / heads) each
        scores = (q * q.shape[-1] ** -0.5) @ k.mT  # (N, heads, B, B)
        out = scores.softmax(dim=-1) @ v  # (N, heads, B, D / heads)
        return self.out_proj(out.permute(2, 0, 1, 3).flatten(2))


class ResidualAttentionMlp(nn.Module):
    """Two linear layers with CLIP's approximate GELU between: (B, N, D) -> (B, N, D)."""

    def __init__(self, dim: int):
        super().__init__()
        self.c_fc = nn.Linear(dim, 4 * dim)
        self.c_proj = nn.Linear(4 * dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.c_fc(x)
        return self.c_proj(x * torch.sigmoid(1.702 * x))


class ResidualAttentionBlock(nn.Module):
    """A transformer layer with its norms in front, as in CLIP: (B, N, D) -> (B, N, D)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.attn = RowAttention(dim, heads)
        self.ln_1 = nn.LayerNorm(dim)
        self.mlp = ResidualAttentionMlp(dim)
        self.ln_2 = nn.LayerNorm(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class ControlNetUnionModel(ControlNetEncoder):
    """The ControlNet of several types of hints; arguments and weights are those of diffusers' class.

    Args:
        num_control_type: Types that it tells apart (K): 6, or 8 in "ProMax".
        num_trans_channel: Features of the transformer; those of the first level (C_0).
        num_trans_head: Its heads.
        num_trans_layer: Its layers.
        num_proj_channel: Features of what it adds; those of the first level (C_0).
        addition_time_embed_dim: Features of each of the K embedded marks, "this type is there", and of the numbers of
            `time_ids`.

    The others are those of `ControlNetModel`. There is no `"bgr"` order, no projection of text tokens, and always
    attention in the middle.

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
        conditioning_embedding_out_channels: tuple[int, ...] | None = (48, 96, 192, 384),
        global_pool_conditions: bool = False,
        addition_embed_type_num_heads: int = 64,
        num_control_type: int = 6,
        num_trans_channel: int = 320,
        num_trans_head: int = 8,
        num_trans_layer: int = 1,
        num_proj_channel: int = 320,
    ):
        super().__init__()
        self.check_union()
        self.build_net()
        self.task_embedding = nn.Parameter(num_trans_channel**0.5 * torch.randn(num_control_type, num_trans_channel))
        self.transformer_layes = nn.ModuleList(
            [ResidualAttentionBlock(num_trans_channel, num_trans_head) for _ in range(num_trans_layer)]
        )
        self.spatial_ch_projs = zeroed(nn.Linear(num_trans_channel, num_proj_channel))
        marks_dim: int = self.config.addition_time_embed_dim
        self.control_type_proj = Timesteps(marks_dim, flip_sin_to_cos, freq_shift)
        self.control_add_embedding = TimestepEmbedding(marks_dim * num_control_type, self.temb_dim)

    def check_union(self) -> None:
        """Raises ValueError where what only a union has cannot be built."""
        config = self.config
        require_supported(
            config,
            {
                "controlnet_conditioning_channel_order": ("rgb",),
                "encoder_hid_dim_type": (None,),
                "encoder_hid_dim": (None,),
            },
        )
        for name in ("num_control_type", "num_trans_head", "num_trans_layer", "addition_time_embed_dim"):
            require_all_positive(name, config[name])
        first = config.block_out_channels[0]
        for name in ("num_trans_channel", "num_proj_channel"):
            if config[name] != first:
                raise ValueError(
                    f"`{name}`: got {config[name]!r}, expected {first} as the first of `block_out_channels`."
                )
        if config.num_trans_channel % config.num_trans_head:
            raise ValueError(
                f"`num_trans_head`: got {config.num_trans_head}, expected a divisor of `num_trans_channel` = "
                f"{config.num_trans_channel}."
            )

    @classmethod
    def from_unet(
        cls,
        unet: Any,
        controlnet_conditioning_channel_order: str = "rgb",
        conditioning_embedding_out_channels: tuple[int, ...] | None = (16, 32, 96, 256),
        load_weights_from_unet: bool = True,
        num_control_type: int = 6,
    ) -> Self:
        """A network to be trained for a base, which stays as it is; until then its residuals are zero.

        It is on the CPU and in the default type, whatever the base is.

        Args:
            unet: A `UNet2DConditionModel` of hubgen or diffusers.
            controlnet_conditioning_channel_order: `"rgb"`.
            conditioning_embedding_out_channels: See the class; narrower by default than the published networks'.
            load_weights_from_unet: Whether its encoder starts as a copy of the base's; else from fresh weights.
            num_control_type: See the class.

        Raises:
            ValueError: The base is another network, or has what a ControlNet has no place for.
        """
        given = getattr(unet, "config", None)
        config = given if isinstance(given, Mapping) else {}  # of something else, which is refused below
        width = config.get("block_out_channels", (320,))[0]
        return cls.made_for(
            unet,
            load_weights_from_unet,
            controlnet_conditioning_channel_order=controlnet_conditioning_channel_order,
            conditioning_embedding_out_channels=conditioning_embedding_out_channels,
            num_control_type=num_control_type,
            num_trans_channel=width,
            num_proj_channel=width,
            addition_time_embed_dim=config.get("addition_time_embed_dim") or TIME_ID_WIDTH,
        )

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        encoder_hidden_states: torch.Tensor,
        controlnet_cond: list[torch.Tensor],
        control_type: torch.Tensor,
        control_type_idx: list[int],
        conditioning_scale: float | list[float] = 1.0,
        class_labels: torch.Tensor | None = None,
        timestep_cond: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        added_cond_kwargs: dict[str, torch.Tensor] | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        from_multi: bool = False,
        guess_mode: bool = False,
        return_dict: bool = True,
    ) -> ControlNetOutput | tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """What is to be added to the base's feature maps; arguments that are missing here are `ControlNetModel`'s.

        Args:
            sample: (B, `in_channels`, H, W).
            timestep: One number, or (B,).
            encoder_hidden_states: (B, S, E).
            controlnet_cond: N hints, (B, c, 8 H, 8 W) each, or (1, ...) for all.
            control_type: (B, K) with 1 for the types that are there, else 0.
            control_type_idx: The type of each hint, N numbers from 0 to K - 1.
            conditioning_scale: One number, or one a hint. A single hint's is a factor on the residuals; those of
                several weigh the hints' features where they enter.
            from_multi: Whether the first scale is a factor on the residuals however many hints there are.

        Raises:
            ValueError: An argument is missing, is not for this network, or has the wrong shape; before any computation.
        """
        self.check_inputs(sample, timestep, encoder_hidden_states, attention_mask, None)
        self.check_embeddings(sample, class_labels, timestep_cond, added_cond_kwargs)
        scales = self.check_hints(sample, controlnet_cond, control_type, control_type_idx, conditioning_scale)
        temb = self.embed_all(sample, timestep, class_labels, timestep_cond, added_cond_kwargs, control_type)
        attended = self.attended(encoder_hidden_states, attention_mask, None, cross_attention_kwargs, sample.dtype)

        at_the_end = from_multi or len(control_type_idx) == 1
        x = self.conv_in(sample)  # (B, C_0, H, W)
        x = x + self.fused(x, controlnet_cond, control_type_idx, [1.0] * len(scales) if at_the_end else scales)
        return self.residuals(x, temb, attended, scales[0] if at_the_end else 1.0, guess_mode, return_dict)

    def fused(
        self, x: torch.Tensor, hints: Sequence[torch.Tensor], types: Sequence[int], scales: Sequence[Any]
    ) -> torch.Tensor:
        """The features of all hints together, (B, C_0, H, W), for a sample with the features `x`."""
        features, tokens = [], []
        for hint, kind, scale in zip(hints, types, scales, strict=True):
            embedded = self.controlnet_cond_embedding(hint).expand_as(x)  # (B, C_0, H, W)
            features.append(embedded * scale)
            tokens.append((embedded.mean(dim=(2, 3)) + self.task_embedding[kind]) * scale)  # (B, C_0)
        sequence = torch.stack([*tokens, x.mean(dim=(2, 3))], dim=1)  # (B, N + 1, C_0)
        for layer in self.transformer_layes:
            sequence = self.run(layer, sequence)
        total = torch.zeros_like(x)
        for i, (feature, scale) in enumerate(zip(features, scales, strict=True)):
            added = self.spatial_ch_projs(sequence[:, i])[:, :, None, None]  # (B, C_0, 1, 1)
            total = total + feature + added * scale
        return total

    def embed_all(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None,
        timestep_cond: torch.Tensor | None,
        added_cond_kwargs: dict[str, torch.Tensor] | None,
        control_type: torch.Tensor,
    ) -> torch.Tensor:
        """`embed_conditions` with the types that are there, (B, T)."""
        marks = self.control_type_proj(control_type.flatten()).reshape(len(control_type), -1)  # (B, K * features)
        temb = self.embed_conditions(sample, timestep, class_labels, timestep_cond, added_cond_kwargs)
        return temb + self.control_add_embedding(marks.to(sample.dtype))

    def time_embedders(self) -> list[nn.Module]:
        return [*super().time_embedders(), self.control_type_proj, self.control_add_embedding]

    def modulations(  # type: ignore[override]
        self,
        timestep: torch.Tensor,
        control_type: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        timestep_cond: torch.Tensor | None = None,
        added_cond_kwargs: dict[str, torch.Tensor] | None = None,
    ) -> Iterator[tuple[nn.Module, torch.Tensor]]:
        """What every layer answers that sees the time and such vectors alone; the arguments are those of `forward`."""
        like = timestep.new_empty(len(timestep), dtype=self.dtype)
        vectors = (timestep, class_labels, timestep_cond, added_cond_kwargs, control_type)
        return modulations(self, self.embed_all(like, *vectors))

    def check_hints(self, sample: torch.Tensor, hints: Any, marks: Any, types: Any, scales: Any) -> Sequence[Any]:
        """One scale a hint; ValueError where hints, their types or scales do not fit the network or each other."""
        if not isinstance(hints, list | tuple) or not hints:
            shape = f"a tensor of shape {tuple(hints.shape)}" if torch.is_tensor(hints) else repr(hints)
            raise ValueError(f"`controlnet_cond`: got {shape}, expected a list of tensors, one a hint.")
        count, kinds = len(hints), self.config.num_control_type
        for i, hint in enumerate(hints):
            self.check_hint(f"controlnet_cond[{i}]", hint, sample)
        require_shape("control_type", marks, (sample.shape[0], kinds))
        if not isinstance(types, list | tuple) or len(types) != count:
            raise ValueError(f"`control_type_idx`: got {types!r}, expected {count} numbers, one a hint.")
        for i, kind in enumerate(types):
            if not is_whole(kind, 0, kinds - 1):
                whole(f"control_type_idx[{i}]", kind, 0, kinds - 1)
        several = isinstance(scales, list | tuple)
        if several and len(scales) != count:
            raise ValueError(f"`conditioning_scale`: got {len(scales)} numbers, expected one, or {count}, one a hint.")
        for scale in scales if several else [scales]:
            check_scale("conditioning_scale", scale)
        return list(scales) if several else [scales] * count
