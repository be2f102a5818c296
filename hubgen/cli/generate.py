"""`hubgen generate`: pictures by any pipeline, written with what is needed to make them again."""

from __future__ import annotations

import argparse
import dataclasses
import math
import secrets
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubgen.cli.added import asked_or_used, find_again, put_on, stay_offline
from hubgen.cli.arguments import (
    add_command,
    control,
    count,
    file_and_weight,
    file_and_word,
    finite,
    fraction,
    positive,
    seed,
    size,
)
from hubgen.cli.messages import few_lines, say
from hubgen.hub.added import asked_embeddings, asked_loras, check_loras, words_of
from hubgen.hub.finding import BUNDLED, find_model, loaded_commit, read_index
from hubgen.hub.provenance import (
    DTYPES,
    FORMATS,
    LARGEST_SEED,
    USED,
    Request,
    UsedControl,
    read_request,
    slug,
    versions,
    write_picture,
)

if TYPE_CHECKING:
    import torch
    from PIL import Image

PICTURES = {"image": "image", "mask": "mask_image", "control_image": "control_image"}
"""Options that name a picture's file, and what pipelines call them"""
GENERATE_DESCRIPTION = """\
Make a picture of each prompt and write it to a file. Several prompts, or -n above 1, give one picture with a grid:
with both, a row for each prompt.

--model takes the folder or repository of any pipeline that hubgen reads: Stable Diffusion 1.x, 2.x, XL, 3 and 3.5,
FLUX.1 and hubgen's own draw prompts; with DiT a prompt is the name or number of a class; DDPM and NCSN++ take none.
It also takes a single .safetensors file in an original layout, with tokenizers and configs from --config.
--image starts from a picture instead of noise, and --mask names the part of it that is drawn anew. Models that edit
(InstructPix2Pix, UltraEdit, FLUX.1 Kontext) are shown --image, and the prompt tells them what to change; those of hints
(FLUX.1 Canny and Depth) are shown --control-image.
--lora puts an adapter on the model, in any layout that people trade (diffusers, PEFT, kohya, ComfyUI, ...), and :0.8
behind its name says how much it counts; given several times, all of them count.

A PNG carries the prompts, the seed and all settings in its text chunk `hubgen` (JSON); --from reads them back, and
refuses an adapter whose file is no longer the same.
"""

GENERATE_EPILOG = """\
examples:
  hubgen generate "a smiling cat" --out cat.png
  hubgen generate "a red apple" "a green apple" "a blue apple" -n 4 --seed 7 --out apples.png
  hubgen generate "a house by the sea" --model runs/my-model --num-inference-steps 50 --guidance-scale 5 --out house.png
  hubgen generate "a watercolour" --model owner/model --image photo.png --strength 0.6 --out painted.png
  hubgen generate "a hat" --model owner/model --image photo.png --mask head.png --out hat.png
  hubgen generate "make it night" --model timbrooks/instruct-pix2pix --image photo.png --out night.png
  hubgen generate "a cat" --model v1-5.safetensors --config my/sd15-folder --out cat.png
  hubgen generate "a cat" --lora style.safetensors:0.8 --lora owner/name --out cat.png
  hubgen generate "a red house" --model owner/model --control owner/canny=edges.png:0.8:0-0.6 --out house.png
  hubgen generate "golden retriever" --model facebook/DiT-XL-2-256 --out dog.png
  hubgen generate --model google/ddpm-cifar10-32 -n 16 --out samples.png
  hubgen generate --from cat.png                           the same picture, written beside it under a new name
  hubgen generate --from cat.png --seed 8 --out other.png  the same settings, another seed
  hubgen generate --from cat.png --lora none               the same without its adapters

Picture j of a prompt (from 0) is drawn from seed + j, so each cell of a grid can be made again alone.
The same command gives the same picture on the same machine; other hardware or library versions round differently.

exit status:
  0 done, 2 bad arguments or files (one line says what), 130 interrupted, 1 a fault in hubgen
"""


