"""Embeddings of timesteps, of pooled text and of latents' patches.

Parameter names are those of diffusers' classes of the same name.

Shapes: B batch, C channels, H and W height and width in latent pixels, h and w the same in patches, T = h * w tokens,
D features.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from hubgen.layers.feed_forward import activation


def timestep_embedding(
    timesteps: torch.Tensor,
    dim: int,
    flip_sin_to_cos: bool = False,
    downscale_freq_shift: float = 1,
    scale: float = 1,
    max_period: int = 10000,
) -> torch.Tensor:
    """Sines and cosines of the timesteps at geometrically falling frequencies (1706.03762, section 3.5).

    Args:
        timesteps: (B,), whole or fractional.
        dim: Features of the embedding; an odd one gets a zero at its end.
        flip_sin_to_cos: Cosines first, as in Stable Diffusion; sines first as in DDPM.
        downscale_freq_shift: With 1 the last frequency is exactly `1 / max_period` (DDPM), with 0 one step before.
        scale: Factor on the angles.
        max_period: The longest period, in units of 2 pi timesteps.

    Returns:
        (B, dim) in float32: half precision cannot tell timestep 999 from 1000.

    Raises:
        ValueError: `timesteps` is not one-dimensional.
    """
    if timesteps.ndim != 1:
        raise ValueError(f"`timesteps`: got {tuple(timesteps.shape)}, expected (batch,).")
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=timesteps.device) / (half - downscale_freq_shift)
    angles = scale * timesteps[:, None].float() * torch.exp(-math.log(max_period) * exponent)  # (B, dim / 2)
    waves = [angles.cos(), angles.sin()] if flip_sin_to_cos else [angles.sin(), angles.cos()]
    return F.pad(torch.cat(waves, dim=-1), (0, dim % 2))  # (B, dim)


class Timesteps(nn.Module):
    """`timestep_embedding` as a module: (B,) -> (B, num_channels), float32."""

    def __init__(self, num_channels: int, flip_sin_to_cos: bool, downscale_freq_shift: float, scale: float = 1):
        super().__init__()
        self.num_channels = num_channels
        self.flip_sin_to_cos = flip_sin_to_cos
        self.downscale_freq_shift = downscale_freq_shift
        self.scale = scale

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        return timestep_embedding(
            timesteps, self.num_channels, self.flip_sin_to_cos, self.downscale_freq_shift, self.scale
        )


class GaussianFourierProjection(nn.Module):
    """Sines and cosines of the logarithm of a noise level at fixed random frequencies: (B,) -> (B, 2 embedding_size).

    2011.13456, section 4.4, after 2006.10739. The frequencies are drawn once, normal with the standard deviation
    `scale`, and are saved with the weights, but not trained.
    """

    def __init__(self, embedding_size: int, scale: float):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(embedding_size) * scale, requires_grad=False)

    def forward(self, sigmas: torch.Tensor) -> torch.Tensor:
        angles = 2 * math.pi * (torch.log(sigmas)[:, None] * self.weight)  # (B, embedding_size)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class TimestepEmbedding(nn.Module):
    """Two linear layers on a sinusoidal embedding: (B, in_channels) -> (B, out_dim).

    Args:
        in_channels: Features of the sinusoidal embedding.
        time_embed_dim: Features between the two layers.
        act_fn: Activation between the two layers.
        out_dim: Features of the output; `time_embed_dim` by default.
        post_act_fn: Activation of the output; none by default.
        cond_proj_dim: Features of a second condition (a guidance scale's embedding in latent consistency models,
            2310.04378), which is projected and added to the input.
    """

    def __init__(
        self,
        in_channels: int,
        time_embed_dim: int,
        act_fn: str = "silu",
        out_dim: int | None = None,
        post_act_fn: str | None = None,
        cond_proj_dim: int | None = None,
    ):
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, time_embed_dim)
        self.cond_proj = None if cond_proj_dim is None else nn.Linear(cond_proj_dim, in_channels, bias=False)
        self.act = activation(act_fn)
        self.linear_2 = nn.Linear(time_embed_dim, time_embed_dim if out_dim is None else out_dim)
        self.post_act = None if post_act_fn is None else activation(post_act_fn)

    def forward(self, sample: torch.Tensor, condition: torch.Tensor | None = None) -> torch.Tensor:
        if condition is not None:
            if self.cond_proj is None:
                raise ValueError("`condition`: got a tensor, expected None without `cond_proj_dim`.")
            sample = sample + self.cond_proj(condition)
        out = self.linear_2(self.act(self.linear_1(sample)))
        return out if self.post_act is None else self.post_act(out)


class TextProjection(nn.Module):
    """Two linear layers with a SiLU between on a pooled text embedding: (B, in_features) -> (B, hidden_size)."""

    def __init__(self, in_features: int, hidden_size: int):
        super().__init__()
        self.linear_1 = nn.Linear(in_features, hidden_size)
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        return self.linear_2(F.silu(self.linear_1(pooled)))


class CombinedTimestepTextProjEmbeddings(nn.Module):
    """What modulates every block of an MM-DiT: embedded timestep plus embedded pooled text (2403.03206, figure 2a)."""

    def __init__(self, embedding_dim: int, pooled_projection_dim: int):
        super().__init__()
        self.time_proj = Timesteps(num_channels=256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.timestep_embedder = TimestepEmbedding(in_channels=256, time_embed_dim=embedding_dim)
        self.text_embedder = TextProjection(pooled_projection_dim, embedding_dim)

    def forward(self, timestep: torch.Tensor, pooled_projection: torch.Tensor) -> torch.Tensor:
        """(B,), (B, pooled_projection_dim) -> (B, embedding_dim)."""
        waves = self.time_proj(timestep).to(pooled_projection.dtype)  # (B, 256)
        return self.timestep_embedder(waves) + self.text_embedder(pooled_projection)


class CombinedTimestepGuidanceTextProjEmbeddings(CombinedTimestepTextProjEmbeddings):
    """The same plus the embedded guidance scale, of a model into which guidance was distilled (FLUX.1 dev)."""

    def __init__(self, embedding_dim: int, pooled_projection_dim: int):
        super().__init__(embedding_dim, pooled_projection_dim)
        self.guidance_embedder = TimestepEmbedding(in_channels=256, time_embed_dim=embedding_dim)

    def forward(  # type: ignore[override]
        self, timestep: torch.Tensor, guidance: torch.Tensor, pooled_projection: torch.Tensor
    ) -> torch.Tensor:
        """(B,), (B,), (B, pooled_projection_dim) -> (B, embedding_dim)."""
        waves = self.time_proj(guidance).to(pooled_projection.dtype)  # (B, 256)
        return super().forward(timestep, pooled_projection) + self.guidance_embedder(waves)


class FluxPosEmbed(nn.Module):
    """Rotary position embedding with several axes, each of which turns features of its own (2104.09864; FLUX).

    Args:
        theta: The longest period of an axis, in units of 2 pi positions.
        axes_dim: Features that each axis turns, even numbers; together those of a head.
    """

    def __init__(self, theta: int, axes_dim: tuple[int, ...]):
        super().__init__()
        self.theta = theta
        self.axes_dim = axes_dim

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions (T, axes) -> cosines and sines, each (T, D) in float32, every angle twice."""
        # float64 as in FLUX, wherever the device has it: positions go into the thousands.
        precise = torch.float32 if ids.device.type in ("mps", "npu") else torch.float64
        angles = []
        for axis, dim in enumerate(self.axes_dim):
            exponent = torch.arange(0, dim, 2, dtype=precise, device=ids.device) / dim
            angles.append(ids[:, axis, None].to(precise) / self.theta**exponent)  # (T, dim / 2)
        of_pairs = torch.cat(angles, dim=1).repeat_interleave(2, dim=1)  # (T, D)
        return of_pairs.cos().float(), of_pairs.sin().float()


