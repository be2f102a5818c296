"""The KL autoencoder in the layout of CompVis' latent-diffusion, which SD3's and FLUX's keep.

The decoder's levels are numbered from the pixels up there (`up.0` is the last one), in our layout as they are computed;
attention is made of 1x1 convolutions there, of linear layers here.
"""

from collections.abc import Mapping
from typing import Any

from hubgen.formats.headers import Shapes, TensorHeader
from hubgen.formats.key_maps import POINTWISE, Line, Rule, rules

OUTSIDE: tuple[Line, ...] = (
    ("quant_conv", "quant_conv"),
    ("post_quant_conv", "post_quant_conv"),
)
HALF: tuple[Line, ...] = (  # encoder and decoder
    ("{half}.conv_in", "{half}.conv_in"),
    ("{half}.norm_out", "{half}.conv_norm_out"),
    ("{half}.conv_out", "{half}.conv_out"),
    ("{half}.mid.attn_1.norm", "{half}.mid_block.attentions.0.group_norm"),
    ("{half}.mid.attn_1.q", "{half}.mid_block.attentions.0.to_q", POINTWISE),
    ("{half}.mid.attn_1.k", "{half}.mid_block.attentions.0.to_k", POINTWISE),
    ("{half}.mid.attn_1.v", "{half}.mid_block.attentions.0.to_v", POINTWISE),
    ("{half}.mid.attn_1.proj_out", "{half}.mid_block.attentions.0.to_out.0", POINTWISE),
    ("{half}.mid.block_1", "{half}.mid_block.resnets.0"),
    ("{half}.mid.block_2", "{half}.mid_block.resnets.1"),
)
RESNET: tuple[Line, ...] = (
    ("{old}", "{new}"),  # norm1, conv1, norm2, conv2
    ("{old}.nin_shortcut", "{new}.conv_shortcut"),
)
DOWNSAMPLE: tuple[Line, ...] = (("encoder.down.{level}.downsample", "encoder.down_blocks.{level}.downsamplers.0"),)
UPSAMPLE: tuple[Line, ...] = (("decoder.up.{level}.upsample", "decoder.up_blocks.{ours}.upsamplers.0"),)

# family -> how its latents are scaled and shifted to unit variance; no key or shape tells
LATENTS: dict[str, dict[str, Any]] = {
    "sd": {"scaling_factor": 0.18215, "sample_size": 512},
    "sdxl": {"scaling_factor": 0.13025, "sample_size": 1024, "force_upcast": True},
    "sd3": {"scaling_factor": 1.5305, "shift_factor": 0.0609, "sample_size": 1024, "force_upcast": True},
    "flux": {"scaling_factor": 0.3611, "shift_factor": 0.1159, "sample_size": 1024, "force_upcast": True},
}


def key_map(config: Mapping[str, Any]) -> list[Rule]:
    """The map of an autoencoder with our config."""
    levels, layers = len(config["block_out_channels"]), config.get("layers_per_block", 1)
    table = rules(OUTSIDE) + rules(HALF, half="encoder") + rules(HALF, half="decoder")
    for level in range(levels):
        ours = levels - 1 - level
        table += rules(DOWNSAMPLE, level=level) + rules(UPSAMPLE, level=level, ours=ours)
        for layer in range(layers):
            old, new = f"encoder.down.{level}.block.{layer}", f"encoder.down_blocks.{level}.resnets.{layer}"
            table += rules(RESNET, old=old, new=new)
        for layer in range(layers + 1):
            old, new = f"decoder.up.{level}.block.{layer}", f"decoder.up_blocks.{ours}.resnets.{layer}"
            table += rules(RESNET, old=old, new=new)
    return table


def infer_config(tensors: Mapping[str, TensorHeader], family: str) -> dict[str, Any]:
    """Our config of a file's autoencoder.

    Args:
        tensors: The file's, without prefix.
        family: `sd`, `sdxl`, `sd3` or `flux`: the scale of the latents.

    Raises:
        ValueError: A key is missing.
    """
    shape = Shapes("autoencoder", tensors)
    levels = max(shape.count("encoder.down.{}.block.0.conv1.weight"), 1)
    widths = [shape(f"encoder.down.{level}.block.0.conv1.weight")[0] for level in range(levels)]
    layers = shape.count("encoder.down.0.block.{}.conv1.weight")
    return {
        "in_channels": shape("encoder.conv_in.weight")[1],
        "out_channels": shape("decoder.conv_out.weight")[0],
        "latent_channels": shape("decoder.conv_in.weight")[1],
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "block_out_channels": widths,
        "layers_per_block": layers,
        "use_quant_conv": "quant_conv.weight" in tensors,
        "use_post_quant_conv": "post_quant_conv.weight" in tensors,
        **LATENTS[family],
    }