def add_generate(commands: Any) -> None:
    """Adds `hubgen generate` to the command line."""
    parser = add_command(
        commands,
        "generate",
        summary="make pictures from prompts",
        description=GENERATE_DESCRIPTION,
        epilog=GENERATE_EPILOG,
    )
    # No defaults here: None says "not given", so that --from can tell what to override.
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="what the picture shows; several give a grid")
    parser.add_argument(
        "--image", type=Path, metavar="FILE", help="a picture to start from, instead of noise, or to edit"
    )
    parser.add_argument(
        "--mask",
        type=Path,
        metavar="FILE",
        help="white, or opaque in a picture with transparent parts, where --image is drawn anew",
    )
    parser.add_argument(
        "--max-pixels",
        type=count,
        metavar="N",
        help="pixels of --image, --mask and --control-image at most (default: 100 million)",
    )
    parser.add_argument(
        "--control-image", type=Path, metavar="FILE", help="a hint that the model itself is shown (FLUX.1 Canny, Depth)"
    )
    parser.add_argument(
        "--strength",
        type=fraction,
        metavar="X",
        help="how much of --image is drawn over: above 0, at most 1 (default: the pipeline's)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="the picture to write: .png, .jpg or .webp (default: a new PNG named after the prompt)",
    )
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="FILE",
        help="repeat a PNG that hubgen wrote; options given beside it override what the file says",
    )
    parser.add_argument(
        "--model", metavar="MODEL", help="a pipeline folder, or owner/name on the Hub (default: the bundled model)"
    )
    parser.add_argument(
        "--config",
        metavar="MODEL",
        help="for a single file: the pipeline folder or owner/name that has its tokenizers and configs "
        "(default: the official repository of its family)",
    )
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a model on the Hub")
    parser.add_argument(
        "--lora",
        type=file_and_weight,
        action="append",
        metavar="FILE[:WEIGHT]",
        help="an adapter: a .safetensors file, a folder with one, or owner/name on the Hub; may be given several times "
        "(default weight: 1; none: none, beside --from)",
    )
    parser.add_argument(
        "--embedding",
        type=file_and_word,
        action="append",
        metavar="FILE[=WORD]",
        help="a learned word (textual inversion) that prompts may use: a .safetensors file, a folder with one, or "
        "owner/name on the Hub; may be given several times (default word: the file's own; none: none, beside --from)",
    )
    parser.add_argument(
        "--control",
        type=control,
        action="append",
        metavar="NET=PICTURE[:SCALE[:START-END]]",
        help="steers by a picture: NET is the folder, file or owner/name of a ControlNet or T2I-adapter, for which "
        "PICTURE is a hint (`hubgen data hints`), or of an IP-Adapter or FLUX.1 Redux, which show it to the model, or "
        "`model` for the model's own ControlNet; START and END are shares of the steps; may be given several times",
    )
    parser.add_argument("--negative-prompt", metavar="TEXT", help="what the picture should not show (default: nothing)")
    parser.add_argument(
        "-n",
        "--num-images-per-prompt",
        dest="n",
        type=positive,
        metavar="N",
        help="pictures of each prompt (default: 1)",
    )
    parser.add_argument(
        "--num-inference-steps", type=positive, metavar="N", help="steps from noise to picture (default: the model's)"
    )
    parser.add_argument(
        "--guidance-scale",
        type=finite,
        metavar="X",
        help="how strongly the prompt steers; 1 is no guidance (default: the model's)",
    )
    parser.add_argument(
        "--image-guidance-scale",
        type=finite,
        metavar="X",
        help="how near the picture stays to --image, for models that edit (default: 1.5)",
    )
    parser.add_argument("--seed", type=seed, metavar="N", help="start of the random numbers (default: drawn, and told)")
    parser.add_argument(
        "--size", type=size, metavar="N or WxH", help="pixels of each picture (default: what the model was trained for)"
    )
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps (default: the fastest there is)")
    parser.add_argument("--dtype", choices=DTYPES, help="precision (default: float32; bfloat16 on cuda)")
    parser.add_argument("--batch-size", type=positive, metavar="N", help="pictures made at a time (default: 8)")
    parser.set_defaults(run=generate)