def sincos_position_embedding(dim: int, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Fixed position embedding of a grid, one row after another: (h,), (w,) -> (h * w, dim), float32.

    The first half of the features are sines and cosines of the column, the second half of the row, computed in
    float64 (MAE, 2111.06377; DiT, 2212.09748).

    Raises:
        ValueError: `dim` is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"`dim`: got {dim}, expected a multiple of 4 for the sines and cosines of positions.")
    exponent = torch.arange(dim // 4, dtype=torch.float64, device=rows.device) / (dim / 4)
    frequencies = 1 / 10000**exponent  # (dim / 4,)

    def waves(positions: torch.Tensor) -> torch.Tensor:  # (n,) -> (n, dim / 2)
        angles = positions.double()[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    of_column = waves(columns)[None].expand(len(rows), -1, -1)  # (h, w, dim / 2)
    of_row = waves(rows)[:, None].expand(-1, len(columns), -1)
    return torch.cat([of_column, of_row], dim=-1).flatten(0, 1).float()


class PatchEmbed(nn.Module):
    """Latents to tokens: a linear layer on every patch, plus the patch's fixed position (ViT, 2010.11929; DiT).

    With `pos_embed_max_size` one square table of positions is a part of the state dict, and smaller latents take its
    middle, so that a picture's centre has the same position at every size (2403.03206, section 5.3.2). Without, the
    table fits `height` and `width`, is made anew for other sizes, and stays out of the state dict. What is added to
    tokens that know their positions already, a ControlNet's hint, has none of its own (`pos_embed_type=None`).

    Args:
        height: Rows of the latents that the model was made for.
        width: Columns of the same.
        patch_size: Rows and columns of a patch.
        in_channels: Channels of the latents.
        embed_dim: Features of a token.
        interpolation_scale: Divides all positions.
        pos_embed_max_size: Rows and columns of the table in patches.
        pos_embed_type: `"sincos"`, or `None` for no positions.
    """

    pos_embed: torch.Tensor | None

    def __init__(
        self,
        height: int = 224,
        width: int = 224,
        patch_size: int = 16,
        in_channels: int = 3,
        embed_dim: int = 768,
        interpolation_scale: float = 1,
        pos_embed_max_size: int | None = None,
        pos_embed_type: str | None = "sincos",
    ):
        super().__init__()
        if pos_embed_type not in ("sincos", None):
            raise ValueError(f"`pos_embed_type`: got {pos_embed_type!r}, expected 'sincos' or None.")
        self.patch_size = patch_size
        self.height, self.width = height // patch_size, width // patch_size
        self.interpolation_scale = interpolation_scale
        self.pos_embed_max_size = None if pos_embed_type is None else pos_embed_max_size
        self.in_channels = in_channels  # not that of `proj`, which an adapter may wrap
        self.proj = nn.Conv2d(in_channels, embed_dim, kernel_size=patch_size, stride=patch_size)
        size = (self.height, self.width) if pos_embed_max_size is None else (pos_embed_max_size,) * 2
        table = None if pos_embed_type is None else self.positions(*size)
        self.register_buffer("pos_embed", table, persistent=pos_embed_max_size is not None)

    def positions(self, rows: int, columns: int, device: torch.device | None = None) -> torch.Tensor:
        """(1, rows * columns, D); a grid of any size spans the `height` patches that the model was made for."""
        spans = [
            torch.arange(n, dtype=torch.float32, device=device) / (n / self.height) / self.interpolation_scale
            for n in (rows, columns)
        ]
        return sincos_position_embedding(self.proj.out_channels, *spans)[None]

    def cropped_positions(self, rows: int, columns: int) -> torch.Tensor:
        """(1, rows * columns, D), the middle of the table."""
        size = self.pos_embed_max_size
        assert self.pos_embed is not None
        top, left = (size - rows) // 2, (size - columns) // 2
        table = self.pos_embed.unflatten(1, (size, size))  # (1, size, size, D)
        return table[:, top : top + rows, left : left + columns].flatten(1, 2)

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, T, D).

        Raises:
            ValueError: The channels are not those of the weights, a side is no multiple of the patch, or the latents
                are larger than the table of positions.
        """
        if latent.ndim != 4 or latent.shape[1] != self.in_channels:
            raise ValueError(
                f"`latent`: got {tuple(latent.shape)}, expected (batch, {self.in_channels}, height, width)."
            )
        height, width = latent.shape[-2:]
        rows, columns = height // self.patch_size, width // self.patch_size
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"`latent`: got {height} x {width}, expected multiples of `patch_size` = {self.patch_size}."
            )
        if self.pos_embed_max_size is not None and max(rows, columns) > self.pos_embed_max_size:
            limit = self.pos_embed_max_size * self.patch_size
            raise ValueError(
                f"`latent`: got {height} x {width}, expected at most {limit} (`pos_embed_max_size` = "
                f"{self.pos_embed_max_size} patches of {self.patch_size})."
            )
        tokens = self.proj(latent).flatten(2).transpose(1, 2)  # (B, T, D)
        if self.pos_embed is None:
            return tokens
        if self.pos_embed_max_size is not None:
            positions = self.cropped_positions(rows, columns)
        elif (rows, columns) == (self.height, self.width):
            positions = self.pos_embed
        else:
            positions = self.positions(rows, columns, tokens.device)
        return (tokens + positions).to(tokens.dtype)
