"""Files of IP-Adapters for tiny backbones, key by key as their authors publish them, all weights random.

tensors("plus", unet)       flat, as in a safetensors file; what `save` of tests writes
clip(), siglip()            tiny image encoders and their processors
"""

from typing import Any

import torch
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tests.parity import randomize_

HIDDEN, PROJECTED, FACE = 16, 12, 24
"""Features of the encoders' tokens, of CLIP's projected vector, of a face's embedding"""
HEAD = 64
Shapes = dict[str, tuple[int, ...]]


def encoder_config(**more: int) -> dict[str, int]:
    return {
        "hidden_size": HIDDEN,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
        **more,
    }


def clip() -> tuple[nn.Module, Any]:
    config = CLIPVisionConfig(**encoder_config(projection_dim=PROJECTED))
    return randomize_(CLIPVisionModelWithProjection(config), 11).eval(), CLIPImageProcessor(size=16, crop_size=16)


def siglip() -> tuple[nn.Module, Any]:
    model = SiglipVisionModel(SiglipVisionConfig(**encoder_config()))
    return randomize_(model, 11).eval(), SiglipImageProcessor(size={"height": 16, "width": 16})


def resampler(features: int, width: int, tokens: int, depth: int) -> Shapes:
    found: Shapes = {
        "latents": (1, tokens, width),
        "proj_in.weight": (width, HIDDEN),
        "proj_in.bias": (width,),
        "proj_out.weight": (features, width),
        "proj_out.bias": (features,),
        "norm_out.weight": (features,),
        "norm_out.bias": (features,),
    }
    for i in range(depth):
        found |= {f"layers.{i}.0.{norm}.{part}": (width,) for norm in ("norm1", "norm2") for part in ("weight", "bias")}
        found |= {
            f"layers.{i}.0.to_q.weight": (HEAD, width),
            f"layers.{i}.0.to_kv.weight": (2 * HEAD, width),
            f"layers.{i}.0.to_out.weight": (width, HEAD),
            f"layers.{i}.1.0.weight": (width,),
            f"layers.{i}.1.0.bias": (width,),
            f"layers.{i}.1.1.weight": (4 * width, width),
            f"layers.{i}.1.3.weight": (width, 4 * width),
        }
    return found


def timed(found: Shapes, width: int, waves: int, depth: int) -> Shapes:
    for i in range(depth):
        found |= {f"layers.{i}.2.1.weight": (4 * width, width), f"layers.{i}.2.1.bias": (4 * width,)}
    for name, inputs in (("linear_1", waves), ("linear_2", width)):
        found |= {f"time_embedding.{name}.weight": (width, inputs), f"time_embedding.{name}.bias": (width,)}
    return found


def linear(image_features: int, features: int, tokens: int) -> Shapes:
    return {
        "proj.weight": (tokens * features, image_features),
        "proj.bias": (tokens * features,),
        "norm.weight": (features,),
        "norm.bias": (features,),
    }


def mlp(image_features: int, features: int, tokens: int) -> Shapes:
    inner = 2 * image_features
    return {
        "proj.0.weight": (inner, image_features),
        "proj.0.bias": (inner,),
        "proj.2.weight": (tokens * features, inner),
        "proj.2.bias": (tokens * features,),
        "norm.weight": (features,),
        "norm.bias": (features,),
    }


def full(features: int) -> Shapes:
    return {
        "proj.0.weight": (HIDDEN, HIDDEN),
        "proj.0.bias": (HIDDEN,),
        "proj.2.weight": (features, HIDDEN),
        "proj.2.bias": (features,),
        "proj.3.weight": (features,),
        "proj.3.bias": (features,),
    }


def projection(layout: str, features: int) -> Shapes:
    return {
        "base": lambda: linear(PROJECTED, features, 4),
        "full": lambda: full(features),
        "plus": lambda: resampler(features, 32, 5, depth=4),
        "faceid": lambda: mlp(FACE, features, 4),
        "sd3": lambda: timed(resampler(features, 32, 6, depth=4), 32, 20, depth=4),
        "xlabs": lambda: linear(PROJECTED, features, 4),
        "instantx": lambda: mlp(HIDDEN, features, 7),
    }[layout]()


def shapes(layout: str, backbone: Any) -> Shapes:
    """Of all tensors; `backbone` may be diffusers', whose order of attentions is the published one."""
    attentions = [backbone.get_submodule(name.removesuffix(".processor")) for name in backbone.attn_processors]
    to_text = [getattr(attn, "is_cross_attention", False) for attn in attentions]
    config = backbone.config
    if layout in ("sd3", "instantx"):
        features = attentions[0].inner_dim if layout == "sd3" else config.joint_attention_dim
    elif layout == "xlabs":
        features = config.joint_attention_dim
    else:
        features = next((attn.to_k.in_features for attn, text in zip(attentions, to_text, strict=True) if text), None)
        features = attentions[0].to_k.in_features if features is None else features
    prefix = "ip_adapter_proj_model" if layout == "xlabs" else "image_proj"
    found = {f"{prefix}.{key}": shape for key, shape in projection(layout, features).items()}
    for number, attn in enumerate(attentions):
        width, head = attn.inner_dim, attn.inner_dim // attn.heads
        if layout == "xlabs":
            if number < config.num_layers:
                for one in "kv":
                    name = f"double_blocks.{number}.processor.ip_adapter_double_stream_{one}_proj"
                    found |= {f"{name}.weight": (width, features), f"{name}.bias": (width,)}
            continue
        if layout == "faceid":
            text = attn.to_k.in_features
            for one, (out, inputs) in {"q": (width, width), "k": (width, text), "v": (width, text)}.items():
                found[f"ip_adapter.{number}.to_{one}_lora.down.weight"] = (2, inputs)
                found[f"ip_adapter.{number}.to_{one}_lora.up.weight"] = (out, 2)
            found[f"ip_adapter.{number}.to_out_lora.down.weight"] = (2, width)
            found[f"ip_adapter.{number}.to_out_lora.up.weight"] = (width, 2)
        if any(to_text) and not to_text[number]:
            continue
        found |= {f"ip_adapter.{number}.to_{one}_ip.weight": (width, features) for one in "kv"}
        if layout == "sd3":
            found |= {
                f"ip_adapter.{number}.norm_ip.linear.weight": (2 * features, 32),
                f"ip_adapter.{number}.norm_ip.linear.bias": (2 * features,),
                **{f"ip_adapter.{number}.{norm}.weight": (head,) for norm in ("norm_q", "norm_k", "norm_ip_k")},
            }
    return found


def tensors(layout: str, backbone: Any, seed: int = 0) -> dict[str, torch.Tensor]:
    """All of them, at scales that keep activations around one."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for key, shape in shapes(layout, backbone).items():
        value = torch.randn(shape, generator=generator)
        if len(shape) >= 2:
            value /= shape[-1] ** 0.5
        else:
            value = 0.2 * value + (key.endswith("weight") and 1)
        found[key] = value
    return found
