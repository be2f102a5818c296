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
from hubgen.layers.attention import Attention
from hubgen.layers.checks import require_shape
from hubgen.layers.embeddings import PatchEmbed, TimestepEmbedding, Timesteps
from hubgen.layers.feed_forward import FeedForward
from hubgen.layers.mmdit_blocks import add_gated
from hubgen.layers.normalization import AdaLayerNormZero, modulate
from hubgen.layers.residuals import shared_by_neighbours

CLASS_DROPOUT = 0.1  # section 4: what makes classifier-free guidance possible


class LabelEmbedding(nn.Module):
    """A vector for each class, and one more, the last, for no class: (B,) -> (B, D)."""

    def __init__(self, num_classes: int, hidden_size: int):
        super().__init__()
        self.num_classes = num_classes
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        return self.embedding_table(labels)


class CombinedTimestepLabelEmbeddings(nn.Module):
    """Embedded timestep plus embedded class; the lowest frequency is exactly 1/10000 here, unlike in an MM-DiT."""

    def __init__(self, num_classes: int, embedding_dim: int):
        super().__init__()
        self.time_proj = Timesteps(num_channels=256, flip_sin_to_cos=True, downscale_freq_shift=1)
        self.timestep_embedder = TimestepEmbedding(in_channels=256, time_embed_dim=embedding_dim)
        self.class_embedder = LabelEmbedding(num_classes, embedding_dim)

    def forward(self, timestep: torch.Tensor, class_labels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """(B,), (B,) -> (B, D)."""
        waves = self.time_proj(timestep).to(dtype)  # (B, 256)
        return self.timestep_embedder(waves) + self.class_embedder(class_labels)


class ClassAdaLayerNormZero(AdaLayerNormZero):
    """adaLN-Zero that owns the embedders of its condition."""

    def __init__(self, embedding_dim: int, num_classes: int):
        super().__init__(embedding_dim)
        self.emb = CombinedTimestepLabelEmbeddings(num_classes, embedding_dim)


class Embedded:
    """Carries the first block's embedded condition to the output, under group offloading.

    Not a list, because offloading hooks hand on copies of lists.
    """

    temb: torch.Tensor | None = None  # (B, D)


class DiTBlock(nn.Module):
    """Figure 3, "DiT Block with adaLN-Zero": modulated attention and MLP, both gated.

    Args:
        dim: Features of a token.
        num_attention_heads: Heads.
        attention_head_dim: Features of a head.
        num_classes: Classes, the one for no class not counted.
        dropout: Probability of dropping a feature of attention's output and inside the MLP.
        activation_fn: See `FeedForward`.
        attention_bias: Whether queries, keys and values have a bias.
        upcast_attention: See `Attention`.
        norm_elementwise_affine: Whether the MLP's norm has a weight and a bias.
        norm_eps: Epsilon of the MLP's norm; attention's is always 1e-6. (The paper's code has 1e-6 for both, the
            published configs 1e-5.)
    """

    def __init__(
        self,
        dim: int,
        num_attention_heads: int,
        attention_head_dim: int,
        num_classes: int,
        dropout: float = 0.0,
        activation_fn: str = "gelu-approximate",
        attention_bias: bool = True,
        upcast_attention: bool = False,
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        self.norm1 = ClassAdaLayerNormZero(dim, num_classes)
        self.attn1 = Attention(
            dim,
            heads=num_attention_heads,
            dim_head=attention_head_dim,
            bias=attention_bias,
            dropout=dropout,
            upcast_attention=upcast_attention,
        )
        self.norm3 = nn.LayerNorm(dim, eps=norm_eps, elementwise_affine=norm_elementwise_affine)
        self.ff = FeedForward(dim, dropout=dropout, activation_fn=activation_fn)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor,
        cross_attention_kwargs: dict[str, Any] | None = None,
        residual: torch.Tensor | None = None,
        embedded: Embedded | None = None,
    ) -> torch.Tensor:
        """(B, T, D), (B,), (B,) -> (B, T, D).

        Args:
            hidden_states: Tokens, (B, T, D).
            timestep: (B,).
            class_labels: (B,).
            cross_attention_kwargs: Further keywords of the attention's processor.
            residual: A ControlNet's, (B, T, D), added at the end; see `JointTransformerBlock.forward`.
            embedded: Receives the block's embedded condition.
        """
        x = hidden_states
        temb = self.norm1.emb(timestep, class_labels, x.dtype)  # (B, D)
        if embedded is not None:
            embedded.temb = temb
        x_in, gate, shift_mlp, scale_mlp, gate_mlp = self.norm1(x, temb)
        x = add_gated(x, gate, self.attn1(x_in, **(cross_attention_kwargs or {})))
        x = add_gated(x, gate_mlp, self.ff(modulate(self.norm3(x), scale_mlp, shift_mlp)))
        return x if residual is None else x + residual


class DiTTransformer2DModel(Backbone):
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
        if norm_type != "ada_norm_zero":
            raise ValueError(f"`norm_type`: got {norm_type!r}, expected 'ada_norm_zero'.")
        if num_embeds_ada_norm is None or num_embeds_ada_norm < 1:
            raise ValueError(f"`num_embeds_ada_norm`: got {num_embeds_ada_norm!r}, expected the number of classes.")
        if num_layers < 1:
            raise ValueError(f"`num_layers`: got {num_layers!r}, expected at least 1.")
        if sample_size % patch_size:
            raise ValueError(f"`sample_size`: got {sample_size}, expected a multiple of `patch_size` = {patch_size}.")
        self.inner_dim = num_attention_heads * attention_head_dim
        if self.inner_dim % 4:
            raise ValueError(
                f"`num_attention_heads` * `attention_head_dim`: got {num_attention_heads} * {attention_head_dim}, "
                "expected a multiple of 4 for the sines and cosines of positions."
            )
        self.out_channels = in_channels if out_channels is None else out_channels

        self.pos_embed = PatchEmbed(
            height=sample_size,
            width=sample_size,
            patch_size=patch_size,
            in_channels=in_channels,
            embed_dim=self.inner_dim,
        )
        self.transformer_blocks = nn.ModuleList(
            DiTBlock(
                dim=self.inner_dim,
                num_attention_heads=num_attention_heads,
                attention_head_dim=attention_head_dim,
                num_classes=num_embeds_ada_norm,
                dropout=dropout,
                activation_fn=activation_fn,
                attention_bias=attention_bias,
                upcast_attention=upcast_attention,
                norm_elementwise_affine=norm_elementwise_affine,
                norm_eps=norm_eps,
            )
            for _ in range(num_layers)
        )
        self.norm_out = nn.LayerNorm(self.inner_dim, elementwise_affine=False, eps=1e-6)
        self.proj_out_1 = nn.Linear(self.inner_dim, 2 * self.inner_dim)
        self.proj_out_2 = nn.Linear(self.inner_dim, patch_size * patch_size * self.out_channels)
        self._blocks_come_and_go = False
        self.class_dropout = CLASS_DROPOUT
        """How often a class is replaced by none in training mode; 0 for whoever does so outside"""
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """adaLN-Zero (section 3.2): every block starts as the identity, and the prediction as exactly 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1))  # the convolution is a linear layer on patches
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, CombinedTimestepLabelEmbeddings):
                nn.init.normal_(module.timestep_embedder.linear_1.weight, std=0.02)
                nn.init.normal_(module.timestep_embedder.linear_2.weight, std=0.02)
                nn.init.normal_(module.class_embedder.embedding_table.weight, std=0.02)
            elif isinstance(module, AdaLayerNormZero):
                nn.init.zeros_(module.linear.weight)
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

    def time_embedders(self) -> list[nn.Module]:
        """The modules that `modulations` depends on, besides the layers themselves."""
        return [block.norm1.emb for block in self.transformer_blocks]

    def modulations(
        self, timestep: torch.Tensor, class_labels: torch.Tensor
    ) -> Iterator[tuple[nn.Module, torch.Tensor]]:
        """What every layer answers that sees time and class alone; the arguments are those of `forward`."""
        first = None
        for block in self.transformer_blocks:
            temb = block.norm1.emb(timestep, class_labels, self.dtype)  # (B, D)
            first = temb if first is None else first
            yield block.norm1.emb, temb
            yield block.norm1.linear, block.norm1.linear(F.silu(temb))
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
