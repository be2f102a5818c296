"""DiT: a transformer on patches of latents, conditioned on timestep and class by adaptive norms (2212.09748, figure 3).

           x_t              t            class
            |               |              |
        pos_embed        emb (a copy of it in every block)
            |               |
            x ------> DiT block: adaLN, attention, adaLN, MLP; n times
            |
      norm_out, proj_out_1 (scale and shift), proj_out_2
            |
      the prediction: noise and, where it is learned, the variance

Every block owns a copy of the embedders of timestep and class, and the output uses the first block's: this is how the
published checkpoints are stored (750 million parameters for DiT-XL/2, where the paper's one embedder makes 675).

Shapes: B batch, C channels, H and W height and width of the latents, h and w the same in patches, T = h * w tokens,
D features of a token.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils import apply_lora_scale
from torch import nn

from hubgen.backbones.base import Backbone
from hubgen.layers.checks import require_shape
from hubgen.layers.dit_blocks import DiTBlock, Embedded, initialize_dit_
from hubgen.layers.embeddings import PatchEmbed
from hubgen.layers.normalization import modulate
from hubgen.layers.residuals import shared_by_neighbours

CLASS_DROPOUT = 0.1  # section 4: what makes classifier-free guidance possible


class DiTStem(Backbone):
    """What DiT and ControlNets for it begin with: positions, blocks, and the checks of config and inputs."""

    def build_stem(self) -> None:
        """Makes the patch embedding and the blocks that the config describes.

        Raises:
            ValueError: See `DiTTransformer2DModel`.
        """
        config = self.config
        self.check_config()
        self.inner_dim = config.num_attention_heads * config.attention_head_dim
        self.pos_embed = self.patches()
        self.transformer_blocks = nn.ModuleList(
            DiTBlock(
                dim=self.inner_dim,
                num_attention_heads=config.num_attention_heads,
                attention_head_dim=config.attention_head_dim,
                num_classes=config.num_embeds_ada_norm,
                dropout=config.dropout,
                activation_fn=config.activation_fn,
                attention_bias=config.attention_bias,
                upcast_attention=config.upcast_attention,
                norm_elementwise_affine=config.norm_elementwise_affine,
                norm_eps=config.norm_eps,
            )
            for _ in range(config.num_layers)
        )

    def patches(self, **changes: Any) -> PatchEmbed:
        """An embedding of latents; `changes` of its arguments."""
        config = self.config
        arguments: dict[str, Any] = {
            "height": config.sample_size,
            "width": config.sample_size,
            "patch_size": config.patch_size,
            "in_channels": config.in_channels,
            "embed_dim": self.inner_dim,
        }
        return PatchEmbed(**{**arguments, **changes})

    def check_config(self) -> None:
        """Raises ValueError naming the argument whose value cannot be built."""
        config = self.config
        if config.norm_type != "ada_norm_zero":
            raise ValueError(f"`norm_type`: got {config.norm_type!r}, expected 'ada_norm_zero'.")
        classes, size, patch = config.num_embeds_ada_norm, config.sample_size, config.patch_size
        if classes is None or classes < 1:
            raise ValueError(f"`num_embeds_ada_norm`: got {classes!r}, expected the number of classes.")
        if config.num_layers < 1:
            raise ValueError(f"`num_layers`: got {config.num_layers!r}, expected at least 1.")
        if size % patch:
            raise ValueError(f"`sample_size`: got {size}, expected a multiple of `patch_size` = {patch}.")
        heads, features = config.num_attention_heads, config.attention_head_dim
        if heads * features % 4:
            raise ValueError(
                f"`num_attention_heads` * `attention_head_dim`: got {heads} * {features}, expected a multiple of 4 for "
                "the sines and cosines of positions."
            )

    def time_embedders(self) -> list[nn.Module]:
        """The modules that `modulations` depends on, besides the layers themselves."""
        return [block.norm1.emb for block in self.transformer_blocks]

    def modulations(
        self, timestep: torch.Tensor, class_labels: torch.Tensor
    ) -> Iterator[tuple[nn.Module, torch.Tensor]]:
        """What every layer answers that sees time and class alone; the arguments are those of `forward`."""
        for block in self.transformer_blocks:
            temb = block.norm1.emb(timestep, class_labels, self.dtype)  # (B, D)
            yield block.norm1.emb, temb
            yield block.norm1.linear, block.norm1.linear(F.silu(temb))

    def check_inputs(
        self, hidden_states: torch.Tensor, timestep: torch.Tensor | None, class_labels: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The timesteps and labels, one for each of the batch."""
        batch, config = len(hidden_states), self.config
        classes = config.num_embeds_ada_norm
        require_shape("hidden_states", hidden_states, (batch, config.in_channels, "height", "width"))
        one_for_all = (1,) if timestep is not None and timestep.shape == (1,) else (batch,)
        require_shape("timestep", timestep, one_for_all)
        one_for_all = (1,) if class_labels is not None and class_labels.shape == (1,) else (batch,)
        require_shape("class_labels", class_labels, one_for_all)
        assert timestep is not None and class_labels is not None
        if class_labels.is_floating_point():
            raise ValueError(f"`class_labels`: got {class_labels.dtype}, expected whole numbers.")
        # On an accelerator a look at the values would make the host wait.
        if class_labels.device.type == "cpu" and not torch.compiler.is_compiling():
            wrong = class_labels[(class_labels < 0) | (class_labels > classes)]
            if len(wrong):
                raise ValueError(
                    f"`class_labels`: got {wrong.tolist()}, expected 0 to {classes - 1}, or {classes} for no class."
                )
        return timestep.expand(batch), class_labels.expand(batch)