def generate(arguments: argparse.Namespace) -> None:
    """`hubgen generate`: prompts to a picture file."""
    started = time.perf_counter()
    source = None
    if arguments.source is not None:
        source, made_with = read_request(arguments.source)
        tell_other_versions(arguments.source, made_with)

    def chosen(name: str, default: Any = None) -> Any:
        """What the command line says, else what the picture to repeat says, else the default."""
        return first_given(getattr(arguments, name), getattr(source, name, None), default)

    model = chosen("model", BUNDLED)
    if source is not None and source.model != model:
        source = dataclasses.replace(source, width=None, height=None, revision=None)  # those belong to its model
    prompts = check_prompts(arguments.prompts or (source.prompts if source else []))
    if len(arguments.prompts) > 2 and all(word.isalpha() for word in prompts):
        say(f'{len(prompts)} prompts of one word each give a grid; for one picture, quote them: "{" ".join(prompts)}"')
    out = check_out(arguments.out or default_out(prompts[0] if prompts else model, arguments.source))
    told = f"--from {arguments.source}: its " if source is not None else ""
    check_comes_with_image(chosen("image"), mask=chosen("mask"), strength=chosen("strength"))
    opened = opened_pictures(
        {name: chosen(name) for name in PICTURES},
        arguments.max_pixels,
        {name: told for name in PICTURES if getattr(arguments, name) is None},
    )
    controls = asked_controls(arguments.control, source)
    hints = opened_hints(controls, arguments.max_pixels, told if arguments.control is None else "")
    folder, config = find_model(model, "--model"), chosen("config")
    single_file = folder is not None and folder.is_file()
    if config is not None and not single_file:
        raise ValueError(f"--config {config}: for single .safetensors files; {model} is none")
    if folder is not None and arguments.revision is not None:
        raise ValueError(f"--revision {arguments.revision}: for models on the Hub; {model} is here")
    asked_lora, used_lora = asked_or_used(arguments.lora, getattr(source, "lora", None))
    asked_word, used_word = asked_or_used(arguments.embedding, getattr(source, "embedding", None))
    if folder is not None and (not single_file or Path(config or "").expanduser().is_dir()):
        names = [file for file, _ in (*asked_lora, *asked_word)]
        nets = [one.net for one in controls if one.net != "model"]
        stay_offline([*names, *nets, *(one.file for one in (*used_lora, *used_word))])
    loras = [*asked_loras(asked_lora, "--lora"), *find_again(used_lora, told)]
    embeddings = [*asked_embeddings(asked_word, "--embedding"), *find_again(used_word, told)]
    for embedding in embeddings:
        words_of(embedding)  # a damaged file is told before the model is loaded
    if folder is not None and not prompts:
        for kind in KINDS:  # what can be said without loading anything is said at once
            if kind.draws and read_index(model, None, folder, "--model")["_class_name"] == kind.pipeline:
                raise ValueError(f"no prompt: {kind.draws}")
    n, seed = chosen("n", 1), chosen("seed", secrets.randbelow(2**32))
    if seed + n - 1 > LARGEST_SEED:
        raise ValueError(f"--seed {seed} with -n {n}: the last picture's seed would be above 2^63 - 1")

    say(f"loading {'the bundled model' if model == BUNDLED else model} ...")
    from hubgen.acceleration.device import choose_device

    device, dtype = choose_device(chosen("device"), chosen("dtype"), "--device")
    width, height = arguments.size or ((source.width, source.height) if source else (None, None))
    request = Request(
        prompts=prompts,
        negative_prompt=chosen("negative_prompt"),
        n=n,
        num_inference_steps=chosen("num_inference_steps"),
        guidance_scale=chosen("guidance_scale"),
        seed=seed,
        width=width,
        height=height,
        model=model,
        revision=chosen("revision"),
        device=device,
        dtype=dtype,
        batch_size=chosen("batch_size", 8),
        image=None if chosen("image") is None else str(chosen("image")),
        mask=None if chosen("mask") is None else str(chosen("mask")),
        strength=chosen("strength"),
        config=config,
        lora=[lora.used for lora in loras] or None,
        embedding=[one.used for one in embeddings] or None,
        control=controls or None,
        control_image=None if chosen("control_image") is None else str(chosen("control_image")),
        image_guidance_scale=chosen("image_guidance_scale"),
    )
    with few_lines():
        from hubgen.hub.bare import bare_parts
        from hubgen.pipelines.loading import load_pipeline

        index = read_index(model, request.revision, folder, "--model")
        kind = kind_of(index, request)
        check_names(controls, index)
        check_size(index, request, folder)
        if loras and not single_file:
            check_loras(loras, bare_parts(index, model, request.revision, folder, argument="--model"))
        pipe = load_pipeline(
            index, model, request.revision, folder, config=config, dtype=request.dtype, argument="--model"
        )
        put_on(pipe, loras, embeddings)
        pipe = pipe.to(request.device)
        if controls:
            opened["controls"] = opened_controls(controls, hints, pipe)
        request = complete(kind, request, pipe)
        if folder is None:
            request = dataclasses.replace(request, revision=loaded_commit(model, request.revision))
        loaded = time.perf_counter()
        say(f"loaded in {loaded - started:.1f} s; {describe(request)}")
        pictures = sample(kind, pipe, request, opened)
        request = dataclasses.replace(request, width=pictures[0].width, height=pictures[0].height)
    sampled = time.perf_counter()
    write_picture(out, grid(pictures, max(len(prompts), 1), n), request)
    if out.suffix.lower() != ".png":
        say(f"{out.suffix} files carry no settings: only a .png can be repeated with --from")
    pictures_made = f"{len(pictures)} {'picture' if len(pictures) == 1 else 'pictures'}"
    print(
        f"wrote {out} ({pictures_made} of {request.width}x{request.height}, seed {seed}, "
        f"sampled in {sampled - loaded:.1f} s, {time.perf_counter() - started:.1f} s in all)"
    )


