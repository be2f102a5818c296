"""`hubgen data recaption`: captions that a model writes for the pictures of shards."""

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

from hubgen.cli.added import stay_offline
from hubgen.cli.arguments import add_command, positive
from hubgen.cli.web import ENGINE_HELP, add_engine, engine_of, run_stage

RECAPTION_DESCRIPTION = """\
Write a caption for each picture of a folder of shards, by a vision-language model (Llava). The tables get the columns
synthetic_caption, captioner, prompt and caption_status; what was there stays. A caption without words (empty), one that
goes round in circles (repeating) and one that had not ended (cut_off) are not stored, only their status.

Running it again after an interruption does the shards that are missing, and gives the same files.
"""

RECAPTION_EPILOG = f"""\
examples:
  hubgen data recaption kept --model runs/captioner/captioner
  hubgen data recaption kept --model llava-hf/llava-1.5-7b-hf --engine ray --workers 8 --gpus-per-worker 1
  hubgen data recaption kept --model llava-hf/llava-1.5-7b-hf --prompt "Describe this picture." --beams 3

A captioner of your own: `hubgen train captioner --help`. Captions are greedy or found by beams, never drawn. On a CPU,
each worker computes on one thread: --workers is how many are used.

{ENGINE_HELP}
"""


def add_recaption(kinds: Any) -> None:
    """Adds `hubgen data recaption`."""
    parser = add_command(
        kinds,
        "recaption",
        summary="captions that a model writes",
        description=RECAPTION_DESCRIPTION,
        epilog=RECAPTION_EPILOG,
    )
    add = parser.add_argument
    add("shards", type=Path, metavar="SHARDS", help="the folder of shards")
    add("--model", required=True, metavar="MODEL", help="a captioner: its folder, or owner/name on the Hub")
    add(
        "--prompt",
        metavar="TEXT",
        help="what it is asked (default: Share-Captioner's prompt, if it takes any)",
    )
    add("--beams", type=positive, default=1, metavar="N", help="of the search; 1 is greedy (default: 1)")
    add("--max-tokens", type=positive, default=256, metavar="N", help="of a caption, at most (default: 256)")
    add("--batch-size", type=positive, default=16, metavar="N", help="pictures at a time, of each worker (default: 16)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="(default: bfloat16 if this machine has a GPU)")
    add_engine(parser, gpus=True)
    parser.set_defaults(run=data_recaption)


def data_recaption(arguments: argparse.Namespace) -> None:
    """`hubgen data recaption`: a folder of shards, with captions."""
    engine_of(arguments)
    if arguments.prompt is not None and not arguments.prompt.strip():
        raise ValueError(f"--prompt: got {arguments.prompt!r}, expected words")
    stay_offline([arguments.model])
    from hubgen.cli.messages import few_lines

    with few_lines():
        from hubgen.data.web.recaption import MARKS, Recaption
        from hubgen.data.web.stages import open_to_add

        shards = open_to_add(arguments.shards)
        try:
            stage = Recaption.of(
                arguments.model,
                prompt=arguments.prompt,
                beams=arguments.beams,
                max_new_tokens=arguments.max_tokens,
                batch_size=arguments.batch_size,
                dtype=arguments.dtype,
            )
        except ValueError as error:
            raise ValueError(f"--model {error}") from error
        stats = run_stage(stage, stage.works(shards), arguments.shards, arguments)
    marks = Counter[str]()
    for entry in stats:
        marks.update(entry.get(MARKS, {}))
    left = ", ".join(f"{number} {name}" for name, number in marks.most_common() if name != "ok")
    print(f"{arguments.shards}: {marks['ok']} captions by {stage.captioner}; not used: {left or 'none'}")
