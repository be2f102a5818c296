"""ControlNets of Stable Diffusion 3 and 3.5: a copy of the first blocks that sees the latents of a hint beside x_t.

The figure is drawn in `controlnet_tokens.py`. Two kinds are published:

    with text     InstantX' and alimama's for SD3: the base's embedders and joint blocks, but that no block is the last;
                  one for inpainting has a mask as one more channel of its hint
    image alone   Stability's for SD3.5 large: it sees x_t as the base's `pos_embed` has embedded it, no text tokens,
                  and has blocks without text

    net = SD3ControlNetModel.from_transformer(transformer, num_layers=12)             # fresh: the base draws as it did
    (residuals,) = net(x_t, hint, 1.0, text, pooled, t, return_dict=False)
    transformer(x_t, text, pooled, t, block_controlnet_hidden_states=residuals)

Shapes: B batch, C channels, H and W height and width of the latents, T image tokens (patches), L text tokens,
D features of a token.
"""

import copy
from collections.abc import Mapping
from typing import Any, Self

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.controlnets.controlnet_sd3 import SD3ControlNetOutput
from diffusers.utils import apply_lora_scale
from torch import nn

from hubgen.backbones.controlnet_encoder import check_scale, zeroed
from hubgen.backbones.controlnet_tokens import TokenControlNet, require_hint
from hubgen.backbones.sd3 import SD3Stem
from hubgen.formats import sd3_controlnet_layout
from hubgen.formats.headers import TensorHeader
from hubgen.formats.markers import CONTROL_TYPE
from hubgen.layers.checks import require_shape
from hubgen.layers.embeddings import CombinedTimestepTextProjEmbeddings, PatchEmbed
from hubgen.layers.mmdit_blocks import JointTransformerBlock, SD3SingleTransformerBlock, initialize_joint_


def stable_diffusion_3_5_large_controlnet() -> dict[str, Any]:
    """Config of Stability's networks for SD3.5 large, which see the image alone; 2.2 billion parameters."""
    return {
        "num_layers": 19,
        "num_attention_heads": 38,
        "joint_attention_dim": None,
        "caption_projection_dim": 2048,
        "pos_embed_max_size": None,
        "pos_embed_type": None,
        "use_pos_embed": False,
        "force_zeros_for_pooled_projection": False,
    }