def check_prompts(prompts: list[str]) -> list[str]:
    """Raises UsageError for a prompt that is empty or no text; returns all."""
    for number, prompt in enumerate(prompts, start=1):
        if not prompt.strip():
            raise ValueError(f"prompt {number} of {len(prompts)} is empty; expected words")
        if not prompt.isascii() and prompt.encode("utf-8", "replace").decode() != prompt:
            raise ValueError(f"prompt {number} of {len(prompts)} is not valid UTF-8 text")
    return prompts


def check_comes_with_image(image: Any, **options: Any) -> None:
    """Raises ValueError for what makes no sense without --image."""
    for name, value in options.items():
        if value is not None and image is None:
            raise ValueError(f"--{name} {value}: comes with --image, which is not given")


def opened_pictures(
    options: Mapping[str, Any], max_pixels: int | None = None, told: Mapping[str, str] | None = None
) -> dict[str, Image.Image]:
    """The files of options in `PICTURES` as pictures, under the pipeline's names.

    Args:
        options: By option, the file or None.
        max_pixels: See `decode_picture`; None for its default.
        told: By option, what messages say before its name: where it is from, if not from the command line.

    Raises:
        DataError: A file cannot be read, or holds no picture that can.
    """
    from hubgen.data.pictures import MAX_PIXELS, as_mask, on_white, read_picture

    opened = {}
    for option, name in PICTURES.items():
        path = options.get(option)
        if path is not None:
            shown = f"{(told or {}).get(option, '')}--{option.replace('_', '-')} {path}"
            form = as_mask if option == "mask" else on_white
            opened[name] = form(read_picture(path, max_pixels or MAX_PIXELS, shown))
    return opened


def asked_controls(asked: list[dict[str, Any]] | None, source: Request | None) -> list[UsedControl]:
    """What --control says, else what the picture to repeat was steered by."""
    if asked is not None:
        return [UsedControl(**one) for one in asked]
    return [] if source is None else source.control or []


def opened_hints(controls: list[UsedControl], max_pixels: int | None, told: str) -> list[Image.Image]:
    """The pictures that controls are shown; errors are those of `opened_pictures`."""
    from hubgen.data.pictures import MAX_PIXELS, on_white, read_picture

    return [
        on_white(read_picture(one.image, max_pixels or MAX_PIXELS, f"{told}--control {one.net}={one.image}"))
        for one in controls
    ]


def check_names(controls: list[UsedControl], index: Mapping[str, Any]) -> None:
    """Raises ValueError for a control that cannot be opened, before the model's weights are read."""
    if controls:
        from hubgen.controls.opening import check_name
    for one in controls:
        with told_as_option(one):
            check_name(one.net, index)


def opened_controls(controls: list[UsedControl], hints: list[Image.Image], pipe: Any) -> list[Any]:
    """The controls with their pictures, on the pipeline's device."""
    from hubgen.controls.opening import open_control

    found = []
    for one, hint in zip(controls, hints, strict=True):
        with told_as_option(one):
            found.append(open_control(one.net, hint, pipe, scale=one.scale, start=one.start, end=one.end))
    return found


@contextmanager
def told_as_option(used: UsedControl) -> Iterator[None]:
    """Errors about a control inside name the option that it was asked for by."""
    from hubgen.errors import one_line

    try:
        yield
    except (OSError, ValueError) as error:
        raise ValueError(f"--control {used.net}: {one_line(error).removeprefix(f'{used.net}: ')}") from error


