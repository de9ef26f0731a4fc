"""What an audit leaves: tables, a gallery that any browser opens, and files for labelling tools."""

import base64
import hashlib
import io
import os
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from tqdm.contrib.concurrent import thread_map

from ptglab import __version__, files
from ptglab.data.decode import upright
from ptglab.data.images import ImageSet, located
from ptglab.detect.suspects import Suspects
from ptglab.errors import InputError
from ptglab.lab import runs
from ptglab.text import unescape_formula

SMALL = 64  # pixels a side: up to this a picture is kept exact (PNG), and enlarged without blur
# What an attribute of XML cannot hold as it is (XML 1.0, production 2 and section 3.3.3)
NOT_XML = re.compile("[^\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def write(
    folder: str | Path, image_set: ImageSet, suspects: Suspects, summary: dict, source: str | Path,
    probability: np.ndarray | None = None,
) -> dict[str, str]:  # fmt: skip
    """Write suspects.csv, gallery.html, label_studio.json and .xml, fiftyone.csv and summary.json into `folder`.

    summary: what summary.json holds, `detector` and what `in_words` reads at least;
    source: what the set was loaded from; probability: see `label_studio`. Returns `next_steps`, which summary.json
    holds as `next`. Raises InputError if the suspects are those of another set.
    """
    folder, title = Path(folder), Path(os.path.abspath(source)).name or str(source)
    write_table(folder / "suspects.csv", table(image_set, suspects))
    label_studio(folder / "label_studio.json", image_set, suspects, probability)
    fiftyone(folder / "fiftyone.csv", image_set, suspects)
    steps = next_steps(folder, image_set, source)
    gallery(folder / "gallery.html", image_set, suspects, title, summary["detector"], in_words(summary), steps)
    files.write_json(folder / "summary.json", summary | {"next": steps})
    return steps


def in_words(summary: dict) -> list[str]:
    """Return what a summary says of the labels, a sentence each."""
    flagged = f"{summary['flagged']:,} of {summary['images']:,} labels look wrong"
    if summary["unknown"]:
        return [summary["unknown"], f"All the same, {flagged}: believe none of it without looking."]
    number, expected, low, high = summary["first"]
    return [
        f"{flagged}.",
        f"Estimated share of wrong labels: {summary['rate']:.1%} ({summary['low']:.1%} to {summary['high']:.1%}).",
        f"Of the first {number:,} suspects, {expected:.0%} are likely to be wrong ({low:.0%} to {high:.0%}).",
    ]


def table(image_set: ImageSet, suspects: Suspects) -> pd.DataFrame:
    """Return one row per image: id, given, suggested (class names), score (float32, low = suspicious), flagged (bool).

    The most suspicious image comes first, ties in the order of the set; the index is the row in the set. Raises
    InputError if the suspects are those of another set.
    """
    n = len(image_set)
    if not n == len(suspects.score) == len(suspects.flagged) == len(suspects.suggested):
        raise InputError(f"there are {len(suspects.score)} scores for {n} images: they must be of the same set")
    order, names = np.argsort(suspects.score, kind="stable"), _texts(image_set.class_names)
    columns = {"given": names[image_set.labels_given], "suggested": names[suspects.suggested]}
    columns = {"id": _texts(image_set.ids)} | columns | {"score": suspects.score, "flagged": suspects.flagged}
    return pd.DataFrame(columns).iloc[order]


def read_table(path: Path) -> pd.DataFrame:
    """Return a table that `write_table` wrote, every cell as text."""
    return pd.read_csv(files.small_enough(path), dtype=str, keep_default_na=False).map(unescape_formula)


def write_table(path: Path, frame: pd.DataFrame) -> None:
    """Write `frame` by `files.write_csv`, float32 with as few digits as tell them apart."""
    short = {name: [float(str(x)) for x in frame[name].to_numpy()] for name in frame.select_dtypes("float32")}
    files.write_csv(path, frame.assign(**short))


