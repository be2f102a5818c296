"""The README.md of a captioner."""

from huggingface_hub import ModelCardData

from hubgen.captioning.captioner import Captioner
from hubgen.hub.card import About, describe_record, measured, one_line, quoted
from hubgen.hub.records import TrainingRecord, languages_of

TASK = "image-text-to-text"
"""As the Hub names it"""


def captioner_card(about: About, record: TrainingRecord, captioner: Captioner) -> str:
    """The README.md of a captioner.

    Args:
        about: What every card says.
        record: How it was trained.
        captioner: It.
    """
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag=TASK,
        license=about.licence,
        language=languages_of([record]) or None,
        base_model=record.base_model,
        datasets=record.dataset,
        tags=["hubgen", TASK, "llava"],
    )
    vision, language = captioner.model.config.vision_config, captioner.model.config.text_config
    prompt = None if captioner.processor.chat_template is None else str(record.settings["data"]["prompt"])
    asked = (
        '"<image>"'
        if prompt is None
        else f"processor.apply_chat_template({_messages(prompt)}, add_generation_prompt=True)"
    )
    lines = [
        "---",
        metadata.to_yaml(),
        "---",
        f"# {one_line(about.title)}",
        "",
        about.summary.strip(),
        "",
        "```bash",
        f"hubgen data recaption shards --model {about.place}",
        "```",
        "",
        "```python",
        "from PIL import Image",
        "from transformers import AutoProcessor, LlavaForConditionalGeneration",
        "",
        f"model = LlavaForConditionalGeneration.from_pretrained({quoted(about.place)})",
        f"processor = AutoProcessor.from_pretrained({quoted(about.place)})",
        f"text = {asked}",
        'inputs = processor(text=[text], images=[Image.open("picture.png").convert("RGB")], return_tensors="pt")',
        "tokens = model.generate(**inputs, max_new_tokens=256)[0, inputs.input_ids.shape[1] :]",
        "print(processor.decode(tokens, skip_special_tokens=True).strip())",
        "```",
        "",
        f"Pictures of {vision.image_size}x{vision.image_size} pixels become {captioner.image_tokens} tokens; "
        f"vision tower of {vision.num_hidden_layers} blocks, language model of {language.num_hidden_layers}; "
        f"{sum(one.numel() for one in captioner.model.parameters()):,} parameters.",
        "",
        *measured([record]),
        "",
        "## Training",
        "",
        *describe_record(record, next(iter(about.curves.values()), None)),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _messages(prompt: str) -> str:
    return f'[{{"role": "user", "content": [{{"type": "image"}}, {{"type": "text", "text": {quoted(prompt)}}}]}}]'