def default_out(prompt: str, source: Path | None) -> Path:
    """A name that is free: after the file that is repeated, beside it, or after the prompt, here."""
    folder, stem = (source.parent, source.stem) if source is not None else (Path(), slug(prompt))
    candidates = (folder / f"{stem}{f'-{number}' if number > 1 else ''}.png" for number in range(1, 10_000))
    free = next((path for path in candidates if not path.exists()), None)
    if free is None:
        raise ValueError(f"--out not given, and {folder / stem}.png to {stem}-9999.png all exist; name a file")
    return free


def check_out(out: Path) -> Path:
    """Fail before the work, not after it: the format, the folder, and whether it takes a file."""
    if out.is_dir():
        raise ValueError(f"--out {out}: is a folder, expected a file name such as {out / 'cat.png'}")
    if out.suffix.lower() not in FORMATS:
        raise ValueError(f"--out {out}: got {out.suffix!r}, expected a file name ending in {', '.join(FORMATS)}")
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: the folder {out.parent} does not exist; create it first")
    try:
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise ValueError(f"--out {out}: cannot write in {out.parent}: {error.strerror}") from error
    return out


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a pipeline draws from, and how the command calls it."""

    pipeline: str
    """Its name in hubgen."""
    draws: str
    """What a prompt is to it, in the words of an error message; empty if it takes none."""
    options: tuple[str, ...]
    """What it takes beside prompts, of the fields of `Request`."""


KINDS = (
    Kind(
        "TextToImagePipeline",
        'say what to draw, such as hubgen generate "a smiling cat" --out cat.png',
        (
            "negative_prompt",
            "guidance_scale",
            "height",
            "width",
            "image",
            "mask",
            "strength",
            "lora",
            "embedding",
            "control",
            "control_image",
            "image_guidance_scale",
        ),
    ),
    Kind(
        "ClassToImagePipeline",
        "name a class or its number",
        ("guidance_scale", "height", "width", "image", "mask", "strength", "control", "image_guidance_scale"),
    ),
    Kind("UnconditionalPipeline", "", ()),
)


def kind_of(index: dict[str, Any], request: Request) -> Kind:
    """The kind of pipeline that reads a model's index.

    Raises:
        ValueError: there is none, or the request asks for what that kind cannot do.
    """
    from hubgen.pipelines.loading import reader_of

    name, reader = index["_class_name"], reader_of(index, request.model, "--model")
    kind = next(kind for kind in KINDS if kind.pipeline == reader.__name__)
    if not request.prompts and kind.draws:
        raise ValueError(f"no prompt: {kind.draws}")
    if request.prompts and not kind.draws:
        raise ValueError(f"prompt {request.prompts[0]!r}: {request.model} draws without prompts; expected none")
    for option in KINDS[0].options:
        if getattr(request, option) is not None and option not in kind.options:
            flag = "size" if option in ("width", "height") else option.replace("_", "-")
            raise ValueError(f"--{flag}: {request.model} is a {name}, which does not take it")
    return kind


def check_size(index: Mapping[str, Any], request: Request, folder: Path | None) -> None:
    """Raises ValueError for a size that the model cannot make, before any weights are read: the configs tell.

    Of a single file, and of parts that are not in order, the pipeline says so when it loads.
    """
    import hubgen
    from hubgen.autoencoders.latents import LatentSpace
    from hubgen.conditioning.families import family_of
    from hubgen.hub.bare import BACKBONES, bare_parts

    if request.width is None or request.height is None or (folder is not None and folder.is_file()):
        return
    parts = [part for part in BACKBONES if index.get(part) not in (None, [None, None])]
    if "vae" not in index or len(parts) != 1:
        return
    if any(index[part][1] not in hubgen.HOMES for part in ("vae", parts[0])):
        return
    models = bare_parts(index, request.model, request.revision, folder, ("vae", parts[0]), "--model")
    if len(models) != 2:
        return
    backbone = models[parts[0]]
    try:
        LatentSpace(models["vae"], backbone.config, family_of(backbone).patch).checked_size(
            request.height, request.width
        )
    except ValueError as error:
        raise ValueError(f"--size {request.width}x{request.height}: {error}") from error


def complete(kind: Kind, request: Request, pipe: Any) -> Request:
    """The request with the model's own settings in place of None, so that the picture's file says them too."""
    steps, scale = pipe.config.get("default_num_inference_steps"), pipe.config.get("default_guidance_scale")
    if kind.pipeline == "TextToImagePipeline":
        defaults = pipe.defaults(image=request.image is not None, mask=request.mask is not None)
        steps, scale = defaults.steps, defaults.guidance_scale
        begins_at_noise = pipe.shown is not None and pipe.shown.begins_at_noise(request.mask is not None)
        if request.image is not None and request.strength is None and not begins_at_noise:
            request = dataclasses.replace(request, strength=defaults.strength)
    if "image_guidance_scale" in kind.options:
        from hubgen.controls.shown_picture import check_image_scale

        scale_of_image = check_image_scale(pipe.shown, request.image_guidance_scale)
        request = dataclasses.replace(request, image_guidance_scale=scale_of_image)
    return dataclasses.replace(
        request,
        num_inference_steps=first_given(request.num_inference_steps, steps),
        guidance_scale=first_given(request.guidance_scale, scale if "guidance_scale" in kind.options else None),
    )


def sample(kind: Kind, pipe: Any, request: Request, opened: dict[str, Any]) -> list[Image.Image]:
    """The pictures, all those of the first prompt first, each from a generator of its own.

    Args:
        kind: Of the pipeline.
        pipe: The pipeline.
        request: What to draw.
        opened: The pictures to start from, under the pipeline's names.
    """
    words = request.prompts or [""]  # a model that draws without prompts draws as from one
    prompts = [word for word in words for _ in range(request.n)]
    seeds = [request.seed + j for _ in words for j in range(request.n)]
    options = {name: getattr(request, name) for name in kind.options if getattr(request, name) is not None}
    beside = (*PICTURES, "control", *(used.option for used in USED))  # opened, or on the pipeline already
    options = {name: value for name, value in options.items() if name not in beside} | opened
    pictures: list[Image.Image] = []
    for start in range(0, len(prompts), request.batch_size):
        batch = slice(start, start + request.batch_size)
        count = f" {start + 1}-{min(start + request.batch_size, len(prompts))} of {len(prompts)}"
        pipe.set_progress_bar_config(desc="sampling" + (count if len(prompts) > 1 else ""), file=sys.stderr)
        drawn: dict[str, Any] = {"batch_size": len(prompts[batch])}
        if kind.pipeline == "TextToImagePipeline":
            drawn = {"prompt": prompts[batch]}
        elif kind.pipeline == "ClassToImagePipeline":
            drawn = {"class_labels": [int(word) if word.isdecimal() else word for word in prompts[batch]]}
        pictures += pipe(
            **drawn,
            **options,
            num_inference_steps=request.num_inference_steps,
            generator=[seeded(number) for number in seeds[batch]],
        ).images
    return pictures


def seeded(number: int) -> torch.Generator:
    """A generator on the CPU on every device, so that the noise is the same everywhere."""
    import torch

    return torch.Generator("cpu").manual_seed(number)


def grid(pictures: list[Image.Image], prompts: int, n: int) -> Image.Image:
    """One picture of all: a row for each prompt, or as square as it goes when there is one row or one column."""
    from PIL import Image

    columns = n if prompts > 1 and n > 1 else math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    width, height = pictures[0].size
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for number, picture in enumerate(pictures):
        sheet.paste(picture, (number % columns * width, number // columns * height))
    return sheet


def describe(request: Request) -> str:
    """One line that says what is about to be made."""
    parts = [f"{request.width}x{request.height} pixels"] if request.width else []
    parts += [f"{request.num_inference_steps} steps"] if request.num_inference_steps else []
    parts += [f"guidance {request.guidance_scale:g}"] if request.guidance_scale is not None else []
    parts += [f"from {request.image}"] if request.image else []
    return ", ".join([*parts, f"seed {request.seed}", f"{request.dtype} on {request.device}"])


def tell_other_versions(path: Path, made_with: dict[str, str]) -> None:
    """Say it where a picture was made with other libraries than those here."""
    here = versions()
    other = [name for name, number in made_with.items() if here.get(name) != number]
    if other:
        then, now = (", ".join(f"{name} {table.get(name)}" for name in other) for table in (made_with, here))
        say(f"{path} was made with {then}; here: {now}. The picture may differ slightly.")


# ---------------------------------------------------------------------------------------------------------------------


def first_given(*values: Any) -> Any:
    """The first value that is not None."""
    return next((value for value in values if value is not None), None)
