"""Tiny random pipelines in the layouts of the official repositories, made and saved by diffusers alone.

Every component is of the class that the official `model_index.json` names, with its traits (a v-prediction schedule,
nine input channels, dynamic shifting, ...), tokenizers and text encoders included; only the sizes are small and the
weights random. A picture of 32x32 pixels is 8x8 latents; sizes are multiples of 8 pixels (64 at most for SD3).

    official("sdxl", folder)    # the folder, for `from_pretrained` of either library

Tests take the fixture `official` (tests/conftest.py), which makes each folder once a session: `official("sdxl")`.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from tests.ip_adapter_weights import HIDDEN, siglip
from tests.models import NETWORKS, POOLED, TEXT_WIDTH
from tests.models import WORDS as PIECES
from tests.parity import randomize_

WORDS = [word for word in PIECES if "#" not in word]
START, END = "<|startoftext|>", "<|endoftext|>"
# SD3 pads both CLIPs' states, side by side, to T5's width.
T5_WIDTH = 2 * TEXT_WIDTH
# Pixels of a picture's side per latent.
VAE_FACTOR = 4


def byte_letters() -> list[str]:
    """The 256 printable letters by which byte-level BPE (Radford et al. 2019) writes the bytes, in their order."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def clip_tokenizer(pad_token: str = END) -> CLIPTokenizer:
    """Bytes, `WORDS` as one token each, "!" as token 0 and the end as the last token, as in OpenAI's vocabulary."""
    letters = sorted(byte_letters(), key=lambda letter: (letter != "!", ord(letter)))
    vocab = [*letters, *(letter + "</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            pair = (pieces[-2], pieces[-1])
            if pair not in merges:
                merges.append(pair)
                vocab.append("".join(pair))
            pieces[-2:] = ["".join(pair)]
    ids = {token: i for i, token in enumerate([*vocab, START, END])}
    return CLIPTokenizer(vocab=ids, merges=merges, pad_token=pad_token, model_max_length=77)


def t5_tokenizer() -> T5TokenizerFast:
    """A Unigram model of printable ASCII, `WORDS`, and two of T5's extra tokens."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [("▁" + word, -3.0) for word in WORDS]
    pieces += [(chr(code), -6.0) for code in range(ord("!"), ord("~") + 1)]
    pieces += [("<extra_id_1>", 0.0), ("<extra_id_0>", 0.0)]
    return T5TokenizerFast(vocab=pieces, extra_ids=2, model_max_length=512)


def clip_text(projected: bool = False, seed: int = 1, **config: Any) -> nn.Module:
    """A CLIP text encoder of `TEXT_WIDTH` features; `projected` with the projection to `POOLED` features."""
    tokenizer = clip_tokenizer()
    defaults: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 32,
        "projection_dim": POOLED,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
        # The official configs say 2, which transformers reads as "the end is the token of the highest number".
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }
    cls = CLIPTextModelWithProjection if projected else CLIPTextModel
    return randomize_(cls(CLIPTextConfig(**{**defaults, **config})), seed).eval()


def t5_text(seed: int = 3) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(t5_tokenizer()),
        d_model=T5_WIDTH,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    return randomize_(T5EncoderModel(config), seed).eval()


def vae(**config: Any) -> diffusers.AutoencoderKL:
    """Four pixels a latent."""
    defaults: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (8, 8, 16),
        "sample_size": 32,
    }
    return NETWORKS["KL autoencoder"].build("diffusers", 4, **{**defaults, **config})


def flow_vae(scaling_factor: float, shift_factor: float) -> diffusers.AutoencoderKL:
    """As SD3 and FLUX have it: latents that are shifted, no convolutions next to them."""
    return vae(
        latent_channels=16,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def unet(**config: Any) -> diffusers.UNet2DConditionModel:
    return NETWORKS["SD 1.x"].build("diffusers", 5, **config)


def sdxl_unet(time_ids: int, **config: Any) -> diffusers.UNet2DConditionModel:
    """A U-Net given the pooled text and `time_ids` numbers: 6 of the base (sizes and crop), 5 of the refiner."""
    width = time_ids * 8 + POOLED
    return NETWORKS["SDXL"].build("diffusers", 5, projection_class_embeddings_input_dim=width, **config)


def betas(**config: Any) -> dict[str, Any]:
    """Stable Diffusion's schedule."""
    return {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
        **config,
    }


def sd1_components(**unet_config: Any) -> dict[str, Any]:
    return {
        "vae": vae(),
        "text_encoder": clip_text(),
        "tokenizer": clip_tokenizer(),
        "unet": unet(**unet_config),
        "scheduler": diffusers.PNDMScheduler(**betas(set_alpha_to_one=False, skip_prk_steps=True)),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def sd1() -> diffusers.DiffusionPipeline:
    return diffusers.StableDiffusionPipeline(**sd1_components())


def sd1_inpaint() -> diffusers.DiffusionPipeline:
    """Nine channels: x_t, the mask, the latents of the masked picture."""
    return diffusers.StableDiffusionInpaintPipeline(**sd1_components(in_channels=9))


def sd1_instruct() -> diffusers.DiffusionPipeline:
    """InstructPix2Pix: eight channels, x_t and the latents of the picture that is edited."""
    return diffusers.StableDiffusionInstructPix2PixPipeline(**sd1_components(in_channels=8))


def sd2() -> diffusers.DiffusionPipeline:
    """SD 2.1's traits: OpenCLIP without its last layer, "!" as padding, linear projections, v-prediction."""
    components = sd1_components(use_linear_projection=True, attention_head_dim=(1, 2))
    components |= {
        "text_encoder": clip_text(hidden_act="gelu"),
        "tokenizer": clip_tokenizer(pad_token="!"),
        "scheduler": diffusers.DDIMScheduler(
            **betas(clip_sample=False, set_alpha_to_one=False, prediction_type="v_prediction")
        ),
    }
    return diffusers.StableDiffusionPipeline(**components)


def sdxl_components(time_ids: int, **unet_config: Any) -> dict[str, Any]:
    return {
        "vae": vae(scaling_factor=0.13025, force_upcast=True),
        "text_encoder_2": clip_text(projected=True, seed=2, hidden_act="gelu"),
        "tokenizer_2": clip_tokenizer(pad_token="!"),
        "unet": sdxl_unet(time_ids, **unet_config),
        "scheduler": diffusers.EulerDiscreteScheduler(**betas(timestep_spacing="leading")),
        "add_watermarker": False,
    }


def sdxl() -> diffusers.DiffusionPipeline:
    return diffusers.StableDiffusionXLPipeline(
        text_encoder=clip_text(),
        tokenizer=clip_tokenizer(),
        **sdxl_components(6, cross_attention_dim=2 * TEXT_WIDTH),
    )


def sdxl_instruct() -> diffusers.DiffusionPipeline:
    return diffusers.StableDiffusionXLInstructPix2PixPipeline(
        text_encoder=clip_text(),
        tokenizer=clip_tokenizer(),
        **sdxl_components(6, cross_attention_dim=2 * TEXT_WIDTH, in_channels=8),
    )


def sdxl_refiner() -> diffusers.DiffusionPipeline:
    """The second text encoder alone, and a score of aesthetics beside the sizes."""
    return diffusers.StableDiffusionXLImg2ImgPipeline(
        text_encoder=None, tokenizer=None, requires_aesthetics_score=True, **sdxl_components(5)
    )


def sd3_5() -> diffusers.DiffusionPipeline:
    """SD 3.5-medium: the first block attends twice; queries and keys are normalised."""
    return sd3(dual_attention_layers=(0,), qk_norm="rms_norm")


def sd3(**kind: Any) -> diffusers.DiffusionPipeline:
    """SD 3, or what `kind` makes of its transformer."""
    sizes = {
        "in_channels": 16,
        "out_channels": 16,
        "joint_attention_dim": T5_WIDTH,
        "pooled_projection_dim": 2 * POOLED,
        "pos_embed_max_size": 12,
    }
    transformer = NETWORKS["SD 3"].build("diffusers", 5, **{**sizes, **kind})
    return diffusers.StableDiffusion3Pipeline(
        vae=flow_vae(1.5305, 0.0609),
        text_encoder=clip_text(projected=True, seed=1),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_text(projected=True, seed=2, hidden_act="gelu"),
        tokenizer_2=clip_tokenizer(pad_token="!"),
        text_encoder_3=t5_text(),
        tokenizer_3=t5_tokenizer(),
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def flux(
    guidance_embeds: bool, scheduler: dict[str, Any], cls: Any = diffusers.FluxPipeline, **kind: Any
) -> diffusers.DiffusionPipeline:
    """FLUX.1, or of another class with what `kind` makes of its transformer."""
    sizes = {"in_channels": 64, "joint_attention_dim": T5_WIDTH, "guidance_embeds": guidance_embeds}
    transformer = NETWORKS["FLUX.1 schnell"].build("diffusers", 5, **{**sizes, **kind})
    return cls(
        vae=flow_vae(0.3611, 0.1159),
        text_encoder=clip_text(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_text(),
        tokenizer_2=t5_tokenizer(),
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**scheduler),
    )


def flux_dev() -> diffusers.DiffusionPipeline:
    """Guidance is an input of the network; the timesteps' shift depends on the size. Default size: 512 pixels."""
    return flux(True, {"shift": 3.0, "use_dynamic_shifting": True})


def flux_schnell() -> diffusers.DiffusionPipeline:
    return flux(False, {"shift": 1.0})


def flux_tool(cls: Any, channels: int) -> diffusers.DiffusionPipeline:
    """One of the FLUX.1 tools, whose transformer takes so many channels of latents."""
    return flux(True, {"shift": 3.0, "use_dynamic_shifting": True}, cls, in_channels=4 * channels, out_channels=64)


def flux_control() -> diffusers.DiffusionPipeline:
    """Canny and Depth: x_t and the latents of a hint."""
    return flux_tool(diffusers.FluxControlPipeline, 2 * 16)


def flux_fill() -> diffusers.DiffusionPipeline:
    """x_t, the latents of the masked picture, and all pixels of the mask."""
    return flux_tool(diffusers.FluxFillPipeline, 2 * 16 + VAE_FACTOR**2)


def flux_kontext() -> diffusers.DiffusionPipeline:
    """The transformer of text to image; the picture that is edited comes in as further tokens."""
    return flux_tool(diffusers.FluxKontextPipeline, 16)


def flux_redux(texts: bool = False) -> diffusers.DiffusionPipeline:
    """SigLIP and what makes text tokens of its patches; `texts` with the text encoders that it may have."""
    encoder, extractor = siglip()
    embedder = ReduxImageEncoder(redux_dim=HIDDEN, txt_in_features=T5_WIDTH)
    pair = {"text_encoder": clip_text(), "tokenizer": clip_tokenizer()}
    pair |= {"text_encoder_2": t5_text(), "tokenizer_2": t5_tokenizer()}
    return diffusers.FluxPriorReduxPipeline(
        image_encoder=encoder,
        feature_extractor=extractor,
        image_embedder=randomize_(embedder, 6).eval(),
        **(pair if texts else {}),
    )


# Some words of DiT's 1000; a class can have several names.
CLASSES = {0: "tench, Tinca tinca", 1: "goldfish", 2: "white shark", 3: "hen", 4: "ostrich"}


def dit(scheduler: Any = None, **config: Any) -> diffusers.DiTPipeline:
    """As `facebook/DiT-XL-2-256`: all 1000 classes and the learned variance, fewer and smaller blocks."""
    transformer = NETWORKS["DiT"].build("diffusers", 6, **{"num_embeds_ada_norm": 1000, **config})
    return diffusers.DiTPipeline(
        transformer=transformer,
        vae=vae(),
        scheduler=diffusers.DDIMScheduler(clip_sample=False) if scheduler is None else scheduler,
        id2label=CLASSES,
    )


def pixel_unet(**config: Any) -> diffusers.UNet2DModel:
    """DDPM's traits: padding on two sides only, frequencies to 1/10000, a single head."""
    return NETWORKS["DDPM"].build("diffusers", 5, **config)


def ddpm() -> diffusers.DiffusionPipeline:
    return diffusers.DDPMPipeline(unet=pixel_unet(), scheduler=diffusers.DDPMScheduler(variance_type="fixed_large"))


def ddim() -> diffusers.DiffusionPipeline:
    return diffusers.DDIMPipeline(unet=pixel_unet(), scheduler=diffusers.DDIMScheduler())


def ncsnpp() -> diffusers.DiffusionPipeline:
    """NCSN++ for large pictures: Fourier features of sigma, FIR resampling, a picture beside the features."""
    unet = NETWORKS["NCSN++"].build("diffusers", 5)
    return diffusers.ScoreSdeVePipeline(unet=unet, scheduler=diffusers.ScoreSdeVeScheduler(snr=0.075, sigma_max=348.0))


MAKERS: dict[str, Callable[[], diffusers.DiffusionPipeline]] = {
    "sd1": sd1,
    "sd1-inpaint": sd1_inpaint,
    "sd1-instruct": sd1_instruct,
    "sd2": sd2,
    "sdxl": sdxl,
    "sdxl-instruct": sdxl_instruct,
    "sdxl-refiner": sdxl_refiner,
    "sd3": sd3,
    "sd3.5": sd3_5,
    "flux-dev": flux_dev,
    "flux-schnell": flux_schnell,
    "flux-control": flux_control,
    "flux-fill": flux_fill,
    "flux-kontext": flux_kontext,
    "flux-redux": flux_redux,
    "flux-redux-texts": partial(flux_redux, True),
    "dit": dit,
    "ddpm": ddpm,
    "ddim": ddim,
    "ncsnpp": ncsnpp,
}


def official(name: str, folder: Path) -> Path:
    """Makes the pipeline `name` (a key of `MAKERS`), saves it by diffusers into `folder`, and returns the folder."""
    MAKERS[name]().save_pretrained(folder)
    return folder
