"""Train a captioner, as LLaVA (2304.08485) and ShareGPT4V (2311.12793): a picture in, words out.

    accelerate launch -m hubgen.training.train_captioner --config training/recipes/captioner-emoji.yaml \
        --data.source data/fluent --run.output_dir runs/captioner

    picture -> vision tower -> projector -> language model -> the tokens of the answer, by maximum likelihood

The data are pictures with captions, or the JSON of ShareGPT4V (`--data.source x.json --data.image_root pictures`).
`stage` says what learns: `align` the projector; `pretrain` projector, language model and the upper half of the vision
tower; `instruct` projector and language model, on questions and answers. The same command goes on where it was stopped,
bit for bit. At the end `output_dir/captioner` holds model and processor, which transformers loads, and which
`hubgen data recaption --model` takes.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch

from hubgen.captioning.captioner import (
    Captioner,
    Sizes,
    image_processor,
    open_captioner,
    put_together,
    small_captioner,
)
from hubgen.captioning.card import captioner_card
from hubgen.captioning.stages import TEMPLATES, Stage, set_learning
from hubgen.captioning.templates import SYSTEM
from hubgen.data.cache import module_digest
from hubgen.training.kit.answers import Answers, AskedData, Told, measure, open_told
from hubgen.training.kit.groups import Optim, Publish, RunOptions, need
from hubgen.training.kit.parse import FREE, Range, SettingsError, identity_of
from hubgen.training.kit.pictures import Pictures
from hubgen.training.kit.publishing import about_run, check_push, publish_folder, record_of
from hubgen.training.kit.run import Run
from hubgen.training.kit.script import run_script

READ = 20_000
"""Pictures whose captions the tokenizer of a captioner from scratch is fitted to, at most"""


@dataclass(frozen=True, kw_only=True)
class Base:
    """What learns: a captioner, two parts of one, or, with none of them, a small one from scratch."""

    model: Annotated[str | None, FREE] = None
    """Folder or Hub id of a captioner to go on from, such as llava-hf/llava-1.5-7b-hf."""

    vision_tower: Annotated[str | None, FREE] = None
    """Folder or Hub id of a CLIP or SigLIP vision model that a fresh projector joins to `language_model`."""

    language_model: Annotated[str | None, FREE] = None
    """Folder or Hub id of a causal language model."""

    image_size: Annotated[int, Range(8)] = 64
    """From scratch: pixels of a side that pictures are brought to."""

    patch_size: Annotated[int, Range(1)] = Sizes.patch
    """From scratch: pixels of a side of a patch, each of which becomes a token."""

    width: Annotated[int, Range(8)] = Sizes.width
    """From scratch: features of vision tower and language model."""

    layers: Annotated[int, Range(2)] = Sizes.layers
    """From scratch: blocks of each of the two."""

    heads: Annotated[int, Range(1)] = Sizes.heads
    """From scratch: of their attention."""

    vocabulary: Annotated[int, Range(1)] = Sizes.vocabulary
    """From scratch: tokens at most, fitted to the captions, the 256 bytes among them."""


@dataclass(frozen=True, kw_only=True)
class CaptionValidation:
    """What is measured beside the training."""

    split: str | None = None
    """Split that is measured; none if not given."""

    source: str | None = None
    """Where it is, such as a second file of conversations; the data's own source if not given."""

    steps: Annotated[int, Range(1)] = 1000
    """Steps between validations."""

    pictures: Annotated[int, Range(1)] = 256
    """Pictures that are measured, at most."""

    max_new_tokens: Annotated[int, Range(1)] = 256
    """Tokens of a caption, at most."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a run: groups of a YAML recipe, and options of the command line."""

    stage: Stage = "pretrain"
    """What learns, and how conversations are written: align, pretrain, instruct."""

    base: Base = Base()
    data: AskedData
    optim: Optim = Optim(learning_rate=2e-5, weight_decay=0.0, betas=(0.9, 0.999), ema_decay=None)
    run: RunOptions
    validation: Annotated[CaptionValidation, FREE] = CaptionValidation()
    publish: Annotated[Publish, FREE] = Publish(dtype="float32", summary="A captioner trained with hubgen.")

    def __post_init__(self) -> None:
        base = self.base
        parts = (base.vision_tower is None, base.language_model is None)
        need(parts[0] == parts[1], "base.vision_tower", base.vision_tower, "it and base.language_model, or neither")
        alone = base.model is None or all(parts)
        need(alone, "base.model", base.model, "it alone, or base.vision_tower with base.language_model")