class SD3ControlNetModel(TokenControlNet, SD3Stem):
    """The ControlNet of a `SD3Transformer2DModel`; arguments and weights are those of diffusers' class.

    Args:
        joint_attention_dim: Features of the text tokens; `None` for a network that sees none.
        caption_projection_dim: Must be D, but for a network without text.
        out_channels: Not read: what it returns are tokens. Part of published configs.
        pos_embed_max_size: Largest height and width in tokens that the table of positions serves; `None` for no table.
        extra_conditioning_channels: Channels of the hint beyond `in_channels`, 1 for a mask.
        dual_attention_layers: Indices of the joint blocks with a second, image-only attention; of its base, so that
            there may be some beyond its own.
        pos_embed_type: `"sincos"`, or `None` for an embedding of x_t without positions.
        use_pos_embed: Whether it embeds x_t by itself; else the base's embedded x_t is its input.
        force_zeros_for_pooled_projection: Not read here: whether whoever calls it gives zeros for the pooled text, and
            latents of the hint without the autoencoder's shift.

    The others are those of `SD3Transformer2DModel`, of which the base has the same.

    Raises:
        ValueError: `caption_projection_dim` is not D, or another value cannot be built.
    """

    _no_split_modules = ["JointTransformerBlock", "SD3SingleTransformerBlock"]
    _repeated_blocks = ["JointTransformerBlock", "SD3SingleTransformerBlock"]
    _skip_layerwise_casting_patterns = ["pos_embed", "norm"]
    # diffusers' pipelines put the base's embedding into a network without one, where it is saved with it.
    _keys_to_ignore_on_load_unexpected = [r"^pos_embed\."]
    base_class = "SD3Transformer2DModel"
    copied = ("pos_embed", "time_text_embed", "context_embedder")
    # What its base always has, and it may be without.
    pos_embed: PatchEmbed | None  # type: ignore[assignment]
    context_embedder: nn.Linear | None  # type: ignore[assignment]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 128,
        patch_size: int = 2,
        in_channels: int = 16,
        num_layers: int = 18,
        attention_head_dim: int = 64,
        num_attention_heads: int = 18,
        joint_attention_dim: int | None = 4096,
        caption_projection_dim: int = 1152,
        pooled_projection_dim: int = 2048,
        out_channels: int | None = 16,
        pos_embed_max_size: int | None = 96,
        extra_conditioning_channels: int = 0,
        dual_attention_layers: tuple[int, ...] = (),
        qk_norm: str | None = None,
        pos_embed_type: str | None = "sincos",
        use_pos_embed: bool = True,
        force_zeros_for_pooled_projection: bool = True,
    ):
        super().__init__()
        self.inner_dim = num_attention_heads * attention_head_dim
        if joint_attention_dim is not None and caption_projection_dim != self.inner_dim:
            raise ValueError(
                f"`caption_projection_dim`: got {caption_projection_dim}, expected `num_attention_heads` * "
                f"`attention_head_dim` = {self.inner_dim}."
            )
        self.build_stem()
        block: dict[str, Any] = {
            "dim": self.inner_dim,
            "num_attention_heads": num_attention_heads,
            "attention_head_dim": attention_head_dim,
        }
        self.transformer_blocks = nn.ModuleList(
            SD3SingleTransformerBlock(**block)
            if joint_attention_dim is None
            else JointTransformerBlock(**block, qk_norm=qk_norm, use_dual_attention=i in dual_attention_layers)
            for i in range(num_layers)
        )
        self.controlnet_blocks = nn.ModuleList(nn.Linear(self.inner_dim, self.inner_dim) for _ in range(num_layers))
        self.pos_embed_input = self.patches(in_channels + extra_conditioning_channels, pos_embed_type=None)
        initialize_joint_(self)
        zeroed(self.controlnet_blocks)
        zeroed(self.pos_embed_input)

    def build_stem(self) -> None:
        """Makes the embedders that the config describes; that of x_t and that of the text may be absent."""
        config = self.config
        self.pos_embed = None
        if config.use_pos_embed:
            self.pos_embed = self.patches(
                config.in_channels, pos_embed_type=config.pos_embed_type, pos_embed_max_size=config.pos_embed_max_size
            )
        self.time_text_embed = CombinedTimestepTextProjEmbeddings(self.inner_dim, config.pooled_projection_dim)
        self.context_embedder = None
        if config.joint_attention_dim is not None:
            self.context_embedder = nn.Linear(config.joint_attention_dim, config.caption_projection_dim)

    def patches(self, channels: int, **positions: Any) -> PatchEmbed:
        """An embedding of latents: (B, channels, H, W) -> (B, T, D)."""
        config = self.config
        return PatchEmbed(
            height=config.sample_size,
            width=config.sample_size,
            patch_size=config.patch_size,
            in_channels=channels,
            embed_dim=self.inner_dim,
            **positions,
        )

    @classmethod
    def from_transformer(
        cls,
        transformer: Any,
        num_layers: int | None = 12,
        num_extra_conditioning_channels: int = 1,
        load_weights_from_transformer: bool = True,
    ) -> Self:
        """A network to be trained for a base, which stays as it is; until then its residuals are zero.

        Args:
            transformer: A `SD3Transformer2DModel` of hubgen or diffusers.
            num_layers: Blocks, at most those of the base; `None` or 0: as many.
            num_extra_conditioning_channels: `extra_conditioning_channels`; 0 for a hint without a mask.
            load_weights_from_transformer: Whether it starts as a copy of the base's embedders and first blocks; else
                from fresh weights.

        Raises:
            ValueError: The base is another network, or has fewer blocks.
        """
        return cls.made_for(
            transformer,
            {"num_layers": num_layers or None},
            load_weights_from_transformer,
            extra_conditioning_channels=num_extra_conditioning_channels,
        )

    def copy_block(self, block: nn.Module, other: nn.Module) -> None:
        """Gives a block the weights of the base's, to compute the same of the image.

        The base's last block does not compute the text further, a network's does: what it lacks stays fresh.
        """
        state = other.state_dict()
        if other.context_pre_only:
            left = block.state_dict()
            for name in ("norm1_context.linear.weight", "norm1_context.linear.bias"):
                scale, shift = state[name].chunk(2)  # of the text in the joint attention
                rest = torch.zeros_like(left[name][2 * len(scale) :])
                state[name] = torch.cat([shift, scale, rest.to(scale)])
            state = {**left, **state}
        block.load_state_dict(state)

    def _get_pos_embed_from_transformer(self, transformer: Any) -> Any:
        """A copy of the base's embedding of x_t: diffusers' pipelines ask for it, and put it into the network."""
        return copy.deepcopy(transformer.pos_embed)

    def to_original(self) -> dict[str, torch.Tensor]:
        """The state dict in Stability's layout, with the kind of hints it was made for, where its file said so."""
        found, kind = super().to_original(), self.config.get("_control_type")
        return found if kind is None else {**found, CONTROL_TYPE: torch.tensor([kind], dtype=torch.int32)}

    @classmethod
    def config_of_tensors(cls, tensors: Mapping[str, TensorHeader]) -> dict[str, Any] | None:
        """The config of a file in diffusers' layout, as far as its keys and shapes tell it."""
        return sd3_controlnet_layout.infer_own_config(tensors)

    def context_layers(self) -> list[nn.Module]:
        """The layers that see the text as it comes in, and nothing else."""
        return [] if self.context_embedder is None else [self.context_embedder]

    @apply_lora_scale("joint_attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor,
        controlnet_cond: torch.Tensor,
        conditioning_scale: float = 1.0,
        encoder_hidden_states: torch.Tensor | None = None,
        pooled_projections: torch.Tensor | None = None,
        timestep: torch.Tensor | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> SD3ControlNetOutput | tuple[list[torch.Tensor]]:
        """What is to be added to the base's image tokens.

        Args:
            hidden_states: x_t, (B, in_channels, H, W); of a network without `use_pos_embed` the base's `pos_embed` of
                it, (B, T, D).
            controlnet_cond: Latents of the hint, (B, in_channels + extra_conditioning_channels, H, W), or (1, ...) for
                all.
            conditioning_scale: Factor on all residuals.
            encoder_hidden_states: Text tokens, (B, L, joint_attention_dim); `None` for a network without.
            pooled_projections: Pooled text, (B, pooled_projection_dim), or zeros, see the class.
            timestep: (B,), or (1,) for all; as of the base.
            joint_attention_kwargs: Keywords for the attention processors, and `scale`, the strength of LoRA layers.
            return_dict: Whether to return an output object rather than a tuple of one.

        Returns:
            `controlnet_block_samples`: one for each block, (B, T, D).

        Raises:
            ValueError: An input is missing, is not for this network, or has the wrong shape; before any computation.
        """
        self.check_net_inputs(hidden_states, controlnet_cond, encoder_hidden_states, pooled_projections, timestep)
        check_scale("conditioning_scale", conditioning_scale)
        assert timestep is not None and pooled_projections is not None
        x = hidden_states if self.pos_embed is None else self.pos_embed(hidden_states)  # (B, T, D)
        x = x + self.pos_embed_input(controlnet_cond)
        temb = self.embed_time(timestep, pooled_projections)  # (B, D)
        context = None if self.context_embedder is None else self.context_embedder(encoder_hidden_states)  # (B, L, D)

        residuals = []
        for block, zero in zip(self.transformer_blocks, self.controlnet_blocks, strict=True):
            if context is None:
                x = self.run(block, x, temb, joint_attention_kwargs)
            else:
                context, x = self.run(block, x, context, temb, joint_attention_kwargs)
            residuals.append(zero(x) * conditioning_scale)  # (B, T, D)
        return SD3ControlNetOutput(controlnet_block_samples=residuals) if return_dict else (residuals,)

    def check_net_inputs(
        self,
        hidden_states: torch.Tensor,
        controlnet_cond: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None,
        pooled_projections: torch.Tensor | None,
        timestep: torch.Tensor | None,
    ) -> None:
        """Raises ValueError where an input is missing, is not for this network or does not fit the config."""
        config, batch, patch = self.config, len(hidden_states), self.config.patch_size
        if self.pos_embed is not None:
            require_shape("hidden_states", hidden_states, (batch, config.in_channels, "height", "width"))
            height, width = hidden_states.shape[2:]
        else:
            require_shape("hidden_states", hidden_states, (batch, "tokens", self.inner_dim))
            height, width = controlnet_cond.shape[-2:] if torch.is_tensor(controlnet_cond) else (0, 0)
        if config.joint_attention_dim is not None:
            text = (batch, "tokens", config.joint_attention_dim)
            require_shape("encoder_hidden_states", encoder_hidden_states, text)
        elif encoder_hidden_states is not None:
            shape = tuple(encoder_hidden_states.shape)
            raise ValueError(f"`encoder_hidden_states`: got {shape}, expected None: `joint_attention_dim` is None.")
        self.check_condition(batch, pooled_projections, timestep)
        channels = config.in_channels + config.extra_conditioning_channels
        why = f"`in_channels` + `extra_conditioning_channels` = {channels}, and the size of x_t"
        require_hint(controlnet_cond, batch, (channels, height, width), why)
        tokens = (height // patch) * (width // patch)
        if height % patch or width % patch:
            raise ValueError(
                f"`controlnet_cond`: got {height} x {width}, expected multiples of `patch_size` = {patch}."
            )
        if self.pos_embed is None and tokens != hidden_states.shape[1]:
            raise ValueError(
                f"`controlnet_cond`: got {height} x {width}, which are {tokens} patches, expected "
                f"{hidden_states.shape[1]}, as `hidden_states` has tokens."
            )
