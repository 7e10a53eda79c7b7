"""Score video files with a saved readout; the press runs this as a process."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from mmsa_lib.errors import MmsaError

PUPPETS_ONLY = (
    "note: the tiny readout of the package scores. It has learned from the puppets' "
    "clips and knows nothing but puppets: of people its scores mean nothing. Give "
    "--model a readout that scripts/train_readout.py has made from clips of people."
)


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0 if all clips were scored, 1 if some were refused, else 2."""
    parser = argparse.ArgumentParser(
        prog="mmsa-book predict",
        description="Score video files: -3 very negative, +3 very positive.",
        epilog="Exit status: 0 if all clips were scored, 1 if some were refused, 2 if "
        "the call or the model was wrong.",
    )
    parser.add_argument(
        "clips",
        nargs="+",
        metavar="CLIP",
        help="a video file with sound, or a folder in MMSA-FET's layout: all its "
        "clips, with the transcripts of its label.csv",
    )
    parser.add_argument(
        "--text",
        action="append",
        metavar="WORDS",
        help="what is said in a file; one for each file, in their order",
    )
    parser.add_argument(
        "--model",
        metavar="DIR",
        help="what scripts/train_readout.py wrote; default: the tiny readout of the "
        "package, which knows puppets only",
    )
    parser.add_argument(
        "--backbone",
        metavar="DIR",
        help="where the model's backbone lies, if not where it was for training",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--json", action="store_true", help="for programs")
    given = parser.parse_intermixed_args(arguments)

    from mmsa_lib.methods import readout  # takes seconds: a wrong call is told at once

    try:
        found = readout.predict(
            given.clips,
            given.model,
            texts=given.text,
            backbone=given.backbone,
            device=given.device,
        )
    except MmsaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if given.model is None:
        print(PUPPETS_ONLY, file=sys.stderr)
    if given.json:
        print(json.dumps([asdict(p) for p in found], indent=1, ensure_ascii=False))
    else:
        for p in found:
            score = "refused" if p.score is None else f"{p.score:+.2f}"
            why = "" if p.refused is None else f"\n         {p.refused}"
            print(f"{score:>7}  {p.path}{why}")
    return int(any(p.score is None for p in found))


if __name__ == "__main__":
    sys.exit(main())
