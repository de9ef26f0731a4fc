"""One function per figure: arrays and axes in, axes out; nothing is computed here.

Colours are Okabe and Ito's, which can be told apart with any colour vision; every series also has its own line style or
marker, and a label beside it. `caption` writes the parameters that made a figure below it.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator

INK, MUTED, PALE = "#222222", "#767676", "#BBBBBB"
# scratch, the ways of pre-training, controls; orange is kept for what is wrong
COLOURS = {"scratch": "#555555", "simclr": "#0072B2", "barlow_twins": "#009E73", "vicreg": "#CC79A7",
           "random": "#8A8A8A", "pixels": "#999933", "patches": "#882255", "lite0": "#56B4E9"}  # fmt: skip
OTHERS = ("#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#555555", "#F0E442")
WRONG = "#D55E00"
STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
# Paul Tol's "muted" (personal.sron.nl/~pault), told apart with any colour vision and free of orange; and a grey
CLASSES = ("#332288", "#88CCEE", "#117733", "#DDCC77", "#CC6677", "#44AA99", "#AA4499", "#999933", "#882255", "#999999")


def style() -> None:
    """Set the look every figure shares: constrained layout, quiet titles, no edge on legends."""
    rcParams.update({"figure.constrained_layout.use": True, "figure.facecolor": "white", "legend.frameon": False,
                     "axes.titlesize": 11, "axes.labelsize": 10})  # fmt: skip


def colours(names: Iterable[str]) -> list[str]:
    """Return a colour a series: that of the init its name begins with, lighter for each later one of the same init."""
    chosen, taken = [], []
    for position, name in enumerate(names):
        base = next((c for key, c in COLOURS.items() if name.startswith(key)), OTHERS[position % len(OTHERS)])
        white = 0.25 * min(2, taken.count(base))
        taken.append(base)
        chosen.append(to_hex((1 - white) * np.array(to_rgb(base)) + white))
    return chosen


def class_colours(number: int) -> list:
    """Return a colour a class; up to ten can be told apart with any colour vision."""
    import seaborn

    return list(CLASSES[:number]) if number <= len(CLASSES) else seaborn.color_palette("husl", number)


def caption(figure: Figure, **params) -> None:
    """Write the parameters that made the figure in small print below it."""
    text = ", ".join(f"{k.replace('_', ' ')} {short(str(v), 40)}" for k, v in params.items())
    figure.text(0.5, -0.01, text, ha="center", va="top", fontsize=8, color=MUTED)


def short(name: str, most: int = 16) -> str:
    """Return a name on one line, cut to `most` characters, in letters matplotlib can draw, no part of it a formula."""
    name = " ".join(name.encode("utf-8", "backslashreplace").decode().split())
    return plain(name if len(name) <= most else name[: most - 1] + "…")


def plain(text: str) -> str:
    """Return a text no part of which is a formula to matplotlib; what `short` returns stays as it is."""
    return re.sub(r"(?<!\\)\$", r"\\$", text.encode("utf-8", "backslashreplace").decode())


def gallery(
    axes: np.ndarray, images, captions: Sequence[str], marked: Iterable[bool] = (), cmap: str = "gray"
) -> np.ndarray:
    """Draw images [M, C, H, W] (uint8, or float in [0, 1]), one an axes, captions above them, orange where `marked`.

    Captions with an arrow break there if one of them is long.
    """
    if max(map(len, captions), default=0) > 14:
        captions = [text.replace(" → ", "\n→ ") for text in captions]
    captions = [plain(text) for text in captions]
    marked = list(marked) or [False] * len(captions)
    for ax in axes.flat:
        ax.axis("off")
    for ax, image, text, wrong in zip(axes.flat, np.asarray(images), captions, marked, strict=False):
        picture = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
        ax.imshow(picture, cmap=cmap, vmin=0, vmax=255 if picture.dtype == np.uint8 else 1, interpolation="nearest")
        ax.set_title(text, fontsize=9, pad=3, color=WRONG if wrong else INK)
    return axes


def transition(ax: Axes, matrix: np.ndarray, class_names: Sequence[str]) -> Axes:
    """Draw a noise transition matrix [K, K], row true, column given; in percent, written out for up to 20 classes."""
    few = len(class_names) <= 20
    texts = np.vectorize(lambda p: "" if p < 0.005 or np.isnan(p) else f"{100 * p:.0f}")(matrix)
    names = [short(name) for name in class_names] if few else "auto"
    _heatmap(ax, 100 * matrix, texts if few else False, names, names, "percent of the true class",
             vmin=0, vmax=100, square=True, linewidths=0.5 * few)  # fmt: skip
    ax.set(xlabel="given label", ylabel="true class")
    return ax


def confusions(ax: Axes, counts: np.ndarray, class_names: Sequence[str]) -> Axes:
    """Draw how many labels [given, suggested] are suspected, int [K, K], the number in each cell that has some."""
    texts, names = np.vectorize(lambda n: f"{n}" if n else "")(counts), [short(name) for name in class_names]
    _heatmap(ax, counts, texts, names, names, "flagged labels", vmin=0, square=True)
    ax.set(xlabel="suggested label", ylabel="given label")
    return ax


def grid(ax: Axes, values: np.ndarray, rows: Sequence[str], columns: Sequence[str], label: str) -> Axes:
    """Draw values [R, C] between 0 and 1, each written in its cell, the best of each column framed."""
    for column, row in enumerate(values.argmax(0)):
        ax.add_patch(Rectangle((column, row), 1, 1, fill=False, edgecolor=WRONG, linewidth=2))
    texts = np.vectorize("{:.2f}".format)(values)
    return _heatmap(ax, values, texts, [name.replace("_", " ") for name in rows], columns, label, vmin=0, vmax=1)


def table(ax: Axes, values: np.ndarray, texts: np.ndarray, rows: Sequence[str], columns: Sequence[str]) -> Axes:
    """Draw shares [R, C] in percent with `texts` [R, C] in the cells; grey where a value is NaN."""
    ax.set_facecolor("#EEEEEE")
    return _heatmap(ax, 100 * values, texts, rows, columns, "percent")


def _heatmap(ax: Axes, values: np.ndarray, texts, rows, columns, label: str, linewidths=0.5, **options) -> Axes:
    """Draw values [R, C] as colours with `texts` in the cells; `label` is that of the colour bar.

    In a matrix of classes, which is `square`, long names below it are turned.
    """
    import seaborn

    square = options.get("square", False)
    seaborn.heatmap(
        values, ax=ax, cmap="cividis", annot=texts, fmt="", annot_kws={"fontsize": 8}, linewidths=linewidths,
        xticklabels=columns, yticklabels=rows, cbar_kws={"label": label, "shrink": 0.8 if square else 1}, **options,
    )  # fmt: skip
    ax.tick_params(rotation=0, length=0)
    if square and max(map(len, columns)) > 3:
        ax.tick_params(axis="x", rotation=60)
    return ax


def scores(ax: Axes, score: np.ndarray, flagged: np.ndarray, xlabel: str) -> Axes:
    """Draw the histogram of scores [N], flagged ones orange; a line between both where one threshold parts them."""
    names = [f"flagged: {flagged.sum():,}", f"the rest: {(~flagged).sum():,}"]
    ax.hist([score[flagged], score[~flagged]], np.histogram_bin_edges(score, 50), stacked=True, color=[WRONG, PALE],
            label=names)  # fmt: skip
    if flagged.any() and not flagged.all() and score[flagged].max() <= score[~flagged].min():
        ax.axvline(score[flagged].max(), color=INK, linewidth=1, linestyle="--", label="threshold")
    ax.set(xlabel=xlabel, ylabel="images")
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
    return _plain(ax)


def lines(ax: Axes, series: Mapping[str, tuple], xlabel: str, ylabel: str, percent: bool = False) -> Axes:
    """Draw {name: (x [E], y [E] or [S, E])}, each name at the end of its line.

    Of S repeats the mean is drawn, with a band of one sample standard deviation. `percent`: y are shares, shown in %.
    """
    drawn = {}
    for (name, (x, y)), look in zip(series.items(), _looks(series), strict=True):
        x, y = np.asarray(x), np.atleast_2d(np.asarray(y, float)) * (100 if percent else 1)
        mean = y.mean(0)
        [drawn[name]] = ax.plot(x, mean, linewidth=2, **look | {"marker": ""})
        if len(y) > 1:
            deviation = y.std(0, ddof=1)
            ax.fill_between(x, mean - deviation, mean + deviation, color=look["color"], alpha=0.2, linewidth=0)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return _label_ends(ax, drawn)


def points(ax: Axes, series: Mapping[str, tuple], xlabel: str, ylabel: str) -> Axes:
    """Draw {name: (x [R], mean [R], standard deviation [R])}, shares in percent, with error bars and a label a line."""
    drawn = {}
    for (name, values), look in zip(series.items(), _looks(series), strict=True):
        drawn[name], *_ = ax.errorbar(*100 * np.asarray(values, float), linewidth=2, capsize=3, **look)
    ax.set(xlabel=xlabel, ylabel=ylabel, xticks=sorted({round(100 * rate) for x, *_ in series.values() for rate in x}))
    return _label_ends(ax, drawn)


def scaling(ax: Axes, series: Mapping[str, tuple], xlabel: str) -> Axes:
    """Draw {name: (size [S], seconds [S])} on logarithmic axes, each name at the end of its line."""
    ax.set(xscale="log", yscale="log")
    lines(ax, series, xlabel, "seconds")
    sizes = sorted({round(x) for size, _ in series.values() for x in size})
    ax.set_xticks(sizes, [f"{x:,}" for x in sizes])
    low, high = ax.get_ylim()
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.minorticks_off()
    return ax


def precision_recall(ax: Axes, curves: Mapping[str, tuple], flags: Mapping[str, tuple[float, float]]) -> Axes:
    """Draw curves {name: (recall [T], precision [T])} and, as markers, the flags {name: (recall, precision)}."""
    for (name, (recall, precision)), look in zip(curves.items(), _looks(curves), strict=True):
        ax.plot(recall, precision, linewidth=1.8, **look | {"marker": ""})
        ax.plot(*flags[name], markersize=8, markeredgecolor="white", **look | {"linestyle": "none"})
        ax.plot([], [], label=name, **look)
    ax.set(xlabel="recall: share of the wrong labels found", ylabel="precision: share of the found that are wrong")
    ax.set(xlim=(0, 1.02), ylim=(0, 1.02))
    ax.legend(loc="lower left", title="line: ranking, marker: flags")
    return _plain(ax)


def checked(ax: Axes, curves: Mapping[str, tuple], wrong: int) -> Axes:
    """Draw {order: (labels checked [T], share of the wrong ones found [T])}, and where as many as are `wrong` are.

    The orders "ideal" and "random" are references, black and grey. All meet at the end, so a legend names them.
    """
    references = {"ideal": (INK, ":"), "random": (MUTED, "-")}
    looks = iter(zip(OTHERS, STYLES * 2, strict=False))
    for name, (number, found) in curves.items():
        tint, line = references.get(name) or next(looks)
        width = 1.4 if name in references else 2.2
        ax.plot(number, 100 * np.asarray(found), color=tint, linestyle=line, linewidth=width, label=name)
    ax.axvline(wrong, color=MUTED, linewidth=1)
    ax.annotate(f"{wrong:,} labels are wrong", (wrong, 1), (0, 4), xycoords=("data", "axes fraction"),
                textcoords="offset points", ha="center", fontsize=9, color=MUTED)  # fmt: skip
    ax.set(xlabel="labels checked", ylabel="wrong labels found, %", xlim=0, ylim=(0, 102))
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.legend(loc="lower right", title="order of checking")
    return _plain(ax)


def bars(ax: Axes, names: Sequence[str], series: Mapping[str, tuple[np.ndarray, np.ndarray]], ylabel: str) -> Axes:
    """Draw groups of bars: {series: (mean [M], standard deviation [M])} over `names` [M], the value above each bar."""
    width, places = 0.8 / len(series), np.arange(len(names))
    for i, ((label, (mean, deviation)), tint) in enumerate(zip(series.items(), colours(series), strict=True)):
        error = np.nan_to_num(deviation)
        drawn = ax.bar(places + (i - (len(series) - 1) / 2) * width, mean, width * 0.92, color=tint, label=label,
                       yerr=error if error.any() else None, capsize=2)  # fmt: skip
        ax.bar_label(drawn, fmt="%.2f", fontsize=7, padding=2)
    ax.set_xticks(places, [name.replace("_", " ") for name in names])
    ax.set_ylabel(ylabel)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, 1.15), ncols=len(series))
    return _plain(ax)


def ratios(ax: Axes, names: Sequence[str], ratio: np.ndarray, lowest: np.ndarray, highest: np.ndarray) -> Axes:
    """Draw how many times faster we are, a bar a comparison [M] on a logarithmic axis, with its range over rounds."""
    rows, tints = np.arange(len(names))[::-1], np.where(ratio < 1, WRONG, COLOURS["barlow_twins"])
    drawn = ax.barh(
        rows, ratio - 1, left=1, xerr=(ratio - lowest, highest - ratio), color=tints, height=0.6, ecolor=INK
    )
    ax.bar_label(drawn, [f"{r:.1f}x" for r in ratio], padding=6, fontsize=9)
    ax.axvline(1, color=INK, linewidth=1)
    ax.set_yticks(rows, [name.replace("_", " ") for name in names])
    ax.set(xlabel="time of the peer / our time", xscale="log", xlim=(0.6 * min(1, *lowest), 1.6 * max(highest)))
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter("{x:g}x")
    ax.minorticks_off()
    ax.spines[["top", "right", "left"]].set_visible(False)
    return ax


def embedding(ax: Axes, xy: np.ndarray, labels: np.ndarray, class_names: Sequence[str], title: str) -> Axes:
    """Draw an embedding [N, 2], a colour a class, and (up to 20 classes) each name at the median of its points."""
    ax.scatter(*xy.T, c=np.array(class_colours(len(class_names)))[labels], s=5, linewidths=0, alpha=0.8)
    if len(class_names) <= 20:
        present = np.unique(labels)
        medians = np.array([np.median(xy[labels == k], axis=0) for k in present])
        box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.75}
        for k, place in zip(present, _spread(medians, np.ptp(xy, axis=0)), strict=True):
            ax.text(*place, plain(class_names[k]), ha="center", va="center", fontsize=9, fontweight="bold", color=INK,
                    bbox=box)  # fmt: skip
    ax.set_title(title, fontsize=11)
    ax.set_axis_off()
    return ax


def embedding_flags(ax: Axes, xy: np.ndarray, flagged: np.ndarray, title: str) -> Axes:
    """Draw an embedding [N, 2]; flagged points are orange crosses above the grey rest."""
    ax.scatter(*xy[~flagged].T, c=PALE, s=5, linewidths=0)
    ax.scatter(*xy[flagged].T, c=WRONG, s=10, marker="x", linewidths=0.8)
    ax.set_title(title, fontsize=11)
    ax.set_axis_off()
    return ax


def _label_ends(ax: Axes, drawn: Mapping[str, Line2D]) -> Axes:
    """Write the name of each line to the right of its end, moved up where names would overlap."""
    lowest, points = -np.inf, 72 / ax.figure.dpi
    ax.get_ylim()  # what was drawn so far counts only from here on
    for name, line in sorted(drawn.items(), key=lambda pair: pair[1].get_ydata()[-1]):
        end = line.get_xydata()[-1]
        height = points * ax.transData.transform(end)[1]
        lowest = max(height, lowest)
        ax.annotate(plain(name), end, (8, lowest - height), textcoords="offset points", color=line.get_color(),
                    va="center", fontsize=9, annotation_clip=False)  # fmt: skip
        lowest += 13
    return _plain(ax)


def _spread(places: np.ndarray, extent: np.ndarray) -> np.ndarray:
    """Return places [K, 2] moved up, lowest first, until names written there do not overlap."""
    room = extent * (0.24, 0.055)  # a name's width and height, as shares of the axes
    moved = places.copy()
    for n, i in enumerate(order := np.argsort(places[:, 1])):
        while any((abs(moved[i] - moved[j]) < room).all() for j in order[:n]):
            moved[i, 1] += room[1] / 4
    return moved


def _looks(names: Iterable[str]) -> list[dict]:
    """Return colour, line style and marker of each series."""
    return [{"color": c, "linestyle": STYLES[i % 5], "marker": "os^Dv"[i % 5]} for i, c in enumerate(colours(names))]


def _plain(ax: Axes) -> Axes:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="#E5E5E5", linewidth=0.8)
    ax.set_axisbelow(True)
    return ax
