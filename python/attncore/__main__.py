"""``python -m attncore info | bench | demo``: the library seen from a shell."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from attncore._cli import bench, demo, info
from attncore._cli.packages import MissingPackages


def parser() -> argparse.ArgumentParser:
    """The command line: one sub-command a module of ``attncore._cli``."""
    main_parser = argparse.ArgumentParser(
        prog="python -m attncore", description="Exact attention on the CPU for NumPy arrays."
    )
    commands = main_parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (info, bench, demo):
        name = module.__name__.rpartition(".")[2]
        command = commands.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return main_parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one sub-command; the exit status (2 for a wrong command line, by argparse)."""
    options = parser().parse_args(arguments)
    try:
        status: int = options.run(options)
    except MissingPackages as missing:
        print(f"attncore {options.command}: {missing}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return status


if __name__ == "__main__":
    sys.exit(main())
