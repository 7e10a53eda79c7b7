"""Figures a reader can see, hear read aloud, and find again in the same colours."""

import base64
import io
import re
import subprocess
import sys
import warnings
from xml.etree import ElementTree

import matplotlib.text
import nbformat
import numpy as np
import papermill
import pytest
from docutils.core import publish_string
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex, to_rgb
from myst_nb.docutils_ import Parser
from PIL import Image

from mmsa_lib import figures, runs, statistics
from mmsa_lib.corpora import clips
from mmsa_lib.figures import FigureError

WORDS = {
    "name": "two-dots",
    "alt": "Strip plot with one row and two dots near the right end.",
    "caption": "Both seeds land close to each other.",
}
GROUPS = {
    "late fusion": [0.89, 0.91, 0.90],
    "text only": [0.93, 0.95, 0.94],
    "audio only": [1.30, 1.28, 1.31],
    "a method with a rather long name": [1.00, 1.02, 1.04],
    "ridge": [0.954],
}


def _strip():
    figure, ax = figures.canvas(height=2.6)
    figures.strip(ax, GROUPS, lines={"oracle": 0.80, "oracle, text only": 0.84})
    ax.set_xlabel("MAE on test")
    return figure, ax


def _curves():
    rng = np.random.default_rng(0)
    figure, ax = figures.canvas()
    runs_ = {
        name: [end + np.exp(-np.arange(n) / 4) for n in (12 + rng.integers(5), 12, 16)]
        for name, end in (("text", 0.70), ("audio", 0.71), ("vision", 0.72))
    }
    figures.curves(ax, runs_, lines={"oracle": 0.71})
    return figure, ax


def _tradeoff():
    figure, ax = figures.canvas()
    points = {
        "wander": (46_128, [0.85, 0.86]),
        "full fine-tuning": (9e6, [0.83, 0.84]),
        "prompt tuning": (3_000, [0.90, 0.92]),
    }
    figures.tradeoff(ax, points, lines={"frozen head": 0.93})
    ax.set_xlabel("trained parameters")
    return figure, ax


def _heatmap():
    figure, ax = figures.canvas(height=2.2)
    values = np.linspace(-1, 1, 18).reshape(3, 6)
    names = ("happy", "sad", "anger", "surprise", "disgust", "fear")
    figures.heatmap(ax, values, ("text", "audio", "vision"), names)
    return figure, ax


PLOTS = [_strip, _curves, _tradeoff, _heatmap]


def _image(page: str) -> tuple[str, bytes]:
    kind, data = re.search(r'src="data:image/([^;]+);base64,([^"]+)"', page).groups()
    return kind, base64.b64decode(data)


# ------------------------------------------------------------- onto the page


@pytest.mark.parametrize(
    ("word", "value", "complaint"),
    [
        ("alt", "", "who cannot see it"),
        ("alt", "   \n ", "who cannot see it"),
        ("alt", "strip plot", "who cannot see it"),
        ("caption", "", "state its finding"),
        ("caption", WORDS["alt"], "equal alt text and caption"),
        ("name", "Two dots", "joined by hyphens"),
        ("name", 'x" onload="', "joined by hyphens"),
    ],
)
def test_a_figure_without_words_is_an_error(word, value, complaint):
    figure, _ = figures.canvas()
    with pytest.raises(FigureError, match=complaint):
        figures.card(figure, **(WORDS | {word: value}))


def test_alt_and_caption_are_not_optional():
    figure, _ = figures.canvas()
    for word in WORDS:
        with pytest.raises(TypeError, match=word):
            figures.card(figure, **{k: v for k, v in WORDS.items() if k != word})


