"""The house style of plots, and the one way a figure reaches a page.

One message a figure; Okabe-Ito colours that mean the same in every chapter; names
beside what they name; every seed a dot or a thin line. A figure is a white card, so
that it reads the same on a light and on a dark page, in a notebook and in print.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imsave

from mmsa_lib import statistics
from mmsa_lib.errors import MmsaError

PAPER, INK, QUIET = "#ffffff", "#1f2328", "#57606a"  # card, text, axes and references

OKABE_ITO = {
    "blue": "#0072B2",
    "orange": "#E69F00",
    "green": "#009E73",
    "purple": "#CC79A7",
    "sky": "#56B4E9",
    "vermillion": "#D55E00",
    "black": "#000000",
    "yellow": "#F0E442",
}
_MEANING = {
    **{"text": "blue", "audio": "orange", "vision": "green", "pose": "purple"},
    **{"gaze": "sky", "hands": "vermillion", "heart": "yellow"},
    **{"late": "sky", "early": "vermillion", "middle": "black", "mult": "purple"},
    **{"wander": "blue", "mmolre": "orange", "cggm": "green", "mplmm": "purple"},
    **{"casp": "vermillion", "readout": "sky", "generative": "black"},
}
_NO_LOOK = ("ridge", "constant", "training", "always", "baseline", "oracle", "reported")

RC = {
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "figure.constrained_layout.use": True,
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same on every machine
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": QUIET,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.prop_cycle": cycler(color=list(OKABE_ITO.values())[:7]),
    "image.cmap": "cividis",
    "lines.linewidth": 1.8,
    "svg.hashsalt": "mmsa",  # equal figures give equal bytes
    "svg.fonttype": "path",
}


class FigureError(MmsaError, ValueError):
    """A figure lacks what a reader needs: alt text, a caption, values."""


# ---------------------------------------------------------------- colour


def contrast(a: str, b: str = PAPER) -> float:
    """WCAG contrast ratio of two colours, 1 to 21; text needs 4.5, marks 3."""

    def luminance(colour):
        rgb = np.array(to_rgb(colour))
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def ink(colour: str, ratio: float = 4.5) -> str:
    """The same hue, darkened until it reaches `ratio` against the card."""
    rgb, shade = np.array(to_rgb(colour)), 1.0
    while contrast(to_hex(rgb * shade)) < ratio:
        shade -= 0.02
    return to_hex(rgb * shade)


def colours(names: Iterable[str]) -> dict[str, str]:
    """A colour for each name: modalities and methods keep theirs in every chapter.

    The first word decides ("text only" is text, "late fusion" is late). Baselines that
    do not learn are grey; other names take what is left, in order. Eight names are the
    most that stay apart by colour.
    """
    names = list(dict.fromkeys(names))
    chosen, free = {}, list(OKABE_ITO)
    for name in names:
        word = name.lower().split()[0] if name.split() else ""
        if word in _NO_LOOK:
            chosen[name] = QUIET
        elif _MEANING.get(word) in free:
            free.remove(_MEANING[word])
            chosen[name] = OKABE_ITO[_MEANING[word]]
    others = [name for name in names if name not in chosen]
    if len(others) > len(free):
        raise FigureError(
            f"{len(names)} names want a colour of their own and there are "
            f"{len(OKABE_ITO)}; draw fewer, or make two figures"
        )
    chosen |= {n: OKABE_ITO[c] for n, c in zip(others, free, strict=False)}
    return {name: chosen[name] for name in names}


# ---------------------------------------------------------------- canvas


def style() -> None:
    """Make the house style the default of everything drawn from now on.

    A reader's own settings (matplotlibrc) do not count: what the house style leaves
    open is as matplotlib is shipped.
    """
    mpl.rcdefaults()
    mpl.rcParams.update(RC)


def canvas(
    rows: int = 1, columns: int = 1, *, width: float = 5.6, height: float = 3.2, **kw
) -> tuple[Figure, Axes | np.ndarray]:
    """A figure in the house style and its axes; sizes in inches, as printed.

    `kw` goes to ``Figure.subplots`` (sharex, width_ratios, ...). Outside pyplot, so
    that a notebook shows it once, where `show` is called.
    """
    style()
    figure = Figure(figsize=(width, height))
    if columns > 1:  # names at the ends of lines keep clear of the next panel
        figure.get_layout_engine().set(wspace=0.06)
    return figure, figure.subplots(rows, columns, **kw)


def reference(ax: Axes, value: float, label: str, *, axis: str = "x") -> None:
    """A dashed grey line, such as an oracle or a constant predictor, with its name.

    axis: "x" if `value` lies on the horizontal axis, "y" if on the vertical one.
    """
    references(ax, {label: value}, axis=axis)


def references(ax: Axes, lines: Mapping[str, float], *, axis: str = "x") -> None:
    """Several `reference` lines whose names keep clear of each other."""
    draw = {"x": ax.axvline, "y": ax.axhline}[axis]
    for value in lines.values():
        draw(value, color=QUIET, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
    if axis == "y":
        _names_at_the_end(ax, lines, dict.fromkeys(lines, QUIET))
        return
    low, high = ax.get_xlim()
    row, last = 0, -np.inf
    for label, value in sorted(lines.items(), key=lambda item: item[1]):
        at = (value - low) / (high - low)
        row = row + 1 if at - last < 0.3 else 0  # the next name goes one line higher
        last = at
        ax.annotate(
            label,
            xy=(value, 1),
            xycoords=ax.get_xaxis_transform(),
            xytext=(0, 2 + 12 * row),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=9,
            color=QUIET,
        )


def label(
    ax: Axes,
    text: str,
    at: tuple[float, float],
    shift: tuple[float, float] = (7, 0),
    colour: str = INK,
    **kw,
) -> None:
    """Write beside what is named: `shift` points from a place in data coordinates.

    The colour is darkened until it can be read; `kw` goes to ``Axes.annotate``.
    """
    kw = {"fontsize": 9, "color": ink(colour)} | kw
    ax.annotate(text, at, xytext=shift, textcoords="offset points", **kw)


def _names_at_the_end(ax: Axes, ends: Mapping[str, float], palette) -> None:
    """Write names right of the axes at their heights, pushed apart where too close."""
    if not ends:
        return
    ax.figure.draw_without_rendering()  # the layout decides how high the axes are
    low, high = ax.get_ylim()
    points = ax.get_window_extent().height / ax.figure.dpi * 72
    gap = float(12 * (high - low) / points)  # negative on an inverted axis
    ordered = sorted(ends, key=ends.get, reverse=gap < 0)
    wanted = np.array([ends[name] for name in ordered])
    y = wanted.copy()
    for i in range(1, len(y)):
        y[i] = (max if gap > 0 else min)(y[i], y[i - 1] + gap)
    y -= (y - wanted).mean()
    for name, at in zip(ordered, y, strict=True):
        ax.annotate(
            name,
            xy=(1, at),
            xycoords=ax.get_yaxis_transform(),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=ink(palette[name]),
            annotation_clip=False,
        )


# ---------------------------------------------------------------- kinds of plots


def _finite(name: str, values) -> np.ndarray:
    x = np.asarray(values, dtype=float)
    if not x.size or not np.isfinite(x).all():
        raise FigureError(
            f"{name!r} has {x.size} values, {int((~np.isfinite(x)).sum())} of them NaN "
            "or infinite; a figure must not drop them silently"
        )
    return x


def strip(
    ax: Axes,
    groups: Mapping[str, Sequence[float]],
    *,
    lines: Mapping[str, float] | None = None,
    look: Mapping[str, str] | None = None,
    intervals: bool = False,
) -> None:
    """One row a name, top to bottom: every seed a dot, the mean a vertical line.

    look: a colour for each name, where there are more names than `colours` can tell
    apart. intervals: also the 95 % interval of each mean, a thin horizontal line.
    """
    palette = look or colours(groups)
    for row, (name, values) in enumerate(groups.items()):
        x = _finite(name, values)
        # a fixed fan instead of random jitter: equal seeds stay visible and the
        # figure's bytes do not change
        fan = np.linspace(-0.17, 0.17, len(x)) if len(x) > 1 else np.zeros(1)
        colour = palette[name]
        ax.scatter(x, row + fan, s=26, color=colour, edgecolors=ink(colour), zorder=3)
        ax.vlines(x.mean(), row - 0.34, row + 0.34, color=ink(colour), lw=2, zorder=4)
        if intervals and len(x) > 1:
            s = statistics.summarise(x)
            ax.hlines(row, s.low, s.high, color=ink(colour), lw=1.2)
    ax.set_yticks(range(len(groups)), list(groups))
    for tick, name in zip(ax.get_yticklabels(), groups, strict=True):
        tick.set_color(ink(palette[name]))
    ax.set_ylim(len(groups) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.grid(axis="x", color=QUIET, alpha=0.15, linewidth=0.8)
    references(ax, lines or {}, axis="x")


def intervals(
    ax: Axes, rows: Mapping[str, Mapping[str, float]], *, names: bool = True
) -> None:
    """One row a name, top to bottom: a line from `low` to `high`, `estimate` a dot.

    names: write them; False for all but the first of several axes side by side.
    """
    palette = colours(rows)
    for i, (name, row) in enumerate(rows.items()):
        x, low, high = _finite(name, [row[k] for k in ("estimate", "low", "high")])
        ax.hlines(i, low, high, color=palette[name], lw=3)
        ax.plot([x], [i], "o", color=INK)
    ax.set_yticks(range(len(rows)), list(rows) if names else [""] * len(rows))
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.margins(x=0.15)
    ax.tick_params(axis="y", length=0)


def curves(
    ax: Axes,
    runs: Mapping[str, Sequence[Sequence[float]]],
    *,
    steps: Sequence[float] | None = None,
    lines: Mapping[str, float] | None = None,
) -> None:
    """Learning curves: every seed a thin line, the mean a thick one, names at the end.

    runs: name -> one sequence a seed; early stopping makes them unequal, and the mean
    ends where the shortest does. steps: the horizontal axis, 1, 2, 3, ... by default.
    """
    palette, ends = colours(runs), {}
    for name, seeds in runs.items():
        seeds = [_finite(name, s) for s in seeds]
        longest, shortest = max(map(len, seeds)), min(map(len, seeds))
        x = np.arange(1, longest + 1) if steps is None else np.asarray(steps)
        line = ink(palette[name], 3)
        for s in seeds:
            ax.plot(x[: len(s)], s, color=line, linewidth=0.7, alpha=0.6)
        mean = np.mean([s[:shortest] for s in seeds], axis=0)
        ax.plot(x[:shortest], mean, color=line, linewidth=2.2)
        ends[name] = float(mean[-1])
    lines = dict(lines or {})
    for value in lines.values():
        ax.axhline(value, color=QUIET, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
    _names_at_the_end(ax, ends | lines, palette | dict.fromkeys(lines, QUIET))


def tradeoff(
    ax: Axes,
    points: Mapping[str, tuple[float, Sequence[float]]],
    *,
    lines: Mapping[str, float] | None = None,
) -> None:
    """Score against cost on a log axis: name -> (parameters, one score a seed)."""
    palette = colours(points)
    for name, (cost, scores) in points.items():
        y = _finite(name, scores)
        colour = palette[name]
        ax.scatter(np.full(len(y), cost), y, s=20, color=colour, edgecolors=ink(colour))
        ax.plot([cost], [y.mean()], marker="_", markersize=16, mew=2, color=ink(colour))
        ax.annotate(
            name,
            (cost, y.mean()),
            xytext=(9, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=ink(colour),
        )
    ax.set_xscale("log")
    costs = [cost for cost, _ in points.values()]
    ax.set_xlim(min(costs) / 1.6, max(costs) * 4)  # room for the names
    references(ax, lines or {}, axis="y")


def heatmap(
    ax: Axes,
    values,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    digits: int | None = 2,
) -> None:
    """A (rows, columns) matrix in cividis with its numbers written in the cells."""
    v = _finite("heatmap", values)
    if v.shape != (len(rows), len(columns)):
        raise FigureError(
            f"{v.shape} values for {len(rows)} rows and {len(columns)} columns"
        )
    mesh = ax.pcolormesh(v, edgecolors=PAPER, linewidth=1)
    if digits is not None:
        for (i, j), x in np.ndenumerate(v):
            cell = to_hex(mesh.cmap(mesh.norm(x)))
            dark = contrast("#000000", cell) > contrast(PAPER, cell)
            ax.text(
                j + 0.5,
                i + 0.5,
                f"{x:.{digits}f}".replace("-", "\N{MINUS SIGN}"),
                ha="center",
                va="center",
                fontsize=9,
                color="#000000" if dark else PAPER,
            )
    ax.set_xticks(np.arange(len(columns)) + 0.5, columns)
    ax.set_yticks(np.arange(len(rows)) + 0.5, rows)
    ax.set_ylim(len(rows), 0)
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)


def timeline(media, words, times, tracks: Mapping[str, tuple[str, np.ndarray]]):
    """A clip on one time axis, as a figure: its words, voice and face, and tracks.

    media: `corpora.clips.Media`, decoded with a few frames. words: (word, start, end)
    in seconds. tracks: name -> (modality, values (T,) at `times` (T,)); a name stands
    beside the peak of its track.
    """
    heights = [0.45, 0.9, 0.9, 0.9]
    figure, axes = canvas(4, 1, height=3.6, sharex=True, height_ratios=heights)
    hue = colours(["text", "audio", "vision"])
    for word, start, end in words:
        box = {"color": hue["text"], "alpha": 0.25, "ec": "none"}
        axes[0].axvspan(start + 0.01, end - 0.01, **box)
        middle = (start + end) / 2
        axes[0].text(
            middle, 0.5, word, ha="center", va="center", fontsize=9, parse_math=False
        )
    heard = np.arange(len(media.audio))[::8] / media.rate
    axes[1].plot(heard, media.audio[::8], lw=0.5, color=ink(hue["audio"], 3))
    half = np.diff(media.frame_times).min() * 0.48
    for at, frame in zip(media.frame_times, media.frames, strict=True):
        axes[2].imshow(frame, extent=(at - half, at + half, 0, 1), aspect="auto")
    axes[2].set_ylim(0, 1)
    for k, (name, (modality, values)) in enumerate(tracks.items()):
        axes[3].plot(times, values, color=ink(hue[modality], 3))
        peak, side = times[values.argmax()], ("left", "right")[k % 2]
        at = (peak + (0.25, -0.25)[k % 2], 0.75)
        axes[3].annotate(name, at, ha=side, fontsize=9, color=ink(hue[modality]))
    for ax, name in zip(axes, ("words", "voice", "face", "cues"), strict=True):
        ax.set_yticks([])
        ax.set_ylabel(name, rotation=0, ha="right", va="center")
        ax.spines["left"].set_visible(False)
    axes[3].set_xlim(-half, media.seconds + half)
    axes[3].set_xlabel("seconds")
    return figure


# ---------------------------------------------------------------- onto the page

_DENSE = 150_000  # bytes of SVG from which a PNG is the smaller picture


def show(figure: Figure, *, name: str, alt: str, caption: str, **numbers) -> None:
    """Display the figure with its alt text and caption; see `card` for the arguments.

    The output is HTML that carries both, so they survive execution by papermill and
    rendering by any theme, and stand beside the code that drew the figure.
    """
    from IPython.display import display

    page = card(figure, name=name, alt=alt, caption=caption, **numbers)
    display({"text/html": page, "text/plain": f"[figure {name}: {alt}]"}, raw=True)


def card(figure: Figure, *, name: str, alt: str, caption: str, **numbers) -> str:
    """The figure as an HTML ``<figure>`` with everything inside.

    name: the anchor, ``#fig-<name>``. alt: what is drawn, for who cannot see it.
    caption: the finding, for everybody; ``{mae}`` in it is filled from
    ``mae=runs.number(...)``, so that its numbers come from records like all others.
    An SVG, or a PNG of twice the resolution where the SVG would be large.
    Raises `FigureError` for alt text or a caption that says nothing.
    """
    alt, caption = " ".join(alt.split()), " ".join(caption.split())
    _check_words(name, alt, caption)
    kind, picture = _picture(figure)
    width, height = (round(96 * inches) for inches in figure.get_size_inches())
    text = html.escape(caption)
    if numbers:
        text = text.format(**{k: n._repr_html_() for k, n in numbers.items()})
    # A phone scrolls the picture, for its words would be too small to read. Styles
    # stand inline because a notebook has no stylesheet of ours, and because
    # the book's theme would dim and frame images in dark mode.
    return (
        f'<figure id="fig-{name}" class="mmsa-figure" style="margin:1rem 0;padding:'
        f'.75rem;background:{PAPER};color:{INK};border-radius:6px">'
        '<div style="overflow-x:auto">'
        f'<img src="data:image/{kind};base64,{base64.b64encode(picture).decode()}" '
        f'alt="{html.escape(alt)}" width="{width}" height="{height}" style="display:'
        f"block;margin:auto;max-width:100%;min-width:min(21rem,{width}px);"
        f'height:auto;padding:0;background:{PAPER};filter:none"></div>'
        f'<figcaption style="text-align:left;color:{INK};font-weight:400">{text}'
        "</figcaption></figure>"
    )


def _check_words(name: str, alt: str, caption: str) -> None:
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name):
        raise FigureError(
            f"figure name {name!r} must be lower-case words joined by hyphens"
        )
    if len(alt.split()) < 4:
        raise FigureError(
            f"figure {name!r} has alt text {alt!r}; describe in a sentence what is "
            "drawn (axes, groups, what stands out) for a reader who cannot see it"
        )
    if len(caption.split()) < 4:
        raise FigureError(
            f"figure {name!r} has caption {caption!r}; state its finding in a sentence"
        )
    if alt == caption:
        raise FigureError(
            f"figure {name!r} has equal alt text and caption; the alt text describes "
            "the picture, the caption states the finding"
        )


def _picture(figure: Figure) -> tuple[str, bytes]:
    with mpl.rc_context():
        style()
        svg = io.BytesIO()
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
        if svg.tell() <= _DENSE:
            return "svg+xml", svg.getvalue()
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=192, metadata={"Software": None})
        return "png", png.getvalue()


# ---------------------------------------------------------------- films


def player(film: Path, still: np.ndarray, *, label: str, words: str):
    """A short mp4 as a video element that holds its bytes, so that it plays offline.

    still: (H, W, 3) uint8, shown before it plays. label: its name for who cannot see
    it. words: what happens in it, folded below.
    """
    from IPython.display import HTML

    if len(words.split()) < 4:
        raise FigureError(
            f"film {film.name} is described by {words!r}; say in a sentence what is "
            "seen and heard, for a reader who cannot see or hear it"
        )
    poster = io.BytesIO()
    with mpl.rc_context():
        style()
        imsave(poster, still, format="png")
    picture, content = (
        base64.b64encode(x).decode() for x in (poster.getvalue(), film.read_bytes())
    )
    label = html.escape(label)
    return HTML(
        '<figure style="margin:1rem 0"><video controls playsinline preload="metadata" '
        f'width="336" style="max-width:100%;height:auto" aria-label="{label}" '
        f'poster="data:image/png;base64,{picture}">'
        f'<source src="data:video/mp4;base64,{content}" type="video/mp4">'
        f"{label}</video><details><summary>The clip in words</summary>"
        f"<p>{html.escape(words)}</p></details></figure>"
    )
