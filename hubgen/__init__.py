"""Diffusion and flow-matching image models as Hugging Face components.

    autoencoders/    pixels <-> latents: KL and VQ; perceptual loss and patch discriminator for its training
    layers/          the small parts that two models share: attention and its processors, residual blocks, norms
    backbones/       (x_t, t, condition) -> prediction: U-Nets, DiT, MM-DiT (SD3, Flux)
    paths/           x_t and its target: probability paths, prediction types, timestep densities, loss weightings
    schedulers/      the way back: DDPM, DDIM, score SDE, flow-match Euler and Heun
    conditioning/    prompts, classes, sizes -> conditions; families/, how each backbone is called; guidance
    controls/        what steers a call from outside, whatever the backbone: ControlNet, IP-Adapter, inpainting
    acceleration/    the same results in less time: packed weights, Winograd's convolutions, what is computed once
    data/            image-text data: folders with metadata.jsonl, the emoji builder, caches
    formats/         checkpoint files: strict checks, the original layouts of single files
    hub/             models by name, the bundled one, model cards, hubgen's classes in diffusers' loader
    pipelines/       prompt -> embeddings -> denoising loop -> decode, one file a pipeline
    training/        one script a task, run by `accelerate launch`
    cli/             the `hubgen` command
    spaces/          Gradio pages, one folder a Space

Imports point one way: spaces, cli, training, pipelines, then the rest; `layers` and `paths` are the ground.

`import hubgen` is light: the public names below load when first used. It also tells diffusers' loader where hubgen's
classes are, so that `diffusers.DiffusionPipeline.from_pretrained` loads what hubgen saved.
"""

import importlib
from typing import TYPE_CHECKING, Any

from hubgen.hub.registration import register

if TYPE_CHECKING:
    from hubgen.acceleration.optimize import optimize as optimize
    from hubgen.acceleration.optimize import restore as restore
    from hubgen.adaptation.widening import widen as widen
    from hubgen.autoencoders.autoencoder_kl import AutoencoderKL as AutoencoderKL
    from hubgen.autoencoders.efficientnet import EfficientNetLite0 as EfficientNetLite0
    from hubgen.autoencoders.vq_model import VQModel as VQModel
    from hubgen.backbones.controlnet import ControlNetModel as ControlNetModel
    from hubgen.backbones.controlnet_dit import DiTControlNetModel as DiTControlNetModel
    from hubgen.backbones.controlnet_flux import FluxControlNetModel as FluxControlNetModel
    from hubgen.backbones.controlnet_sd3 import SD3ControlNetModel as SD3ControlNetModel
    from hubgen.backbones.controlnet_union import ControlNetUnionModel as ControlNetUnionModel
    from hubgen.backbones.dit import DiTTransformer2DModel as DiTTransformer2DModel
    from hubgen.backbones.flux import FluxTransformer2DModel as FluxTransformer2DModel
    from hubgen.backbones.sd3 import SD3Transformer2DModel as SD3Transformer2DModel
    from hubgen.backbones.t2i_adapter import T2IAdapter as T2IAdapter
    from hubgen.backbones.unet import UNet2DModel as UNet2DModel
    from hubgen.backbones.unet_condition import UNet2DConditionModel as UNet2DConditionModel
    from hubgen.conditioning.guidance import ClassifierFreeGuidance as ClassifierFreeGuidance
    from hubgen.conditioning.guidance import PictureGuidance as PictureGuidance
    from hubgen.conditioning.text import TextCondition as TextCondition
    from hubgen.conditioning.text import TextEmbeddings as TextEmbeddings
    from hubgen.controls.attention_maps import AttentionMaps as AttentionMaps
    from hubgen.controls.controlnet import ControlNet as ControlNet
    from hubgen.controls.image_encoders import PooledLatents as PooledLatents
    from hubgen.controls.ip_adapter import IPAdapter as IPAdapter
    from hubgen.controls.null_text import NullText as NullText
    from hubgen.controls.prompt_to_prompt import PromptToPrompt as PromptToPrompt
    from hubgen.controls.redux import Redux as Redux
    from hubgen.controls.redux import ReduxImageEncoder as ReduxImageEncoder
    from hubgen.hub.bundled import bundled_model as bundled_model
    from hubgen.paths.continuous import CosinePath as CosinePath
    from hubgen.paths.continuous import EdmPath as EdmPath
    from hubgen.paths.continuous import VarianceExplodingPath as VarianceExplodingPath
    from hubgen.paths.path import RectifiedFlowPath as RectifiedFlowPath
    from hubgen.paths.path import VariancePreservingPath as VariancePreservingPath
    from hubgen.paths.timesteps import LogitNormalDensity as LogitNormalDensity
    from hubgen.paths.timesteps import UniformDensity as UniformDensity
    from hubgen.pipelines.class_to_image import ClassToImagePipeline as ClassToImagePipeline
    from hubgen.pipelines.text_to_image import TextToImagePipeline as TextToImagePipeline
    from hubgen.pipelines.unconditional import UnconditionalPipeline as UnconditionalPipeline
    from hubgen.schedulers.annealed_langevin import AnnealedLangevinScheduler as AnnealedLangevinScheduler
    from hubgen.schedulers.ddim import DDIMScheduler as DDIMScheduler
    from hubgen.schedulers.ddpm import DDPMScheduler as DDPMScheduler
    from hubgen.schedulers.flow_match_euler import FlowMatchEulerDiscreteScheduler as FlowMatchEulerDiscreteScheduler
    from hubgen.schedulers.flow_match_heun import FlowMatchHeunDiscreteScheduler as FlowMatchHeunDiscreteScheduler
    from hubgen.schedulers.flow_match_midpoint import FlowMatchFireFlowScheduler as FlowMatchFireFlowScheduler
    from hubgen.schedulers.flow_match_midpoint import FlowMatchMidpointScheduler as FlowMatchMidpointScheduler
    from hubgen.schedulers.score_sde_ve import ScoreSdeVeScheduler as ScoreSdeVeScheduler

