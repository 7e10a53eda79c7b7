"""The ``mmsa-book`` program: the commands of the press, and `data`, `predict`, `train`.

Everything runs in the process that was started, and a command imports what it needs
when it is called: ``mmsa-book status`` answers at once and never loads torch.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from mmsa_lib.errors import BookError, MmsaError, unknown
from mmsa_lib.files import printable
from mmsa_lib.press.cli import app, main, pairs, print_json
from mmsa_lib.press.values import seeds_of

PUPPETS_ONLY = (
    "note: the tiny readout of the package scores. It has learned from the puppets' "
    "clips and knows nothing but puppets: of people its scores mean nothing. Give "
    "--model a readout that mmsa-book train has made from clips of people."
)

data_app = typer.Typer(help="List the corpora or get one.", no_args_is_help=True)
app.add_typer(data_app, name="data")


@data_app.command("list")
def data_list() -> None:
    """What there is, and what each corpus needs."""
    from mmsa_lib import corpora

    for name in corpora.names():
        print(f"{name:17}{corpora.describe(name)}")


@data_app.command("get")
def data_get(
    name: Annotated[str, typer.Argument(help="A name that data list shows.")],
    accept_terms: Annotated[
        bool, typer.Option("--accept-terms", help="You have read and accept them.")
    ] = False,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Folder; by default MMSA_DATA, else data/ of the book."),
    ] = None,
    p: Annotated[
        list[str] | None,
        typer.Option("-p", metavar="OPTION VALUE", help="An option of the corpus."),
    ] = None,
) -> None:
    """Show the terms of a corpus, then download, verify and convert it.

    Example: mmsa-book data get mosei-video -p path FILE
    """
    from mmsa_lib import corpora
    from mmsa_lib.press.chapters import find_root, open_book
    from mmsa_lib.press.freshness import data_folder

    options = _options(name, p or [])
    if not accept_terms and sys.stdin.isatty():
        print(corpora.terms(name))
        accept_terms = typer.confirm("Do you agree?")
    folder = data_dir or data_folder(open_book(find_root()))
    where = corpora.prepare(name, folder, accept_terms, **options)
    if where is None:
        print(f"{name} is generated when it is loaded; there is nothing to get")
    else:
        print(f"{name} is in {where}")


def _options(name: str, given: list[str]) -> dict[str, object]:
    """``name=value`` pairs as values of the types that the corpus declares."""
    from mmsa_lib import corpora
    from mmsa_lib.press.values import annotated, check, typed

    known, found = corpora.options(name), {}
    for option, text in pairs(given, "an option"):
        if option not in known:
            raise unknown(f"option of {name}", option, known)
        kind = annotated(known[option])
        value = typed(option, text, None, kind)
        found[option] = check(f"option {option} of {name}", option, value, None, kind)
    return found


@app.command()
def predict(
    clips: Annotated[
        list[str],
        typer.Argument(
            metavar="CLIP",
            help="A video file with sound, or a folder in MMSA-FET's layout: all its "
            "clips, with the transcripts of its label.csv.",
        ),
    ],
    text: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WORDS",
            help="What is said in a file; one for each file, in their order.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="What mmsa-book train wrote; by default the tiny readout of the "
            "package, which knows puppets only.",
        ),
    ] = None,
    backbone: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Where the model's backbone lies, if not where it was for training.",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Score video files: -3 very negative, +3 very positive.

    Exit status: 0 if all clips were scored, 1 if some were refused, 2 if the call or
    the model was wrong. A file whose name begins with a dash is given after --.
    """
    from dataclasses import asdict

    from mmsa_lib.predict import predict as score

    try:
        found = score(clips, model, texts=text, backbone=backbone, device=device)
    except (MmsaError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from error
    if model is None:
        print(PUPPETS_ONLY, file=sys.stderr)
    if as_json:
        print_json([asdict(p) for p in found])
    else:
        for p in found:
            shown = "refused" if p.score is None else f"{p.score:+.2f}"
            print(f"{shown:>7}  {printable(p.path)}")
            for line in (p.refused or "").splitlines():
                print(f"         {printable(line)}")
    raise typer.Exit(int(any(p.score is None for p in found)))


@app.command()
def train(
    method: Annotated[
        Literal["readout", "generative"],
        typer.Argument(
            metavar="METHOD", help="readout, or generative: its twin that writes."
        ),
    ],
    clips: Annotated[
        str, typer.Option(help="puppets, or a folder in MMSA-FET's layout.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for what is learned.")],
    backbone: Annotated[
        str, typer.Option(help="tiny, a folder, or a name on the hub.")
    ] = "tiny",
    cache: Annotated[
        Path | None,
        typer.Option(help="Folder for preprocessed clips; by default memory."),
    ] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training clips.")] = 4,
    seeds: Annotated[
        str,
        typer.Option("--seeds", "--seed", help="Such as 0,1,2; each has its folder."),
    ] = "0",
    lr: Annotated[float, typer.Option(help="Rate of the adapter.")] = 2e-4,
    head_lr: Annotated[float, typer.Option(help="Rate of the regressor.")] = 1e-3,
    batch_size: Annotated[int, typer.Option(help="Clips a batch and process.")] = 8,
    accumulate: Annotated[int, typer.Option(help="Batches a step.")] = 1,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Folder for the state; goes on from it.")
    ] = None,
    frames: Annotated[int, typer.Option(help="Of a clip, at most; even.")] = 16,
    max_pixels: Annotated[
        int | None, typer.Option(help="Of a frame; by default 100352, puppets 7056.")
    ] = None,
    modalities: Annotated[
        str, typer.Option(help="Such as text,audio.")
    ] = "text,vision,audio",
    freeze_towers: Annotated[
        bool, typer.Option("--freeze-towers", help="Adapt the language model only.")
    ] = False,
    precision: Annotated[
        Literal["no", "bf16"] | None, typer.Option(help="By default bf16 on a GPU.")
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.")
    ] = False,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    skip_unusable: Annotated[
        bool, typer.Option("--skip-unusable", help="Leave unusable clips out.")
    ] = False,
) -> None:
    """Train a readout of an omni-modal model, or its generative twin, on clips.

    The epoch with the lowest validation loss is kept, evaluated once on the test split,
    and saved in the folder: a PEFT adapter, the regressor, and a run record. Score
    other clips with it: mmsa-book predict CLIP --model FOLDER.

    Samples a step are batch size x accumulate x processes; the defaults give 8 on one
    (for several: torchrun --no-python mmsa-book train). Rates are for MOSI; halve both
    on MOSEI. The tiny Thinker learns better at ten times the rate of the adapter. With
    --checkpoint, the same command goes on after a kill.
    """
    given = locals() | {
        "seeds": _seeds(seeds),
        "modalities": [m for m in modalities.split(",") if m],
    }
    for name, rate in (("--lr", lr), ("--head-lr", head_lr)):
        if not rate > 0:
            raise typer.BadParameter(f"{rate}: must be positive", param_hint=name)
    from mmsa_lib import clip_training  # takes seconds: a wrong call is told at once

    clip_training.run(clip_training.Settings(**given))


def _seeds(text: str) -> list[int]:
    try:
        return seeds_of(text)
    except BookError as error:
        words = f"{error} (expected whole numbers, such as 0,1,2)"
        raise typer.BadParameter(words, param_hint="--seeds") from error


if __name__ == "__main__":
    main()
