"""The encoder half of the text-conditioned U-Net: all but the way up. ControlNets (2302.05543) have the same.

Shapes: B batch, H and W height and width in latent pixels, C_i channels of level i (`block_out_channels`), T features
of the time embedding, S text tokens, E features of a text token (`cross_attention_dim`).
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from hubgen.backbones.base import Backbone
from hubgen.backbones.unet_condition_config import DOWN_BLOCKS, LEFT_OUT, MID_BLOCKS
from hubgen.formats.single_file import SingleFileMixin
from hubgen.layers.checks import per_level
from hubgen.layers.conditioned import modulations
from hubgen.layers.embeddings import TimestepEmbedding, Timesteps
from hubgen.layers.unet_blocks import LevelAttention


class UNetConditionEncoder(SingleFileMixin, Backbone):
    """Embeddings of all conditions, the first convolution, the way down and the middle.

    A subclass has a config with `UNet2DConditionModel`'s keys, but for the way up and those that have a value in
    `LEFT_OUT` as it needs, and calls `build_way_down` and `build_middle` in its constructor: the order in which parts
    are made is the order of `attn_processors`, by which IP-Adapter files are numbered, and of the random numbers of
    fresh weights.
    """

    def build_way_down(self) -> None:
        """Makes `conv_in`, the embeddings and `down_blocks`."""
        config, widths = self.config, self.config.block_out_channels
        kernel, waves = self.option("conv_in_kernel"), (config.flip_sin_to_cos, config.freq_shift)
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], kernel, padding=kernel // 2)

        temb_dim = self.temb_dim
        self.time_proj = Timesteps(widths[0], *waves)
        guidance_dim = self.option("time_cond_proj_dim")
        self.time_embedding = TimestepEmbedding(widths[0], temb_dim, cond_proj_dim=guidance_dim)
        self.encoder_hid_proj = (
            None if config.encoder_hid_dim is None else nn.Linear(config.encoder_hid_dim, config.cross_attention_dim)
        )
        self.class_embedding: nn.Module | None = None
        if config.class_embed_type == "timestep":
            self.class_embedding = TimestepEmbedding(widths[0], temb_dim)
        elif config.class_embed_type == "identity":
            self.class_embedding = nn.Identity()
        elif config.class_embed_type == "projection":
            self.class_embedding = TimestepEmbedding(config.projection_class_embeddings_input_dim, temb_dim)
        elif config.class_embed_type == "simple_projection":
            self.class_embedding = nn.Linear(config.projection_class_embeddings_input_dim, temb_dim)
        elif config.num_class_embeds is not None:
            self.class_embedding = nn.Embedding(config.num_class_embeds, temb_dim)
        if config.addition_embed_type == "text_time":
            self.add_time_proj = Timesteps(config.addition_time_embed_dim, *waves)
            self.add_embedding = TimestepEmbedding(config.projection_class_embeddings_input_dim, temb_dim)

        levels, layers, depths = len(widths), self.per_level("layers_per_block"), self.down_depths
        self.down_blocks = nn.ModuleList()
        for i, block_type in enumerate(config.down_block_types):
            self.down_blocks.append(
                DOWN_BLOCKS[block_type](
                    widths[max(i - 1, 0)],
                    widths[i],
                    self.vector_dim,
                    layers[i],
                    self.level_attention(i, depths[i], block_type),
                    add_downsample=i < levels - 1,
                    downsample_padding=config.downsample_padding,
                    **self.norm_options,
                )
            )

    def build_middle(self) -> None:
        """Makes `mid_block`, which may be None."""
        config, kind = self.config, self.option("mid_block_type")
        self.mid_block = None
        if kind is not None:
            self.mid_block = MID_BLOCKS[kind](
                config.block_out_channels[-1],
                self.vector_dim,
                self.level_attention(-1, self.down_depths[-1], kind),
                output_scale_factor=config.mid_block_scale_factor,
                **self.norm_options,
            )

    def levels(self) -> list[nn.Module]:
        """The levels down, and up where there are any, and the middle."""
        middle = [] if self.mid_block is None else [self.mid_block]
        return [*self.down_blocks, *getattr(self, "up_blocks", ()), *middle]

    def option(self, name: str) -> Any:
        """A value of the config that a ControlNet's has no key for."""
        return self.config.get(name, LEFT_OUT[name])

    def per_level(self, name: str) -> tuple[Any, ...]:
        """An argument of the config that is one value for all levels or one each, as one each."""
        return per_level(name, self.config[name], len(self.config.block_out_channels))

    @property
    def down_depths(self) -> tuple[Any, ...]:
        """Transformer blocks of each spatial transformer of each level on the way down."""
        return self.per_level("transformer_layers_per_block")

    @property
    def temb_dim(self) -> int:
        """Features of the time embedding (T)."""
        given = self.option("time_embedding_dim")
        return 4 * self.config.block_out_channels[0] if given is None else given

    @property
    def vector_dim(self) -> int:
        """Features of what the residual blocks see of time, class, text and sizes: T, or 2 T with the class beside."""
        return self.temb_dim * (2 if self.option("class_embeddings_concat") else 1)

    @property
    def norm_options(self) -> dict[str, Any]:
        """Keywords that all levels have in common."""
        config = self.config
        return {"groups": config.norm_num_groups, "eps": config.norm_eps, "dropout": self.option("dropout")}

    def level_attention(self, level: int, depth: int | tuple[int, ...], block_type: str) -> LevelAttention | None:
        """The attention of a level; `None` for a type without."""
        if not block_type.startswith(("CrossAttn", "UNetMidBlock2DCrossAttn")):
            return None
        return LevelAttention(
            self.per_level("attention_head_dim")[level],
            self.per_level("cross_attention_dim")[level],
            depth,
            self.config.use_linear_projection,
            self.config.upcast_attention,
            self.config.norm_num_groups,
        )

    def attended(
        self,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        encoder_attention_mask: torch.Tensor | None,
        cross_attention_kwargs: dict[str, Any] | None,
        dtype: torch.dtype,
    ) -> dict[str, Any]:
        """Keywords of every level: what its attention looks at, and masks as they are added to the scores."""
        projection = self.text_projection
        if projection is not None:
            encoder_hidden_states = projection(encoder_hidden_states)  # (B, S, E)
        return {
            "encoder_hidden_states": encoder_hidden_states,
            "attention_mask": self.score_bias(attention_mask, dtype),
            "encoder_attention_mask": self.score_bias(encoder_attention_mask, dtype),
            "cross_attention_kwargs": cross_attention_kwargs,
        }

    def way_down(
        self, x: torch.Tensor, temb: torch.Tensor, attended: dict[str, Any], intra: Sequence[torch.Tensor] = ()
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The features at the lowest resolution, and the feature maps for the way up, `x` the first of them.

        Args:
            x: Output of `conv_in`, (B, C_0, H, W).
            temb: (B, T), see `embed_conditions`.
            attended: See `attended`.
            intra: A T2I-adapter's residuals for the first levels, one each.
        """
        skips = [x]
        for i, block in enumerate(self.down_blocks):  # x: (B, C_i, H / 2^(i + 1), W / 2^(i + 1)), rounded up
            x, maps = block(x, temb, additional_residuals=intra[i] if i < len(intra) else None, **attended)
            skips.extend(maps)
        return x, skips

    def embed_conditions(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None,
        timestep_cond: torch.Tensor | None,
        added_cond_kwargs: dict[str, torch.Tensor] | None,
    ) -> torch.Tensor:
        """Everything about the image that is one vector: timestep, class, pooled text and sizes.

        (B, T), their sum; or (B, 2 T) where the class stands beside the time (`class_embeddings_concat`).
        """
        batch, dtype = sample.shape[0], sample.dtype
        if not torch.is_tensor(timestep):
            timestep = torch.full((batch,), timestep, dtype=torch.float32, device=sample.device)
        timestep = timestep.to(sample.device).reshape(-1).expand(batch)  # (B,)
        temb = self.time_embedding(self.time_proj(timestep).to(dtype), timestep_cond)  # (B, T)

        if self.class_embedding is not None and class_labels is not None:
            if self.config.class_embed_type == "timestep":
                class_labels = self.time_proj(class_labels)  # (B, C_0)
            if self.config.class_embed_type is not None:
                class_labels = class_labels.to(dtype)
            embedded = self.class_embedding(class_labels).to(dtype)  # (B, T)
            beside = self.option("class_embeddings_concat")
            temb = torch.cat([temb, embedded], dim=-1) if beside else temb + embedded

        if added_cond_kwargs:
            numbers = added_cond_kwargs["time_ids"]  # (B, N)
            waves = self.add_time_proj(numbers.flatten()).reshape(batch, -1)  # (B, N * addition_time_embed_dim)
            vector = torch.cat([added_cond_kwargs["text_embeds"].to(dtype), waves.to(dtype)], dim=-1)
            temb = temb + self.add_embedding(vector)
        return temb

    def context_layers(self) -> list[nn.Module]:
        """The layers that see the text as it comes in, and nothing else; the attentions name theirs themselves."""
        return [] if self.text_projection is None else [self.text_projection]

    @property
    def text_projection(self) -> nn.Module | None:
        """What the text goes through first. Diffusers' loader of IP-Adapters puts theirs in the place of its name."""
        if self.has_image_projection:
            return getattr(self, "text_encoder_hid_proj", None)
        return self.encoder_hid_proj

    @property
    def has_image_projection(self) -> bool:
        """Whether diffusers' loader has put IP-Adapters in."""
        return hasattr(self.encoder_hid_proj, "image_projection_layers")

    def time_embedders(self) -> list[nn.Module]:
        """The modules that `modulations` depends on, besides the layers themselves."""
        sums = [self.time_proj, self.time_embedding, self.class_embedding]
        if self.config.addition_embed_type == "text_time":
            sums += [self.add_time_proj, self.add_embedding]
        return [module for module in sums if module is not None]

    def modulations(
        self,
        timestep: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        timestep_cond: torch.Tensor | None = None,
        added_cond_kwargs: dict[str, torch.Tensor] | None = None,
    ) -> Iterator[tuple[nn.Module, torch.Tensor]]:
        """What every layer answers that sees the time and such vectors alone; the arguments are those of `forward`."""
        like = timestep.new_empty(len(timestep), dtype=self.dtype)
        return modulations(self, self.embed_conditions(like, timestep, class_labels, timestep_cond, added_cond_kwargs))

    @staticmethod
    def score_bias(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
        """(B, S) of 1 and 0 -> (B, 1, S) of 0 and -10000, which fits in half precision, to be added to the scores."""
        return None if mask is None else ((1 - mask.to(dtype)) * -10000.0)[:, None]

    def check_inputs(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        encoder_hidden_states: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        encoder_attention_mask: torch.Tensor | None,
    ) -> None:
        """Raises ValueError where the latents, the timestep, the text or a mask do not fit the model or each other."""
        config = self.config
        if sample.ndim != 4 or sample.shape[1] != config.in_channels:
            raise ValueError(
                f"`sample`: got {tuple(sample.shape)}, expected (batch, {config.in_channels}, height, width)."
            )
        batch = sample.shape[0]
        if torch.is_tensor(timestep) and (timestep.ndim > 1 or timestep.numel() not in (1, batch)):
            raise ValueError(
                f"`timestep`: got {tuple(timestep.shape)}, expected one number or ({batch},) as the batch of `sample`."
            )
        if any(block.has_cross_attention for block in self.levels()):
            width = config.cross_attention_dim if config.encoder_hid_dim is None else config.encoder_hid_dim
            width = width[0] if isinstance(width, Sequence) else width
            shape = None if encoder_hidden_states is None else tuple(encoder_hidden_states.shape)
            if shape is None or len(shape) != 3 or shape[0] != batch or shape[2] != width:
                raise ValueError(f"`encoder_hidden_states`: got {shape}, expected ({batch}, tokens, {width}).")
        if attention_mask is not None and (attention_mask.ndim != 2 or attention_mask.shape[0] != batch):
            raise ValueError(f"`attention_mask`: got {tuple(attention_mask.shape)}, expected ({batch}, pixels).")
        if encoder_attention_mask is not None:
            expected = None if encoder_hidden_states is None else tuple(encoder_hidden_states.shape[:2])
            if tuple(encoder_attention_mask.shape) != expected:
                raise ValueError(
                    f"`encoder_attention_mask`: got {tuple(encoder_attention_mask.shape)}, expected {expected} as "
                    "`encoder_hidden_states`."
                )

    def check_embeddings(
        self,
        sample: torch.Tensor,
        class_labels: torch.Tensor | None,
        timestep_cond: torch.Tensor | None,
        added_cond_kwargs: dict[str, torch.Tensor] | None,
    ) -> None:
        """Raises ValueError where a vector is missing that the model needs, or given that it does not take."""
        config, batch = self.config, sample.shape[0]
        if (class_labels is None) != (self.class_embedding is None):
            raise ValueError(
                f"`class_labels`: got {'None' if class_labels is None else 'a tensor'}, expected "
                f"{'None' if self.class_embedding is None else 'a tensor'} with `class_embed_type` = "
                f"{config.class_embed_type!r} and `num_class_embeds` = {config.num_class_embeds!r}."
            )
        if class_labels is not None:
            widths = dict.fromkeys(("projection", "simple_projection"), config.projection_class_embeddings_input_dim)
            widths["identity"] = self.temb_dim
            vector = (widths[config.class_embed_type],) if config.class_embed_type in widths else ()
            if tuple(class_labels.shape) != (batch, *vector):
                raise ValueError(f"`class_labels`: got {tuple(class_labels.shape)}, expected {(batch, *vector)}.")
        guidance_dim = self.option("time_cond_proj_dim")
        if timestep_cond is not None and timestep_cond.shape[-1] != guidance_dim:
            raise ValueError(
                f"`timestep_cond`: got {tuple(timestep_cond.shape)}, expected `time_cond_proj_dim` = "
                f"{guidance_dim} features."
            )

        keys = {"text_embeds", "time_ids"} if config.addition_embed_type == "text_time" else set()
        given = set(added_cond_kwargs or ())
        if given != keys:
            raise ValueError(
                f"`added_cond_kwargs`: got the keys {sorted(given)}, expected {sorted(keys)} with "
                f"`addition_embed_type` = {config.addition_embed_type!r}."
            )
        if added_cond_kwargs:
            text, numbers = added_cond_kwargs["text_embeds"], added_cond_kwargs["time_ids"]
            for name, value in (("text_embeds", text), ("time_ids", numbers)):
                if value.ndim != 2 or value.shape[0] != batch:
                    raise ValueError(
                        f"`added_cond_kwargs['{name}']`: got {tuple(value.shape)}, expected ({batch}, features)."
                    )
            features = text.shape[1] + numbers.shape[1] * config.addition_time_embed_dim
            if features != config.projection_class_embeddings_input_dim:
                raise ValueError(
                    f"`added_cond_kwargs`: got {text.shape[1]} features of `text_embeds` and {numbers.shape[1]} "
                    f"`time_ids` of {config.addition_time_embed_dim} features, {features} together, expected "
                    f"`projection_class_embeddings_input_dim` = {config.projection_class_embeddings_input_dim}."
                )