def test_card_holds_a_readable_svg_with_escaped_words():
    figure, _ = _strip()
    words = WORDS | {"alt": 'Dots where MAE < 1 & "oracle" is a line.'}
    page = ElementTree.fromstring(
        figures.card(figure, **words).replace('filter:none">', 'filter:none"/>')
    )
    image = page.find("div/img")
    assert page.get("id") == "fig-two-dots"
    assert image.get("alt") == words["alt"]
    assert page.find("figcaption").text == WORDS["caption"]
    assert (image.get("width"), image.get("height")) == ("538", "250")
    assert "max-width:100%" in image.get("style")
    kind, picture = _image(figures.card(figure, **words))
    root = ElementTree.fromstring(picture)
    assert kind == "svg+xml" and root.tag.endswith("svg")
    assert float(root.get("width")[:-2]) == pytest.approx(5.6 * 72)


def test_equal_figures_give_equal_bytes():
    first, second = (figures.card(_strip()[0], **WORDS) for _ in range(2))
    assert first == second


def test_dense_figures_become_png_of_twice_the_size():
    figure, ax = figures.canvas()
    ax.scatter(*np.random.default_rng(0).normal(size=(2, 4000)), s=3)
    kind, picture = _image(figures.card(figure, **WORDS))
    image = Image.open(io.BytesIO(picture))
    assert kind == "png"
    assert image.size == (round(5.6 * 192), round(3.2 * 192))
    assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)


def test_caption_numbers_come_from_records():
    figure, _ = _strip()
    number = runs.Number(0.89123, "ab" * 32, "mean(test.mae)")
    words = WORDS | {"caption": "Late fusion <wins> with an MAE of {mae}."}
    page = figures.card(figure, **words, mae=number)
    assert f"&lt;wins&gt; with an MAE of {number._repr_html_()}." in page
    with pytest.raises(KeyError, match="mae"):
        figures.card(figure, **words, other=number)


def test_words_survive_papermill_and_the_book_renderer(tmp_path):
    code = f"""
from mmsa_lib import figures
figure, ax = figures.canvas()
figures.strip(ax, {{"late fusion": [0.89, 0.91]}})
figures.show(figure, **{WORDS!r})
print("shown although not the last line of the cell")
"""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    out = tmp_path / "out.ipynb"
    done = papermill.execute_notebook(
        notebook, out, kernel_name="python3", progress_bar=False
    )
    outputs = [o for o in done.cells[0].outputs if o.output_type != "stream"]
    assert len(outputs) == 1  # once: nothing else shows the figure a second time
    assert WORDS["alt"] in outputs[0].data["text/plain"]
    page = publish_string(
        out.read_text(),
        parser=Parser(),
        writer_name="html5",
        settings_overrides={"nb_execution_mode": "off", "output_encoding": "unicode"},
    )
    images = re.findall(r"<img [^>]*>", page)
    assert len(images) == 1
    assert f'alt="{WORDS["alt"]}"' in images[0]
    assert f">{WORDS['caption']}</figcaption>" in page


