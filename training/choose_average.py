"""Choose the length of the average after a run that stored several (post-hoc EMA, 2312.02696).

    python -m hubgen.training.choose_average runs/emoji --length 0.08 --out runs/emoji-0.08

Writes the run's pipeline with the weights of that average.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import diffusers
import torch

import hubgen
from hubgen.errors import is_expected, one_line
from hubgen.formats.atomic import written
from hubgen.training.kit.parse import SettingsError
from hubgen.training.kit.post_hoc import chosen
from hubgen.training.kit.script import USAGE_ERROR


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line, writes the pipeline."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="output_dir of the run")
    parser.add_argument("--length", type=float, required=True, help="relative, such as 0.08; at most 0.28")
    parser.add_argument("--step", type=int, help="of the average; the last that is stored if not given")
    parser.add_argument("--out", type=Path, required=True, help="folder of the new pipeline")
    arguments = parser.parse_args(argv)
    folder = arguments.run / "pipeline"
    if not (folder / "model_index.json").is_file():
        raise SettingsError(f"{folder}: got no model_index.json, expected the pipeline of a finished run.")
    weights = chosen(arguments.run / "averages", arguments.length, arguments.step)
    assert hubgen.TextToImagePipeline is not None  # registers hubgen's classes with diffusers' loader
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    backbone = getattr(pipeline, "transformer", None) or pipeline.unet
    parameters = dict(backbone.named_parameters())
    if parameters.keys() != weights.keys():
        raise SettingsError(f"{arguments.run}: the stored averages are of other parameters than the pipeline's.")
    with torch.no_grad():
        for name, value in weights.items():
            parameters[name].copy_(value)
    with written(arguments.out) as temporary:
        pipeline.save_pretrained(temporary, safe_serialization=True)
    print(f"pipeline written to {arguments.out}")


if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        if not is_expected(error):
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(USAGE_ERROR)
