"""Figures draw what they are given, and compute nothing."""

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest

from ptglab.lab import figures

matplotlib.use("Agg")


@pytest.fixture
def ax():
    figure, ax = plt.subplots()
    yield ax
    plt.close(figure)


def luminance(colour: str) -> float:
    return float(np.dot(matplotlib.colors.to_rgb(colour), (0.2126, 0.7152, 0.0722)))


def test_repeated_inits_get_lighter_shades():
    shades = figures.colours(["scratch + full", "simclr + linear", "simclr + light", "simclr + full"])
    assert shades[1] == figures.COLOURS["simclr"].lower()
    assert luminance(shades[1]) < luminance(shades[2]) < luminance(shades[3])
    assert len(set(shades)) == 4


def test_lines_draw_mean_and_band(ax):
    figures.lines(ax, {"a": ([1, 2, 3], [[0.1, 0.2, 0.3], [0.3, 0.4, 0.5]])}, "x", "y", percent=True)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [20, 30, 40])
    [band] = ax.collections
    assert band.get_paths()[0].get_extents().y0 == pytest.approx(20 - 20 / 2**0.5)  # a sample's standard deviation
    figures.lines(ax, {"b": ([1, 2], [[0.1, 0.2]])}, "x", "y", percent=True)
    assert len(ax.collections) == 1  # of a single repeat there is none
    assert [t.get_text() for t in ax.texts] == ["a", "b"]


def test_end_labels_do_not_overlap(ax):
    figures.lines(ax, {f"series {i}": ([0, 1], [0, 1 + i / 1000]) for i in range(5)}, "x", "y")
    ax.figure.canvas.draw()
    boxes = sorted((t.get_window_extent() for t in ax.texts), key=lambda b: b.y0)
    assert all(low.y1 <= high.y0 + 1 for low, high in zip(boxes[:-1], boxes[1:], strict=True))


def test_points_carry_the_deviation(ax):
    figures.points(ax, {"a": ([0.2, 0.4], [0.9, 0.8], [0.01, 0.02])}, "x", "y")
    segments = ax.collections[0].get_segments()
    np.testing.assert_allclose([s[:, 1] for s in segments], [[89, 91], [78, 82]])


def test_transition_writes_percentages(ax):
    figures.transition(ax, np.array([[0.6, 0.4], [0.001, 0.999]]), ["a", "b"])
    assert [t.get_text() for t in ax.texts] == ["60", "40", "", "100"]


def test_gallery_marks_the_wrong_ones():
    figure, axes = plt.subplots(1, 3)
    images = np.zeros((2, 3, 4, 5), np.uint8)
    figures.gallery(axes, images, ["a", "b"], [False, True])
    assert [ax.get_title() for ax in axes] == ["a", "b", ""]
    assert axes[1].title.get_color() == figures.WRONG
    assert axes[0].images[0].get_array().shape == (4, 5, 3)
    plt.close(figure)