HOMES = {
    "AnnealedLangevinScheduler": "hubgen.schedulers.annealed_langevin",
    "AttentionMaps": "hubgen.controls.attention_maps",
    "AutoencoderKL": "hubgen.autoencoders.autoencoder_kl",
    "ClassToImagePipeline": "hubgen.pipelines.class_to_image",
    "ClassifierFreeGuidance": "hubgen.conditioning.guidance",
    "ControlNet": "hubgen.controls.controlnet",
    "ControlNetModel": "hubgen.backbones.controlnet",
    "ControlNetUnionModel": "hubgen.backbones.controlnet_union",
    "CosinePath": "hubgen.paths.continuous",
    "DDIMScheduler": "hubgen.schedulers.ddim",
    "DDPMScheduler": "hubgen.schedulers.ddpm",
    "DiTControlNetModel": "hubgen.backbones.controlnet_dit",
    "DiTTransformer2DModel": "hubgen.backbones.dit",
    "EdmPath": "hubgen.paths.continuous",
    "EfficientNetLite0": "hubgen.autoencoders.efficientnet",
    "FlowMatchEulerDiscreteScheduler": "hubgen.schedulers.flow_match_euler",
    "FlowMatchFireFlowScheduler": "hubgen.schedulers.flow_match_midpoint",
    "FlowMatchHeunDiscreteScheduler": "hubgen.schedulers.flow_match_heun",
    "FlowMatchMidpointScheduler": "hubgen.schedulers.flow_match_midpoint",
    "FluxControlNetModel": "hubgen.backbones.controlnet_flux",
    "FluxTransformer2DModel": "hubgen.backbones.flux",
    "IPAdapter": "hubgen.controls.ip_adapter",
    "LogitNormalDensity": "hubgen.paths.timesteps",
    "NullText": "hubgen.controls.null_text",
    "PictureGuidance": "hubgen.conditioning.guidance",
    "PooledLatents": "hubgen.controls.image_encoders",
    "PromptToPrompt": "hubgen.controls.prompt_to_prompt",
    "RectifiedFlowPath": "hubgen.paths.path",
    "Redux": "hubgen.controls.redux",
    "ReduxImageEncoder": "hubgen.controls.redux",
    "SD3ControlNetModel": "hubgen.backbones.controlnet_sd3",
    "SD3Transformer2DModel": "hubgen.backbones.sd3",
    "ScoreSdeVeScheduler": "hubgen.schedulers.score_sde_ve",
    "T2IAdapter": "hubgen.backbones.t2i_adapter",
    "TextCondition": "hubgen.conditioning.text",
    "TextEmbeddings": "hubgen.conditioning.text",
    "TextToImagePipeline": "hubgen.pipelines.text_to_image",
    "UNet2DConditionModel": "hubgen.backbones.unet_condition",
    "UNet2DModel": "hubgen.backbones.unet",
    "UnconditionalPipeline": "hubgen.pipelines.unconditional",
    "UniformDensity": "hubgen.paths.timesteps",
    "VQModel": "hubgen.autoencoders.vq_model",
    "VarianceExplodingPath": "hubgen.paths.continuous",
    "VariancePreservingPath": "hubgen.paths.path",
    "bundled_model": "hubgen.hub.bundled",
    "optimize": "hubgen.acceleration.optimize",
    "restore": "hubgen.acceleration.optimize",
    "widen": "hubgen.adaptation.widening",
}
# diffusers' loader looks for the base classes of a component in the component's library.
BASE_CLASSES = {
    "DiffusionPipeline": "diffusers.pipelines.pipeline_utils",
    "ModelMixin": "diffusers.models.modeling_utils",
    "SchedulerMixin": "diffusers.schedulers.scheduling_utils",
}

__all__ = ["__version__", *HOMES]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("hubgen")
    elif (home := HOMES.get(name) or BASE_CLASSES.get(name)) is not None:
        value = getattr(importlib.import_module(home), name)
    else:
        raise AttributeError(f"module 'hubgen' has no attribute '{name}'")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register(pipelines=("ClassToImagePipeline", "TextToImagePipeline", "UnconditionalPipeline"))