def unreadable(folder: str | Path, image_set: ImageSet) -> None:
    """Write unreadable.csv into `folder`: the id and reason of everything that is not among the images of the set."""
    rows = [_texts(pair) for pair in image_set.unreadable]
    write_table(Path(folder) / "unreadable.csv", pd.DataFrame(rows, columns=["id", "reason"]))


def duplicates(folder: str | Path, image_set: ImageSet, pairs: np.ndarray, difference: np.ndarray) -> None:
    """Write duplicates.csv into `folder`, one row per pair; pairs: int64 [P, 2], rows of the set; difference: [P].

    Pairs that hang together have one number in the column `group`, from 1; in `conflict` stands whether the two labels
    differ. Groups with a conflict come first.
    """
    ids, given = _texts(image_set.ids), _texts(image_set.class_names)[image_set.labels_given]
    first, second = pairs.T
    graph = coo_array((np.ones(len(pairs), bool), (first, second)), shape=(len(ids), len(ids)))
    group, conflict = connected_components(graph, directed=False)[1][first], given[first] != given[second]
    columns = {"group": group, "id": ids[first], "given": given[first], "other_id": ids[second]}
    columns |= {"other_given": given[second], "difference": difference, "conflict": conflict}
    frame = pd.DataFrame(columns).iloc[np.lexsort((group, ~np.isin(group, group[conflict])))]
    write_table(Path(folder) / "duplicates.csv", frame.assign(group=pd.factorize(frame["group"])[0] + 1))


def outliers(folder: str | Path, image_set: ImageSet, score: np.ndarray, flagged: np.ndarray) -> None:
    """Write outliers.csv into `folder`: the flagged images, the lowest `score` first; both [N]."""
    order = np.argsort(score, kind="stable")
    order = order[flagged[order]]
    names = _texts(image_set.class_names)[image_set.labels_given[order]]
    columns = {"id": _texts(image_set.ids)[order], "given": names, "score": score[order]}
    write_table(Path(folder) / "outliers.csv", pd.DataFrame(columns))


def thumbnails(image_set: ImageSet, rows: Iterable[int], side: int = 128) -> list[bytes]:
    """Return one picture per row, PNG or JPEG, at most `side` pixels wide and high, with its own aspect ratio.

    It comes from the image file, upright, as a network sees it. Where the set has no files, or the file can no longer
    be decoded, it comes from the uint8 tensor: its first channel, or its first three.
    """
    return _in_parallel(lambda row: _encoded(_thumbnail(image_set, row, side)), rows, "thumbnails")


def pictures(folder: str | Path, image_set: ImageSet, rows: Iterable[int]) -> list[Path]:
    """Return the absolute path of one picture per row: its file, or a PNG put in `folder`/images if there is none."""
    images = Path(os.path.abspath(folder)) / "images"
    if len(image_set.files):
        return [Path(os.path.abspath(image_set.files[row])) for row in rows]
    images.mkdir(parents=True, exist_ok=True)

    def put(row: int) -> Path:
        path = images / f"{row:06d}.png"
        png = _encoded(_from_tensor(image_set, row), exact=True)
        if not path.exists() or path.read_bytes() != png:
            files.write(path, lambda temporary: temporary.write_bytes(png))
        return path

    return _in_parallel(put, rows, "writing pictures")