def main(settings: Settings) -> None:
    """Trains from the settings, going on where an earlier run of them stopped."""
    s, run = settings, Run(settings.run)
    check_push(s.publish)

    # The pictures, and the captioner that reads them
    pictures, others = open_told(s.data, s.data.split, s.run.seed), None
    if s.validation.split is not None or s.validation.source is not None:
        shown = replace(s.data, source=s.validation.source or s.data.source)
        others = open_told(shown, s.validation.split or s.data.split, 0, train=False)
    captioner = begun(s, pictures)
    template, longest = TEMPLATES[s.stage], min(s.data.max_tokens, captioner.longest)
    told = Told(pictures, captioner, template, s.data, longest)
    held_out = None if others is None else Told(others, captioner, template, s.data, longest)
    told.check()
    from_scratch = s.base.model is None and s.base.vision_tower is None
    base = {} if from_scratch else {"base": module_digest(captioner.model)}
    run.open({"settings": identity_of(s), **base, "data": pictures.examples.fingerprint}, s.optim)

    set_learning(captioner.model, s.stage)
    answers = Answers(captioner.model)
    trained = run.trains("captioner", captioner.model, s.optim, answers)
    row = told.row(run.batch_size)
    run.describe(len(row), *pictures.examples.left_out())
    run.restore()

    def validate(step: int) -> None:
        with trained.averaged():
            if held_out is not None:
                values = measure(run, answers, held_out, s.validation.pictures, s.validation.max_new_tokens)
                run.report(step, values)
                run.progress.write(f"step {step}: " + ", ".join(f"{name} {one:.4f}" for name, one in values.items()))

    shares = run.world_size * s.run.gradient_accumulation_steps
    batches = run.batches(row, told.read, s.data.num_workers)
    for step in run.steps(validate, s.validation.steps, "held_out_loss" if held_out else ""):
        for draws, batch in run.micro_batches(batches):
            total = trained.module(*batch.to(run.device))
            trained.backward(total * shares / batch.of_step, pictures.names(draws))
            run.window.note("loss", total, batch.tokens)
        run.update(step)

    trained.settle()
    record = record_of(run, "hubgen.training.train_captioner", s, pictures, s.data.source, "held_out_loss")

    def write(folder: Path) -> None:
        folder.mkdir()
        captioner.model.to(dtype=getattr(torch, s.publish.dtype))
        captioner.save(folder)
        record.save(folder)
        card = captioner_card(about_run(run, folder, s.publish, {"captioner": record}, ()), record, captioner)
        (folder / "README.md").write_text(card, encoding="utf-8")

    publish_folder(run, "captioner", "captioner", s.publish, write)
    run.finish()


def begun(settings: Settings, pictures: Pictures) -> Captioner:
    """The captioner that the run begins with, whose processor treats pictures as the stage does."""
    base = settings.base
    template = TEMPLATES[settings.stage]
    try:
        if base.model is not None:
            captioner = open_captioner(base.model)
        elif base.vision_tower is not None and base.language_model is not None:
            captioner = put_together(base.vision_tower, base.language_model)
        else:
            captions = pictures.examples.captions
            texts = [wording for row in range(min(len(captions), READ)) for wording in captions[row]]
            sizes = Sizes(base.patch_size, base.width, base.layers, base.heads, base.vocabulary)
            captioner = small_captioner([*texts, settings.data.prompt, SYSTEM], base.image_size, sizes)
        ends = template.end_tokens(captioner.tokenizer)
    except ValueError as error:
        raise SettingsError(f"setting 'base': {error}") from error
    processor = captioner.processor
    processor.chat_template = template.chat
    side, padded = captioner.model.config.vision_config.image_size, settings.stage == "instruct"
    processor.image_processor = image_processor(side, processor.image_processor, padded)
    captioner.model.generation_config.eos_token_id = ends
    return captioner


if __name__ == "__main__":
    run_script(main, Settings, description=__doc__)
