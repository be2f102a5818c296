"""Does a damaged picture ever give anything but a picture or one named error, by whichever door it enters?

    python -m tests.benchmarks.picture_fuzz [--formats NAME ...] [--damages N] [--output DIR]

Each of 25 formats is damaged 400 times: cut short, bytes changed, blocks removed, zeroed or exchanged. Every damaged
file goes through the command line (`--image` and `--mask`), the pipeline (opened by Pillow before), a data folder and
both trainers. Exit code 1: something else than a picture or an error in one line that names the file; the table says
what.
"""

import argparse
import io
import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hubgen.cli.generate import opened_pictures
from hubgen.data.errors import DataError
from hubgen.data.image_folder import ImageTextFolder
from hubgen.data.images import read_images, read_masks
from hubgen.training import train_autoencoder, train_text_to_image
from hubgen.training.kit.parse import parse_settings
from tests import models
from tests.benchmarks import report

RESULTS = Path(__file__).parent / "results" / "picture_fuzz"
SIZE = 24
GOOD = 40
"""Whole pictures beside the damaged ones of a data folder."""


def noise(mode: str = "RGB", seed: int = 0) -> Image.Image:
    channels = {"L": (), "RGB": (3,), "RGBA": (4,), "CMYK": (4,)}[mode]
    values = np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, *channels), dtype=np.uint8)
    return Image.fromarray(values, mode)