def gallery(
    path: str | Path, image_set: ImageSet, suspects: Suspects, title: str, detector: str,
    said: Sequence[str] = (), steps: Mapping[str, str] | None = None, most: int = 1000,
) -> None:  # fmt: skip
    """Write one HTML page, which needs no network: the suspects as cards to filter, search and sort.

    said: sentences on the labels, see `in_words`; steps: see `next_steps`. There are at most `most` cards: the flagged
    images, the most suspicious first, and the most suspicious of the others. Raises InputError if the suspects are
    those of another set.
    """
    path, frame = Path(path), table(image_set, suspects)
    # Places in the order of suspicion: flagged images get a card before the others; then in that order again.
    chosen = frame.iloc[np.sort(np.argsort(~frame["flagged"].to_numpy(), kind="stable")[:most])]
    cards, seen = [], {}
    for cells, picture in zip(chosen.itertuples(), thumbnails(image_set, chosen.index), strict=True):
        row = cells.Index
        pair = (int(image_set.labels_given[row]), int(suspects.suggested[row]))
        seen.setdefault(pair, Counter())[bool(cells.flagged)] += 1
        crisp = picture.startswith(b"\x89PNG")
        source = f"data:image/{'png' if crisp else 'jpeg'};base64,{base64.b64encode(picture).decode()}"
        link = _link(image_set.files[row], path.parent) if len(image_set.files) else None
        cards.append(cells._asdict() | {"pair": pair, "picture": source, "crisp": crisp, "link": link})
    pairs = [{"pair": pair, "flagged": n[True], "all": n.total()} for pair, n in seen.items()]
    pairs.sort(key=lambda p: (-p["flagged"], -p["all"], p["pair"]))
    stamp = runs.stamp()
    html = _template("gallery.html").render(
        title=title, detector=detector, said=said, steps=steps, cards=cards, pairs=pairs,
        images=len(image_set), flagged=int(suspects.flagged.sum()), unreadable=len(image_set.unreadable),
        class_names=image_set.class_names,
        versions=f"ptglab {__version__} {stamp['commit']}".strip() + f", torch {stamp['torch_version']}",
    )  # fmt: skip
    files.write(path, lambda temporary: temporary.write_bytes(html.encode("utf-8", "backslashreplace")))


def label_studio(
    path: str | Path, image_set: ImageSet, suspects: Suspects, probability: np.ndarray | None = None
) -> None:
    """Write the flagged images, the most suspicious first, as Label Studio tasks, and `label_studio.xml` beside them.

    The suggested label is the prediction of each task; probability: how probable it is, [N], its score, by default the
    detector's. The pictures of a set without files are put into `images` beside `path`. Label Studio serves local files
    from below its "document root" if a folder in there is added as local storage: `next_steps` says how.
    Formats: Label Studio's guides "Import pre-annotated data" and "Sync data from external storage" (local storage,
    tasks with file references). Raises InputError if the suspects are those of another set.
    """
    path, frame = Path(path), table(image_set, suspects)
    frame, score = frame[frame["flagged"]], suspects.score if probability is None else probability
    root, version, tasks = _served(path.parent, image_set).parent, f"ptglab {__version__}", []
    for file, row in zip(pictures(path.parent, image_set, frame.index), frame.itertuples(), strict=True):
        choice = {"id": f"row{row.Index}", "type": "choices", "from_name": "label", "to_name": "image",
                  "value": {"choices": [_xml(row.suggested)]}}  # fmt: skip
        tasks.append({
            "data": {"image": f"/data/local-files/?d={_quoted(file, root)}", "id": row.id, "given": row.given},
            "predictions": [{"model_version": version, "score": float(score[row.Index]), "result": [choice]}],
        })  # fmt: skip
    files.write_json(path, tasks)
    xml = _template("label_studio.xml").render(names=[_xml(name) for name in _texts(image_set.class_names)])
    files.write(path.with_suffix(".xml"), lambda temporary: temporary.write_text(xml, encoding="utf-8"))


def next_steps(folder: str | Path, image_set: ImageSet, source: str | Path) -> dict[str, str]:
    """Return how to go on from an audit in `folder`: `review`, a line to type, and `label_studio`, three lines.

    Paths are absolute: a notebook that JupyterLab opens runs in its own folder.
    """
    folder, source, served = Path(os.path.abspath(folder)), located(source), _served(folder, image_set)
    copy, options = str(folder / "review.ipynb"), [f"audit_run={folder}", f"run_dir={folder / 'review'}"]
    options += [f"dataset={os.path.abspath(source)}"] if os.path.exists(source) else []
    run = ["ptglab", "run", "07_review_suspects", copy, *(word for option in options for word in ("-p", option))]
    lines = _template("label_studio.txt").render(root=shlex.quote(str(served.parent)), served=served, folder=folder)
    steps = [f"{shlex.join(run)} && {shlex.join(['jupyter', 'lab', copy])}", lines]
    return dict(zip(("review", "label_studio"), _texts(steps), strict=True))