def test_figures_load_neither_torch_nor_pyplot():
    code = (
        "import sys, mmsa_lib.figures as f; f.canvas(); "
        "sys.exit('torch' in sys.modules or 'matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ------------------------------------------------------------- colour


def test_contrast_is_the_wcag_ratio():
    assert figures.contrast("#000000", "#ffffff") == pytest.approx(21)
    assert figures.contrast("#777777") == pytest.approx(4.48, abs=0.01)
    assert figures.contrast("#777777", "#777777") == 1


def test_text_and_marks_stand_out_from_the_card():
    assert figures.contrast(figures.INK) >= 7
    assert figures.contrast(figures.QUIET) >= 4.5
    for colour in figures.OKABE_ITO.values():
        assert figures.contrast(figures.ink(colour)) >= 4.5  # names
        assert figures.contrast(figures.ink(colour, 3)) >= 3  # lines
        before, after = np.array(to_rgb(colour)), np.array(to_rgb(figures.ink(colour)))
        assert np.allclose(after * before.max(), before * after.max(), atol=0.01)
    assert figures.ink("#000000") == "#000000"


def test_colours_mean_the_same_in_every_figure():
    modalities = figures.colours(["text", "audio", "vision"])
    assert list(modalities.values()) == ["#0072B2", "#E69F00", "#009E73"]
    mixed = figures.colours(["LoRA", "vision", "ridge", "Text only", "Late fusion"])
    assert mixed["vision"] == modalities["vision"]
    assert mixed["Text only"] == modalities["text"]
    assert mixed["Late fusion"] == figures.colours(["late"])["late"]
    assert mixed["ridge"] == figures.colours(["constant"])["constant"] == figures.QUIET
    assert len(set(mixed.values())) == 5


def test_each_set_that_meets_in_one_figure_stays_apart():
    for names in (
        ("wander", "mmolre", "cggm", "mplmm", "casp", "readout", "generative"),
        ("text", "audio", "vision", "pose", "gaze", "hands", "heart"),
        ("late", "early", "middle", "mult", "text", "audio", "vision", "ridge"),
        ("text", "wander", "text+audio", "other"),  # wander yields: text came first
    ):
        palette = figures.colours(names)
        assert list(palette) == list(names)
        assert len(set(palette.values())) == len(names)
    with pytest.raises(FigureError, match="9 names"):
        figures.colours([f"x{i}" for i in range(9)])


# ------------------------------------------------------------- kinds of plots


@pytest.mark.parametrize("plot", PLOTS)
def test_text_is_legible_and_inside_the_figure(plot):
    figure, ax = plot()
    figure.draw_without_rendering()
    assert ax.text(0.5, 0.5, "", transform=ax.transAxes).get_fontsize() == 10
    texts = [t for t in figure.findobj(matplotlib.text.Text) if t.get_text().strip()]
    assert len(texts) > 5
    box = figure.bbox.padded(1)
    for t in texts:
        assert 9 <= t.get_fontsize() <= 10, t.get_text()
        if t.get_visible() and t.axes is not None and t.get_text()[0].isalpha():
            extent = t.get_window_extent()
            corners = extent.corners()
            inside = [box.contains(*corner) for corner in corners]
            assert all(inside), f"{t.get_text()!r} is cut off at {extent}"


@pytest.mark.parametrize("plot", [_strip, _curves, _tradeoff])
def test_names_do_not_cover_each_other(plot):
    figure, ax = plot()
    figure.draw_without_rendering()
    names = [t for t in ax.texts if t.get_text()]
    if plot is _strip:
        names += ax.get_yticklabels()
    boxes = [(t.get_text(), t.get_window_extent().padded(-2)) for t in names]
    assert len(boxes) >= 4
    for i, (one, a) in enumerate(boxes):
        for two, b in boxes[i + 1 :]:
            assert not a.overlaps(b), f"{one!r} covers {two!r}"


def test_strip_draws_every_seed_and_the_mean():
    _, ax = _strip()
    dots = [c for c in ax.collections if isinstance(c, PathCollection)]
    palette = figures.colours(GROUPS)
    for row, (name, values) in enumerate(GROUPS.items()):
        offsets = dots[row].get_offsets()
        assert sorted(offsets[:, 0]) == sorted(values)
        assert np.abs(offsets[:, 1] - row).max() < 0.2
        assert len(np.unique(offsets[:, 1])) == len(values)  # equal seeds stay visible
        assert to_hex(dots[row].get_facecolor()[0]) == palette[name].lower()
        tick = ax.get_yticklabels()[row]
        assert (tick.get_text(), tick.get_color()) == (name, figures.ink(palette[name]))
    means = [c.get_segments()[0][0][0] for c in ax.collections if c not in dots]
    assert means == pytest.approx([np.mean(v) for v in GROUPS.values()])
    assert ax.yaxis_inverted()  # the first name is on top
    assert [line.get_xdata()[0] for line in ax.lines] == [0.80, 0.84]


def test_strip_with_colours_of_ones_own_and_intervals():
    """Twelve names are more than there are colours; one seed has no interval."""
    groups = {f"method {i}": [0.1 * i, 0.2 * i] for i in range(1, 12)} | {"one": [2.0]}
    look = dict.fromkeys(groups, figures.OKABE_ITO["blue"])
    _, ax = figures.canvas()
    figures.strip(ax, groups, look=look, intervals=True)
    s = statistics.summarise([0.1, 0.2])
    bars = [c.get_segments()[0] for c in ax.collections if hasattr(c, "get_segments")]
    bars = [bar for bar in bars if bar[0][1] == bar[1][1]]  # horizontal
    assert len(bars) == 11
    np.testing.assert_allclose(bars[0][:, 0], [s.low, s.high])


def test_curves_draw_every_seed_and_a_mean_to_the_shortest():
    _, ax = figures.canvas()
    figures.curves(ax, {"text": [[3, 2, 1], [5, 4]]}, steps=[10, 20, 30])
    thin, mean = ax.lines[:2], ax.lines[2]
    assert [line.get_xdata().tolist() for line in thin] == [[10, 20, 30], [10, 20]]
    assert mean.get_ydata().tolist() == [4, 3] and mean.get_linewidth() > 2
    assert [t.get_text() for t in ax.texts] == ["text"]


def test_tradeoff_puts_cost_on_a_log_axis():
    _, ax = _tradeoff()
    assert ax.get_xscale() == "log"
    dots = [c for c in ax.collections if isinstance(c, PathCollection)]
    assert dots[0].get_offsets().tolist() == [[46_128, 0.85], [46_128, 0.86]]
    assert {t.get_text() for t in ax.texts} >= {"wander", "frozen head"}


def test_heatmap_numbers_are_right_and_readable():
    _, ax = _heatmap()
    mesh = ax.collections[0]
    assert mesh.cmap.name == "cividis"
    values = np.linspace(-1, 1, 18)
    assert ax.texts[0].get_text() == "−1.00" and ax.texts[-1].get_text() == "1.00"
    for text, value in zip(ax.texts, values, strict=True):
        cell = to_hex(mesh.cmap(mesh.norm(value)))
        assert figures.contrast(text.get_color(), cell) >= 4.5
    with pytest.raises(FigureError, match="3 rows and 5 columns"):
        figures.heatmap(ax, values.reshape(3, 6), "abc", "abcde")


def test_reference_names_a_line_on_either_axis():
    _, (left, right) = figures.canvas(1, 2)
    figures.reference(left, 0.3, "floor", axis="x")
    figures.reference(right, 0.7, "ceiling", axis="y")
    assert list(left.lines[0].get_xdata()) == [0.3, 0.3]
    assert list(right.lines[0].get_ydata()) == [0.7, 0.7]
    assert (left.texts[0].get_text(), right.texts[0].get_text()) == ("floor", "ceiling")


def test_intervals_draw_ends_and_estimate_and_a_label_stands_beside_its_place():
    _, (first, second) = figures.canvas(1, 2)
    rows = {"clips": {"estimate": 0.6, "low": 0.5, "high": 0.8, "half": 0.15}}
    figures.intervals(first, rows)
    figures.intervals(second, rows, names=False)
    assert first.collections[0].get_segments()[0][:, 0].tolist() == [0.5, 0.8]
    assert first.lines[0].get_xdata().tolist() == [0.6]
    named = [[t.get_text() for t in ax.get_yticklabels()] for ax in (first, second)]
    assert named == [["clips"], [""]] and first.yaxis_inverted()
    figures.label(first, "here", (0.6, 0), (3, 4), figures.OKABE_ITO["yellow"])
    text = first.texts[0]
    assert (text.xy, text.get_position()) == ((0.6, 0), (3, 4))
    assert figures.contrast(text.get_color()) >= 4.5


def test_plots_without_reference_lines_stay_quiet():
    _, ax = figures.canvas()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures.strip(ax, {"late": [0.9]})
        figures.curves(ax, {"late": [[0.9, 0.8]]})
        figures.tradeoff(ax, {"late": (10, [0.9])})


@pytest.mark.parametrize("bad", [[], [0.9, np.nan], [np.inf]])
def test_missing_seeds_are_not_dropped_silently(bad):
    _, ax = figures.canvas()
    for draw in (
        lambda: figures.strip(ax, {"late": bad}),
        lambda: figures.curves(ax, {"late": [bad]}),
        lambda: figures.tradeoff(ax, {"late": (10, bad)}),
    ):
        with pytest.raises(FigureError, match="'late' has"):
            draw()


def test_a_film_is_embedded_with_words_for_it(tmp_path):
    film = tmp_path / "clip.mp4"
    film.write_bytes(b"frames")
    still = np.zeros((4, 6, 3), dtype=np.uint8)
    words = "A face smiles and is still again."
    page = figures.player(film, still, label='Clip "A"', words=words).data
    assert base64.b64encode(b"frames").decode() in page
    assert "&quot;A&quot;" in page and words in page
    picture = re.search(r"image/png;base64,([^\"]+)", page)[1]
    assert Image.open(io.BytesIO(base64.b64decode(picture))).size == (6, 4)
    with pytest.raises(FigureError, match="in a sentence"):
        figures.player(film, still, label="Clip", words="A face.")


def test_a_clip_lies_on_one_time_axis():
    frames = np.zeros((3, 4, 4, 3), dtype=np.uint8)
    voice = np.zeros(80, dtype=np.float32)
    media = clips.Media(frames, np.array([0.0, 0.5, 1.0]), voice, 80, 1.0)
    times, bump = np.linspace(0, 1, 5), np.array([0, 0, 1, 0, 0.0])
    tracks = {"smile": ("vision", bump), "lift": ("audio", bump)}
    axes = figures.timeline(media, [("fine", 0.2, 0.6)], times, tracks).axes
    assert [ax.get_ylabel() for ax in axes] == ["words", "voice", "face", "cues"]
    assert [t.get_text() for t in axes[0].texts] == ["fine"]
    assert len(axes[2].images) == 3
    beside = [t.xyann[0] for t in axes[3].texts]
    assert beside[1] < 0.5 < beside[0]  # on either side of the peak


TASTES = {
    "text.usetex": True,
    "text.antialiased": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "mine",
    "font.size": 23,
    "font.family": "serif",
    "axes.grid": True,
    "axes.facecolor": "black",
    "axes.formatter.use_locale": True,
    "axes.xmargin": 0.4,
    "lines.marker": "x",
    "lines.linestyle": ":",
    "patch.linewidth": 7,
    "path.simplify": False,
    "legend.frameon": True,
    "image.origin": "lower",
    "image.interpolation": "nearest",
    "figure.dpi": 33,
    "savefig.dpi": 33,
    "savefig.bbox": "tight",
    "savefig.transparent": True,
    "savefig.facecolor": "red",
    "xtick.direction": "in",
    "ytick.left": False,
}


@pytest.mark.parametrize("draw", [_strip, _curves, _tradeoff])
def test_a_readers_own_settings_change_no_figure(draw):
    pictures = []
    for taste in ({}, TASTES):
        with matplotlib.rc_context(taste):
            figure, _ = draw()
            with matplotlib.rc_context(taste):  # set again before it is shown
                pictures.append(figures.card(figure, **WORDS))
    assert pictures[0] == pictures[1]


def test_a_readers_own_settings_change_no_poster(tmp_path):
    film = tmp_path / "film.mp4"
    film.write_bytes(b"a film")
    still = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    posters = []
    for taste in ({}, TASTES):
        with matplotlib.rc_context(taste):
            made = figures.player(film, still, label="A film", words="A dot goes up.")
            posters.append(made.data)
    assert posters[0] == posters[1]