class DiTTransformer2DModel(DiTStem):
    """The class-conditional diffusion transformer (2212.09748); same name, same checkpoint as diffusers' class.

    Three things differ from that class, none of them in evaluation: a fresh model predicts exactly 0 (adaLN-Zero, as
    in the paper); in training a label is dropped for all blocks together, not for each by itself; and latents need not
    be square.

    Args:
        num_attention_heads: Heads; the width D is heads times features.
        attention_head_dim: Features of a head.
        in_channels: Channels of the latents.
        out_channels: Channels of the prediction, twice `in_channels` where the variance is learned; `None` for
            `in_channels`.
        num_layers: Blocks.
        dropout: See `DiTBlock`.
        norm_num_groups: Not read: there is no group norm. Part of published configs.
        attention_bias: See `DiTBlock`.
        sample_size: Height and width of the latents that the model is made for; sets the scale of the positions.
        patch_size: Latent pixels along each side of a token.
        activation_fn: See `FeedForward`.
        num_embeds_ada_norm: Number of classes; the label of that number means no class.
        upcast_attention: See `Attention`.
        norm_type: `"ada_norm_zero"`, the only one.
        norm_elementwise_affine: See `DiTBlock`.
        norm_eps: See `DiTBlock`.

    Raises:
        ValueError: Another `norm_type`, no classes, or a size that is no multiple of the patch.
    """

    _config_class_names = ("Transformer2DModel",)  # in the official repositories
    _no_split_modules = ["DiTBlock"]
    _repeated_blocks = ["DiTBlock"]
    _skip_layerwise_casting_patterns = ["pos_embed", "norm"]
    _cached_blocks = {DiTBlock: (0, None)}

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int | None = None,
        num_layers: int = 28,
        dropout: float = 0.0,
        norm_num_groups: int = 32,
        attention_bias: bool = True,
        sample_size: int = 32,
        patch_size: int = 2,
        activation_fn: str = "gelu-approximate",
        num_embeds_ada_norm: int | None = 1000,
        upcast_attention: bool = False,
        norm_type: str = "ada_norm_zero",
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        self.build_stem()
        self.out_channels = in_channels if out_channels is None else out_channels
        self.norm_out = nn.LayerNorm(self.inner_dim, elementwise_affine=False, eps=1e-6)
        self.proj_out_1 = nn.Linear(self.inner_dim, 2 * self.inner_dim)
        self.proj_out_2 = nn.Linear(self.inner_dim, patch_size * patch_size * self.out_channels)
        self._blocks_come_and_go = False
        self.class_dropout = CLASS_DROPOUT
        """How often a class is replaced by none in training mode; 0 for whoever does so outside"""
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """adaLN-Zero (section 3.2): every block starts as the identity, and the prediction as exactly 0."""
        initialize_dit_(self)
        nn.init.zeros_(self.proj_out_1.weight)
        nn.init.zeros_(self.proj_out_2.weight)

    def enable_group_offload(self, *args: Any, **kwargs: Any) -> None:
        """As diffusers' `ModelMixin.enable_group_offload`, which diffusers' own DiT cannot do."""
        self._blocks_come_and_go = True
        super().enable_group_offload(*args, **kwargs)

    @apply_lora_scale("cross_attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | None = None,
        class_labels: torch.Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        block_controlnet_hidden_states: list[torch.Tensor] | None = None,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Predicts the noise of latents, and beside it what the config's `out_channels` has room for.

        Args:
            hidden_states: x_t, (B, in_channels, H, W); H and W multiples of `patch_size`.
            timestep: (B,), or (1,) for all; 0 (data) to 999 (noise).
            class_labels: (B,), whole numbers; `num_embeds_ada_norm` is no class. In training one of ten becomes that.
            cross_attention_kwargs: Keywords for the attention processors, and `scale`, the strength of LoRA layers.
            return_dict: Whether to return an output object rather than a tuple of one.
            block_controlnet_hidden_states: A ControlNet's residuals, each (B, T, D), added by the blocks; fewer than
                the blocks serve several neighbouring blocks each, as in FLUX.

        Returns:
            `sample`: (B, out_channels, H, W).

        Raises:
            ValueError: An input is missing, its shape does not fit the config, or a label is no class.
        """
        timestep, class_labels = self.check_inputs(hidden_states, timestep, class_labels)
        height, width = hidden_states.shape[-2:]
        if self.training and self.class_dropout:
            class_labels = self.drop_labels(class_labels)

        residuals = shared_by_neighbours(block_controlnet_hidden_states, len(self.transformer_blocks))

        x = self.pos_embed(hidden_states)  # (B, T, D)
        # The output needs the first block's embedders, whose weights may be elsewhere once that block is through.
        embedded = Embedded() if self._blocks_come_and_go else None
        for i, (block, residual) in enumerate(zip(self.transformer_blocks, residuals, strict=True)):  # (B, T, D)
            kept = embedded if i == 0 else None
            x = self.run(block, x, timestep, class_labels, cross_attention_kwargs, residual, kept)

        temb = None if embedded is None else embedded.temb  # (B, D)
        if temb is None:
            temb = self.transformer_blocks[0].norm1.emb(timestep, class_labels, x.dtype)
        shift, scale = self.proj_out_1(F.silu(temb)).chunk(2, dim=1)
        x = self.proj_out_2(modulate(self.norm_out(x), scale, shift))  # (B, T, patch * patch * C)
        sample = self.unpatchify(x, height, width)  # (B, C, H, W)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def modulations(
        self, timestep: torch.Tensor, class_labels: torch.Tensor
    ) -> Iterator[tuple[nn.Module, torch.Tensor]]:
        """What every layer answers that sees time and class alone; the arguments are those of `forward`."""
        first = None  # the first block's embedded condition, (B, D)
        for layer, answer in super().modulations(timestep, class_labels):
            first = answer if first is None else first
            yield layer, answer
        assert first is not None
        yield self.proj_out_1, self.proj_out_1(F.silu(first))

    def drop_labels(self, class_labels: torch.Tensor) -> torch.Tensor:
        """(B,) -> (B,), each label replaced by no class with a probability of `class_dropout`."""
        dropped = torch.rand(class_labels.shape, device=class_labels.device) < self.class_dropout
        return torch.where(dropped, self.config.num_embeds_ada_norm, class_labels)

    def unpatchify(self, x: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """(B, T, patch * patch * C) -> (B, C, height, width)."""
        p = self.config.patch_size
        x = x.reshape(-1, height // p, width // p, p, p, self.out_channels)  # (B, h, w, p, p, C)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.out_channels, height, width)


def dit_s_2(size: int = 256, **changes: Any) -> DiTTransformer2DModel:
    """DiT-S/2 for pictures of `size` pixels (2212.09748, table 1); `changes` to the config."""
    return _dit(12, 6, 64, size, changes)


def dit_b_2(size: int = 256, **changes: Any) -> DiTTransformer2DModel:
    """DiT-B/2 for pictures of `size` pixels."""
    return _dit(12, 12, 64, size, changes)


def dit_l_2(size: int = 256, **changes: Any) -> DiTTransformer2DModel:
    """DiT-L/2 for pictures of `size` pixels."""
    return _dit(24, 16, 64, size, changes)


def dit_xl_2(size: int = 256, **changes: Any) -> DiTTransformer2DModel:
    """DiT-XL/2 for pictures of `size` pixels; the published checkpoints are of 256 and 512."""
    return _dit(28, 16, 72, size, changes)


def _dit(layers: int, heads: int, head_dim: int, size: int, changes: dict[str, Any]) -> DiTTransformer2DModel:
    """On latents of an eighth of `size`, with learned variance, with the `DiTTransformer2DModel` defaults besides."""
    if size % 16:
        raise ValueError(f"`size`: got {size}, expected a multiple of 16 pixels.")
    config = {
        "num_layers": layers,
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "sample_size": size // 8,
        "out_channels": 8,
    }
    return DiTTransformer2DModel(**{**config, **changes})