def _served(folder: str | Path, image_set: ImageSet) -> Path:
    """Return the folder below which all pictures lie: the image files, or those in `folder` if there are none."""
    folders = {os.path.dirname(os.path.abspath(file)) for file in image_set.files} or {os.path.abspath(folder)}
    return Path(os.path.commonpath(folders))


def fiftyone(path: str | Path, image_set: ImageSet, suspects: Suspects) -> None:
    """Write a CSV with columns filepath (absolute), ground_truth, suggested, score, flagged for FiftyOne.

    Every image of a set of files has a row, the most suspicious first. Of any other set only the flagged images have
    one, and their pictures are put into `images` beside `path`. The gallery says how it is loaded, as FiftyOne's guide
    "Importing data" loads custom formats. Raises InputError if the suspects are those of another set.
    """
    frame = table(image_set, suspects).rename(columns={"given": "ground_truth"})
    if not len(image_set.files):
        frame = frame[frame["flagged"]]
    frame.insert(0, "filepath", _texts(map(str, pictures(Path(path).parent, image_set, frame.index))))
    write_table(Path(path), frame.drop(columns="id"))


def _texts(values: Iterable[str]) -> np.ndarray:
    """Return the texts, object [N]; bytes of a file name that are not UTF-8 are written as `\\udcff`."""
    return np.array([value.encode("utf-8", "backslashreplace").decode() for value in values], object)


def _xml(value: str) -> str:
    """Return `value` with what an attribute of XML cannot hold replaced."""
    return NOT_XML.sub("\ufffd", value)


def _quoted(file: str | Path, start: Path) -> str:
    """Return the path from `start` to `file`, percent-quoted, including bytes that are not UTF-8."""
    return quote(os.fsencode(Path(os.path.relpath(file, start)).as_posix()))


def _link(file: str | Path, start: Path) -> str:
    """Return a URL that leads from the folder `start` to `file`."""
    try:
        return "./" + _quoted(file, start)  # nothing before the first slash can be taken for a scheme
    except ValueError:  # another drive of Windows
        return Path(os.path.abspath(file)).as_uri()


def _in_parallel(task: Callable[[int], object], rows: Iterable[int], title: str) -> list:
    """Return [task(row), ...], computed in threads; a progress bar shows after three seconds."""
    return thread_map(task, [int(row) for row in rows], desc=title, leave=False, unit=" images", delay=3)


def _thumbnail(image_set: ImageSet, row: int, side: int) -> Image.Image:
    try:
        scale = image_set.originals and image_set.originals.scale
        picture = upright(image_set.files[row], 2 * side, scale) if image_set.files else _from_tensor(image_set, row)
        picture = picture.convert("L" if picture.mode in ("1", "L", "LA") else "RGB")
    except Exception:  # a decoder may raise anything on a file that has changed since it was loaded
        picture = _from_tensor(image_set, row)
    picture.thumbnail((side, side))
    return picture


def _from_tensor(image_set: ImageSet, row: int) -> Image.Image:
    array = image_set.images[row].numpy()  # [C, H, W]
    array = array[0] if len(array) < 3 else array[:3].transpose(1, 2, 0)
    return Image.fromarray(np.ascontiguousarray(array))


def _encoded(picture: Image.Image, exact: bool = False) -> bytes:
    file = io.BytesIO()
    if exact or max(picture.size) <= SMALL:
        picture.save(file, "PNG")
    else:
        picture.save(file, "JPEG", quality=85)
    return file.getvalue()


def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=name != "label_studio.txt", undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["quoteattr"] = lambda text: Markup(quoteattr(text))  # line ends stay what they are
    environment.filters["sha256"] = lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return environment.get_template(f"{name}.j2")