def encoded(picture: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def exif() -> Image.Exif:
    turned = Image.Exif()
    turned[0x0112] = 6
    return turned


GREY16 = Image.fromarray(np.random.default_rng(0).integers(0, 65536, (SIZE, SIZE), dtype=np.uint16))
FRAMES: dict[str, Any] = {"save_all": True, "append_images": [noise(seed=1)]}
FORMATS: dict[str, Callable[[], bytes]] = {
    "PNG": lambda: encoded(noise(), "PNG"),
    "PNG with alpha": lambda: encoded(noise("RGBA"), "PNG"),
    "PNG palette": lambda: encoded(noise().quantize(16), "PNG", transparency=3),
    "PNG 16 bits": lambda: encoded(GREY16, "PNG"),
    "PNG animation": lambda: encoded(noise(), "PNG", **FRAMES),
    "JPEG": lambda: encoded(noise(), "JPEG", exif=exif()),
    "JPEG progressive": lambda: encoded(noise(), "JPEG", progressive=True),
    "JPEG CMYK": lambda: encoded(noise("CMYK"), "JPEG"),
    "JPEG grey": lambda: encoded(noise("L"), "JPEG"),
    "MPO": lambda: encoded(noise(), "MPO", **FRAMES),
    "WebP": lambda: encoded(noise(), "WEBP"),
    "WebP lossless": lambda: encoded(noise("RGBA"), "WEBP", lossless=True),
    "WebP animation": lambda: encoded(noise(), "WEBP", **FRAMES),
    "AVIF": lambda: encoded(noise(), "AVIF"),
    "JPEG 2000": lambda: encoded(noise(), "JPEG2000"),
    "GIF": lambda: encoded(noise(), "GIF"),
    "GIF animation": lambda: encoded(noise(), "GIF", **FRAMES),
    "TIFF": lambda: encoded(noise(), "TIFF"),
    "TIFF LZW": lambda: encoded(noise("RGBA"), "TIFF", compression="tiff_lzw"),
    "BMP": lambda: encoded(noise(), "BMP"),
    "DDS": lambda: encoded(noise("RGBA"), "DDS"),
    "ICO": lambda: encoded(noise("RGBA"), "ICO", sizes=[(SIZE, SIZE)]),
    "TGA": lambda: encoded(noise(), "TGA", compression="tga_rle"),
    "PPM": lambda: encoded(noise(), "PPM"),
    "SGI": lambda: encoded(noise(), "SGI"),
}


def damaged(whole: bytes, draw: random.Random) -> bytes:
    """The bytes of a picture, damaged in one to four ways."""
    content = bytearray(whole)
    for _ in range(draw.randint(1, 4)):
        if not content:
            break
        begin = draw.randrange(len(content))
        length = draw.randint(1, max(len(content) // 8, 1))
        way = draw.randrange(6)
        if way == 0:
            del content[begin:]
        elif way == 1:
            content[begin] = draw.randrange(256)
        elif way == 2:
            content[begin] ^= 1 << draw.randrange(8)
        elif way == 3:
            del content[begin : begin + length]
        elif way == 4:
            content[begin : begin + length] = bytes(len(content[begin : begin + length]))
        else:
            content[begin:begin] = content[draw.randrange(len(content)) :][:length]
    return bytes(content)


def outcome(work: Callable[[], Any], *names: str) -> str:
    """`taken`, `refused` (in one line that names the file or argument), or what else came."""
    try:
        work()
        return "taken"
    except DataError as error:
        text = str(error)
        return "refused" if "\n" not in text and any(name in text for name in names) else f"DataError: {text!r}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def doors(path: Path) -> Iterator[tuple[str, str]]:
    """What each door that takes one picture says to this file."""
    for option in ("image", "mask"):
        yield "command line", outcome(lambda option=option: opened_pictures({option: path}), path.name)
    for read, name in ((lambda picture: read_images(picture, 4), "`image`"), (read_masks, "`mask_image`")):
        try:
            picture = Image.open(path)
        except Exception:
            continue  # the user's own call of Pillow fails
        yield "pipeline", outcome(lambda read=read, picture=picture: read(picture), name)


def folder_of(files: list[Path], root: Path) -> Path:
    """A data folder of these files and some whole pictures; returns the folder of its split `train`."""
    split = root / "train"
    split.mkdir(parents=True)
    rows = []
    for path in files:
        (split / path.name).write_bytes(path.read_bytes())
        rows.append(path.name)
    for number in range(max(GOOD, len(files) + 1)):
        noise(seed=number).save(split / f"good-{number}.png")
        rows.append(f"good-{number}.png")
    lines = "".join(json.dumps({"file_name": name, "text": "noise"}) + "\n" for name in rows)
    (split / "metadata.jsonl").write_text(lines)
    return split


def data_folder(root: Path) -> list[str]:
    """Outcomes of the damaged files in a data folder: at its opening, and at the loading of what it took."""
    folder = ImageTextFolder(root, split="train", size=16, on_error="skip")
    outcomes = ["refused" if "\n" not in line and "damaged-" in line else line for line in folder.skipped]
    taken = [index for index, name in enumerate(folder.file_names) if name.startswith("damaged-")]
    return outcomes + [outcome(lambda index=index: folder[index], "damaged-") for index in taken]


def trainers(root: Path, frozen: Path, work: Path) -> Iterator[str]:
    """Outcomes of a step of both trainers on the folder, damaged pictures left out."""
    from accelerate.state import AcceleratorState

    common = ["--data.source", root, "--data.size", 16, "--data.on_bad_picture", "skip"]
    common += ["--run.max_train_steps", 1, "--run.report_to", "none", "--run.batch_size", 4]
    tiny = ["--model.block_out_channels", 8, 8, "--model.norm_num_groups", 4, "--model.latent_channels", 4]
    tiny += ["--loss.perceptual_network", "none"]
    parts = ["--base.autoencoder", frozen / "vae", "--base.text_encoder", frozen / "text", "--base.max_text_tokens", 8]
    parts += ["--base.backbone_config"]
    parts += ["{num_layers: 1, num_attention_heads: 2, attention_head_dim: 8, patch_size: 2, pos_embed_max_size: 8}"]
    for script, arguments in ((train_autoencoder, tiny), (train_text_to_image, parts)):
        AcceleratorState._reset_state(reset_partial_state=True)
        output = ["--run.output_dir", work / script.__name__.rpartition(".")[2]]
        settings = parse_settings(script.Settings, [str(word) for word in (*common, *arguments, *output)])
        silence = io.StringIO()
        with redirect_stdout(silence), redirect_stderr(silence):
            yield outcome(lambda script=script, settings=settings: script.main(settings), "damaged-")
    AcceleratorState._reset_state(reset_partial_state=True)


def run(names: list[str], damages: int) -> dict[str, dict[str, dict[str, int]]]:
    """Format -> door -> outcome -> how often."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        frozen = Path(temporary) / "frozen"
        models.vae().save_pretrained(frozen / "vae")
        models.tokenizer(max_length=8).save_pretrained(frozen / "text")
        models.text_encoder().save_pretrained(frozen / "text")
        for number, name in enumerate(names):
            work, whole, draw = Path(temporary) / str(number), FORMATS[name](), random.Random(name)
            work.mkdir()
            files = []
            for index in range(damages):
                files.append(work / f"damaged-{index}.{name.split()[0].lower()}")
                files[-1].write_bytes(damaged(whole, draw))
            counts: dict[str, Counter[str]] = {}
            for path in files:
                for door, result in doors(path):
                    counts.setdefault(door, Counter())[result] += 1
            folder_of(files, work / "data")
            counts["data folder"] = Counter(data_folder(work / "data"))
            counts["trainers"] = Counter(trainers(work / "data", frozen, work))
            found[name] = {door: dict(sorted(outcomes.items())) for door, outcomes in counts.items()}
            print(name, found[name], flush=True)
    return found


def faults(found: dict[str, dict[str, dict[str, int]]]) -> list[str]:
    """Outcomes that are neither a picture nor a named error."""
    return [
        f"{name}, {door}: {result}"
        for name, by_door in found.items()
        for door, outcomes in by_door.items()
        for result in outcomes
        if result not in ("taken", "refused") or (door == "trainers" and result != "taken")
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS), metavar="NAME")
    parser.add_argument("--damages", type=int, default=400, metavar="N", help="of each format (default: 400)")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR")
    options = parser.parse_args()
    found = run(options.formats, options.damages)
    wrong = faults(found)
    content = {"damages": options.damages, "environment": report.environment(), "formats": found, "faults": wrong}
    report.write_json(options.output / "picture_fuzz.json", content)
    columns = ("command line", "pipeline", "data folder", "trainers")
    rows = [
        [name, *(f"{sum(by_door.get(c, {}).values())} / {by_door.get(c, {}).get('refused', 0)}" for c in columns)]
        for name, by_door in found.items()
    ]
    head = f"# Damaged pictures\n\n{options.damages} damages of each format: entered / refused by a named error. "
    text = head + f"Anything else: {len(wrong)}.\n\n" + report.markdown_table(["format", *columns], rows)
    report.write_text(options.output / "picture_fuzz.md", text + "".join(f"\n- {line}" for line in wrong))
    print(text)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
