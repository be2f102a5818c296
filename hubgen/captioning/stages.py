"""What of a captioner learns: the stages of LLaVA and of ShareGPT4V.

    align      the projector alone (LLaVA's first stage, 2304.08485)
    pretrain   projector, language model, and the upper half of the vision tower (ShareGPT4V, 2311.12793, section 3.3)
    instruct   projector and language model; the vision tower is frozen (the second stage of both)

A vision tower is read at one of its layers, the last but one in CLIP's case. What lies behind that layer gives nothing
to the answer and gets no gradient: the last block, and the norm after it. They are left out, so that the parameters
that learn are exactly those that have a gradient, which data parallelism needs to know.
"""

from typing import Any, Literal, TypeAlias

from torch import nn

from hubgen.captioning.templates import PLAIN, V1, Template

Stage: TypeAlias = Literal["align", "pretrain", "instruct"]
TEMPLATES: dict[Stage, Template] = {"align": PLAIN, "pretrain": PLAIN, "instruct": V1}
"""How a stage writes its conversations"""


def set_learning(model: Any, stage: Stage) -> list[str]:
    """Has the parameters of a stage want a gradient, and no others.

    Args:
        model: A `LlavaForConditionalGeneration`.
        stage: Which.

    Returns:
        Their names.
    """
    learning: list[nn.Module] = [model.model.multi_modal_projector]
    if stage != "align":
        learning += [model.model.language_model, model.lm_head]
    if stage == "pretrain":
        learning += learning_blocks(model)
    model.requires_grad_(False)
    for part in learning:
        part.requires_grad_(True)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def learning_blocks(model: Any) -> list[nn.Module]:
    """The blocks of the vision tower from the middle on (12 of 24) up to the layer that is read."""
    config = model.config
    blocks = blocks_of(model.model.vision_tower, config.vision_config.num_hidden_layers)
    layers = config.vision_feature_layer
    # Layer 0 are the embeddings, layer n what block n - 1 gives.
    read = [layer % (len(blocks) + 1) for layer in ([layers] if isinstance(layers, int) else layers)]
    return blocks[len(blocks) // 2 : max(read)]


def blocks_of(tower: nn.Module, number: int) -> list[nn.Module]:
    """The blocks of a vision tower of transformers, in order.

    Args:
        tower: It.
        number: Of them.

    Raises:
        ValueError: It has no list of as many.
    """
    for module in tower.modules():
        if isinstance(module, nn.ModuleList) and len(module) == number:
            return list(module)
    raise ValueError(f"`tower`: got {type(tower).__name__}, expected a vision tower with a list of {number} blocks.")
