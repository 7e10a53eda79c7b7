"""`mmsa-book data`: list the corpora or get one; the press runs it as a process."""

from __future__ import annotations

import argparse
import sys

from mmsa_lib import corpora
from mmsa_lib.errors import MmsaError


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0, or 1 with the error on stderr."""
    parser = argparse.ArgumentParser(prog="mmsa-book data", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="what there is")
    get = commands.add_parser("get", help="download, verify and convert one corpus")
    get.add_argument("name")
    get.add_argument("--accept-terms", action="store_true")
    get.add_argument("--data-dir", help="default: MMSA_DATA, else ./data")
    get.add_argument(
        "-p", nargs=2, action="append", default=[], metavar=("OPTION", "VALUE")
    )
    given = parser.parse_args(arguments)
    try:
        if given.command == "list":
            for name in corpora.names():
                print(f"{name:17}{corpora.describe(name)}")
        else:
            _get(given)
    except MmsaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _get(given: argparse.Namespace) -> None:
    accepted = given.accept_terms
    if not accepted and sys.stdin.isatty():
        print(corpora.terms(given.name))
        accepted = input("Do you agree? [y/N] ").strip().lower() in ("y", "yes")
    options = {k: int(v) if v.isdigit() else v for k, v in given.p}
    where = corpora.prepare(given.name, given.data_dir, accepted, **options)
    if where is None:
        print(f"{given.name} is generated when it is loaded; there is nothing to get")
    else:
        print(f"{given.name} is in {where}")


if __name__ == "__main__":
    sys.exit(main())
