"""`hubgen publish`: a folder to the Hub."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hubgen.cli.arguments import add_command, positive_number
from hubgen.cli.messages import say

DESCRIPTION = """\
Send a folder to the Hugging Face Hub: a pipeline, a network, an adapter, an IP-Adapter, a learned word, a data set or a
Space. What it is, is told by its files; of each kind only those files are sent that it needs, and the others are named.

It needs a token (`hf auth login`, or HF_TOKEN) and a card (README.md) with a licence, which hubgen's trainers write.
Running it again sends what is missing or has changed.
"""

EPILOG = """\
examples:
  hubgen publish runs/noto/lora owner/emoji-noto --dry-run
  hubgen publish runs/emoji/pipeline owner/emoji --private
  hubgen publish data/fluent owner/fluent-emoji --branch new --message "More captions"
  hubgen publish runs/noto/lora other/emoji-noto --pull-request

exit status:
  0 done, 2 bad arguments or files, or the Hub refused (one line says what), 130 interrupted, 1 a fault in hubgen
"""


def add_publish(commands: Any) -> None:
    """Adds `hubgen publish` to the command line."""
    parser = add_command(
        commands, "publish", summary="send a folder to the Hub", description=DESCRIPTION, epilog=EPILOG
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="what to send")
    parser.add_argument("repo", metavar="OWNER/NAME", help="the repository, which is made if it is not there")
    parser.add_argument("--private", action="store_true", help="make the repository private, if it is made")
    parser.add_argument("--branch", metavar="NAME", help="where to (default: the main branch); made if it is not there")
    parser.add_argument("--pull-request", action="store_true", help="propose the change instead of making it")
    parser.add_argument("--message", metavar="TEXT", default="Sent with hubgen", help="of the commit")
    parser.add_argument("--dry-run", action="store_true", help="list what would be sent, and send nothing")
    parser.add_argument(
        "--patience",
        type=positive_number,
        default=600.0,
        metavar="SECONDS",
        help="how long to try again where the Hub is too busy (default: 600)",
    )
    parser.set_defaults(run=publish)


def publish(arguments: argparse.Namespace) -> None:
    """`hubgen publish`."""
    from hubgen.hub.publish import prepare

    shipment = prepare(
        arguments.folder,
        arguments.repo,
        private=arguments.private,
        revision=arguments.branch,
        create_pr=arguments.pull_request,
        message=arguments.message,
    )
    say(str(shipment))
    if not arguments.dry_run:
        print(shipment.send(arguments.patience))
