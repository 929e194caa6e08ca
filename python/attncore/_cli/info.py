"""``python -m attncore info``: CPU features, the chosen ISA, threads and the build."""

from __future__ import annotations

import argparse
import json

import attncore

HELP = "print CPU features, chosen ISA, threads and build"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    """Print what attncore.show_config knows."""
    if options.json:
        print(json.dumps(attncore.show_config(mode="dicts"), indent=2, default=str))
    else:
        attncore.show_config()
    return 0