def test_class_names_do_not_cover_each_other(ax):
    xy = np.random.default_rng(0).normal(size=(500, 2))  # every class in the same place
    figures.embedding(ax, xy, np.arange(500) % 5, ["airplane", "automobile", "bird", "cat", "deer"], "t")
    ax.figure.canvas.draw()
    boxes = [t.get_window_extent() for t in ax.texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


@pytest.mark.parametrize("slowest, ticks", [(0.9, ["0.1", "0.2", "0.5", "1"]), (90, ["0.1", "1", "10", "100"])])
def test_scaling_has_ticks_within_a_decade_and_over_many(ax, slowest, ticks):
    sizes = [16, 32, 200_000]
    figures.scaling(ax, {"epoch": (sizes, [0.12, 0.3, slowest]), "views": (sizes[:2], [0.11, 0.2])}, "pixels a side")
    ax.figure.canvas.draw()
    low, high = ax.get_ylim()
    shown = [t.get_text() for t in ax.get_yticklabels() if low <= t.get_position()[1] <= high]
    assert set(shown) <= set(ticks) and len(shown) >= 3
    assert [t.get_text() for t in ax.get_xticklabels()] == ["16", "32", "200,000"]
    assert {t.get_text() for t in ax.texts} == {"epoch", "views"}


def test_confusions_write_each_number_once(ax):
    figures.confusions(ax, np.array([[0, 12], [3, 0]]), ["cat", "dog"])
    assert sorted(t.get_text() for t in ax.texts) == ["", "", "12", "3"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["cat", "dog"]
    assert ax.get_xlabel() == "suggested label" and ax.get_ylabel() == "given label"


def test_grid_frames_the_best_of_each_column(ax):
    figures.grid(ax, np.array([[0.1, 0.9], [0.8, 0.2]]), ["a_b", "c"], ["x", "y"], "F1")
    frames = [patch.get_xy() for patch in ax.patches]
    assert frames == [(0, 1), (1, 0)]
    assert [t.get_text() for t in ax.texts] == ["0.10", "0.90", "0.80", "0.20"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a b", "c"]


@pytest.mark.parametrize("threshold", [True, False])
def test_scores_count_what_is_flagged_and_draw_a_threshold_where_there_is_one(ax, threshold):
    score = np.linspace(0, 1, 101)
    flagged = score < 0.205
    flagged[-1] = not threshold
    figures.scores(ax, score, flagged, "score")
    heights = [sum(bar.get_height() for bar in bars) for bars in ax.containers]
    assert heights == [flagged.sum(), (~flagged).sum()]
    assert [line.get_xdata()[0] for line in ax.lines] == ([0.2] if threshold else [])


def test_short_names_fit_on_a_line_and_are_no_formulas(ax):
    assert figures.short("cat") == "cat"
    assert figures.short("a\nb\tc  d") == "a b c d"
    assert figures.short("x" * 40) == "x" * 15 + "…"
    ax.set_title(figures.short("$x_1^{$ \udcff & <b>"))
    figures.caption(ax.figure, dataset="\udcff $x_1^{$")
    ax.figure.canvas.draw()  # a formula that cannot be read raises, and so does half a character


def test_no_name_of_a_class_is_a_formula(ax):
    """mathtext raises at the second dollar of the first name."""
    names = ["$x_1^{$", "\\$a$", "b"]
    figures.transition(ax, np.eye(3), names)
    figures.embedding(ax, np.eye(3, 2), np.arange(3), names, "t")
    figures.lines(ax, {name: ([1, 2], [0, k]) for k, name in enumerate(names)}, "x", "y")
    figures.points(ax, {name: ([0.2], [0.9], [np.nan]) for name in names}, "x", "y")
    figures.gallery(np.array([ax]), np.zeros((1, 1, 4, 4), np.uint8), names[:1])
    ax.figure.canvas.draw()


def test_checked_draws_shares_in_percent_and_the_number_of_wrong_labels(ax):
    steps = [1, 2, 4]
    figures.checked(ax, {"knn": (steps, [0.5, 0.5, 1]), "ideal": (steps, [0.5, 1, 1])}, 2)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [50, 50, 100])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["knn", "ideal"]
    assert ax.lines[1].get_color() == figures.INK and ax.texts[0].get_text() == "2 labels are wrong"


def test_table_writes_what_it_is_told_and_leaves_gaps_empty(ax):
    values, texts = np.array([[0.5, np.nan], [0.9, 0.7]]), np.array([["50 ± 1", ""], ["90 ± 2", "70 ± 3"]])
    figures.table(ax, values, texts, ["scratch", "simclr"], ["uniform\n20%", "uniform\n40%"])
    assert [text.get_text() for text in ax.texts] == ["50 ± 1", "90 ± 2", "70 ± 3"]
    np.testing.assert_allclose(ax.collections[0].get_array().compressed(), [50, 90, 70])
    assert [label.get_text() for label in ax.get_yticklabels()] == ["scratch", "simclr"]
