"""What an audit leaves: tables, a gallery that any browser opens, and files for labelling tools."""

import base64
import hashlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote
from xml.etree import ElementTree

import jinja2
import numpy as np
import pandas as pd
from PIL import Image
from tqdm import tqdm

from ptglab import __version__
from ptglab.data.decode import upright
from ptglab.data.images import ImageSet
from ptglab.detect.suspects import Suspects
from ptglab.errors import InputError
from ptglab.lab import runs
from ptglab.text import escape_formula

BLOCK_ROWS = 1 << 14  # of a table that are text at a time
SMALL = 64  # pixels a side: up to this a picture is kept exact, and enlarged without blur
NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # XML 1.0, production 2


def write(folder: str | Path, image_set: ImageSet, suspects: Suspects, told: dict, source: str | Path) -> Path:
    """Leave suspects.csv, gallery.html, label_studio.json and .xml, fiftyone.csv and summary.json in `folder`.

    told: what summary.json holds, `detector`, `rate`, `low` and `high` at least; source: what the set was loaded from.
    Returns the document root for Label Studio, see `label_studio`. Raises InputError if the suspects are another set's.
    """
    folder, title = Path(folder), Path(os.path.abspath(source)).name or str(source)
    write_csv(folder / "suspects.csv", table(image_set, suspects))
    root = label_studio(folder / "label_studio.json", image_set, suspects, source)
    fiftyone(folder / "fiftyone.csv", image_set, suspects)
    rate = [told[name] for name in ("rate", "low", "high")]
    gallery(folder / "gallery.html", image_set, suspects, title, told["detector"], rate)
    _write(folder / "summary.json", json.dumps(told, indent=1) + "\n")
    return root


def table(image_set: ImageSet, suspects: Suspects) -> pd.DataFrame:
    """Return a row an image: id, given, suggested (class names), score (float32, low = suspicious), flagged (bool).

    The most suspicious comes first, of equals the first of the set; the index is the row in the set. Raises InputError
    if the suspects are those of another set.
    """
    n = len(image_set)
    if not n == len(suspects.score) == len(suspects.flagged) == len(suspects.suggested):
        raise InputError(f"there are {len(suspects.score)} scores for {n} images: they must be of the same set")
    order = np.argsort(suspects.score, kind="stable")
    ids, names = _texts(image_set.ids), _texts(image_set.class_names)
    given, suggested = names[image_set.labels_given[order]], names[suspects.suggested[order]]
    columns = {"id": ids[order], "given": given, "suggested": suggested}
    return pd.DataFrame(columns | {"score": suspects.score[order], "flagged": suspects.flagged[order]}, index=order)


def unreadable(folder: str | Path, image_set: ImageSet) -> None:
    """Write unreadable.csv into `folder`: id and reason of everything that is not among the images of the set."""
    rows = [_texts(pair) for pair in image_set.unreadable]
    write_csv(Path(folder) / "unreadable.csv", pd.DataFrame(rows, columns=["id", "reason"]))


def oddities(
    folder: str | Path,
    image_set: ImageSet,
    pairs: np.ndarray,
    difference: np.ndarray,
    score: np.ndarray,
    flagged: np.ndarray,
) -> None:
    """Write duplicates.csv, a row a pair, and outliers.csv, the flagged ones, the oddest first, into `folder`.

    pairs: int64 [P, 2], rows of the set; difference: float [P]; score: float [N], low = odd; flagged: bool [N].
    """
    ids, given = _texts(image_set.ids), _texts(image_set.class_names)[image_set.labels_given]
    first, second = pairs.T
    columns = {"id": ids[first], "given": given[first], "other_id": ids[second], "other_given": given[second]}
    write_csv(Path(folder) / "duplicates.csv", pd.DataFrame(columns | {"difference": difference}))
    order = np.argsort(score, kind="stable")
    odd = order[flagged[order]]
    columns = {"id": ids[odd], "given": given[odd], "score": score[odd]}
    write_csv(Path(folder) / "outliers.csv", pd.DataFrame(columns))


def write_csv(path: str | Path, frame: pd.DataFrame) -> None:
    """Write `frame` without its index: UTF-8, lines that end in a newline, quoted as RFC 4180 has it, missing empty.

    Any name comes back from `csv`, and from `pandas.read_csv(path, dtype=str, keep_default_na=False)`, but for one
    that begins as a formula does, with = + - @, a tab or a line end, or so behind apostrophes: an apostrophe more keeps
    spreadsheets from running it (OWASP, "CSV Injection"). `text.unescape_formula` takes it off, as `data.load` does.
    """

    # Not DataFrame.to_csv: before Python 3.13 a carriage return alone goes unquoted there, and ends the row.
    def save(temporary: Path) -> None:
        with open(temporary, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            file.write(",".join(map(_cell, frame.columns)) + "\n")
            for start in range(0, len(frame), BLOCK_ROWS):
                part = frame[start : start + BLOCK_ROWS]
                columns = [_cells(part.iloc[:, i]) for i in range(part.shape[1])]
                file.writelines(",".join(line) + "\n" for line in zip(*columns, strict=True))

    runs.write(Path(path), save)


def thumbnails(image_set: ImageSet, rows: Iterable[int], side: int = 128) -> list[bytes]:
    """Return a picture a row, PNG or JPEG, at most `side` pixels wide and high, of its own aspect.

    It comes from the image file, upright, without alpha; of a set that has no files, or where the file cannot be
    decoded any more, from the uint8 tensor: its first channel, or first three.
    """
    return _in_parallel(lambda row: _encoded(_thumbnail(image_set, row, side)), rows, "thumbnails")


def pictures(folder: str | Path, image_set: ImageSet, rows: Iterable[int]) -> list[Path]:
    """Return the absolute path of a picture a row: its file, or of a set without files a PNG put in `folder`/images."""
    images = Path(os.path.abspath(folder)) / "images"
    if len(image_set.files):
        return [Path(os.path.abspath(image_set.files[row])) for row in rows]
    images.mkdir(parents=True, exist_ok=True)

    def put(row: int) -> Path:
        path = images / f"{row:06d}.png"
        png = _encoded(_from_tensor(image_set, row), exact=True)
        if not path.exists() or path.read_bytes() != png:
            runs.write(path, lambda temporary: temporary.write_bytes(png))
        return path

    return _in_parallel(put, rows, "writing pictures")


def gallery(
    path: str | Path,
    image_set: ImageSet,
    suspects: Suspects,
    title: str,
    detector: str,
    rate: Sequence[float] | None = None,
    most: int = 1000,
    side: int = 128,
) -> None:
    """Write one HTML page, which needs no network: the suspects as cards to filter, search and sort.

    rate: the estimated share of wrong labels, and the least and the most that any estimate allows. There are at most
    `most` cards: the flagged images, the most suspicious first, and the most suspicious of the others; `side`: of
    their pictures, in pixels. Raises InputError if the suspects are those of another set.
    """
    path, frame = Path(path), table(image_set, suspects)
    # Places in the order of suspicion: flagged ones before the others get a card; then in that order again.
    chosen = frame.iloc[np.sort(np.argsort(~frame["flagged"].to_numpy(), kind="stable")[:most])]
    cards, seen = [], {}
    for row, picture, cells in zip(
        chosen.index, thumbnails(image_set, chosen.index, side), chosen.itertuples(index=False), strict=True
    ):
        pair = (int(image_set.labels_given[row]), int(suspects.suggested[row]))
        seen.setdefault(pair, Counter())[bool(cells.flagged)] += 1
        with Image.open(io.BytesIO(picture)) as image:
            kind, crisp = image.format.lower(), max(image.size) <= SMALL
        source = f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"
        link = _link(image_set.files[row], path.parent) if len(image_set.files) else None
        cards.append(cells._asdict() | {"pair": pair, "picture": source, "crisp": crisp, "link": link})
    pairs = [{"pair": pair, "flagged": n[True], "all": n.total()} for pair, n in seen.items()]
    pairs.sort(key=lambda p: (-p["flagged"], -p["all"], p["pair"]))
    stamp = runs.stamp()
    html = _template().render(
        title=title, detector=detector, rate=rate, cards=cards, pairs=pairs, class_names=image_set.class_names,
        images=len(image_set), flagged=int(suspects.flagged.sum()), unreadable=len(image_set.unreadable),
        versions=f"ptglab {__version__} {stamp['commit']}".strip() + f", torch {stamp['torch_version']}",
    )  # fmt: skip
    _write(path, html)


def label_studio(path: str | Path, image_set: ImageSet, suspects: Suspects, source: str | Path = "") -> Path:
    """Write the flagged images, the most suspicious first, as Label Studio tasks, and beside them `label_studio.xml`.

    The suggested label is the prediction of each task. source: the folder that a set of files was loaded from; of any
    other set the pictures are put into `images` beside `path`. Label Studio serves local files from its "document
    root" if a folder below it is added as local storage, so the pictures are named relative to the folder around
    theirs, which is returned: it goes into LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT, and the one below it into the
    storage. Formats: Label Studio's guides "Import pre-annotated data" and "Sync data from external storage" (local
    storage, tasks with file references). Raises InputError if the suspects are those of another set.
    """
    path, frame = Path(path), table(image_set, suspects)
    frame = frame[frame["flagged"]]
    root = Path(os.path.abspath(source if len(image_set.files) else path.parent)).parent
    tasks = []
    for file, row in zip(pictures(path.parent, image_set, frame.index), frame.itertuples(), strict=True):
        choice = {"id": f"row{row.Index}", "type": "choices", "from_name": "label", "to_name": "image",
                  "value": {"choices": [_xml(row.suggested)]}}  # fmt: skip
        tasks.append({
            "data": {"image": f"/data/local-files/?d={_quoted(file, root)}", "id": row.id, "given": row.given},
            "predictions": [{"model_version": f"ptglab {__version__}", "score": float(row.score), "result": [choice]}],
        })  # fmt: skip
    _write(path, json.dumps(tasks, ensure_ascii=False, indent=1) + "\n")
    view = ElementTree.Element("View")
    ElementTree.SubElement(view, "Image", name="image", value="$image")
    ElementTree.SubElement(view, "Header", value="Given label:")
    ElementTree.SubElement(view, "Header", value="$given")
    choices = ElementTree.SubElement(
        view, "Choices", name="label", toName="image", choice="single", showInline="true", required="true"
    )
    for name in image_set.class_names:
        ElementTree.SubElement(choices, "Choice", value=_xml(name))
    ElementTree.indent(view)
    _write(path.with_suffix(".xml"), ElementTree.tostring(view, encoding="unicode") + "\n")
    return root


def fiftyone(path: str | Path, image_set: ImageSet, suspects: Suspects) -> None:
    """Write a CSV with columns filepath (absolute), ground_truth, suggested, score, flagged for FiftyOne.

    Every image of a set of files has a row, the most suspicious first; of any other set the flagged ones, whose
    pictures are put into `images` beside `path`. To load it as FiftyOne's guide "Importing data" loads custom formats:

        import fiftyone as fo, pandas as pd

        dataset = fo.Dataset("suspects")
        for row in pd.read_csv("fiftyone.csv", dtype={"ground_truth": str, "suggested": str}).itertuples():
            sample = fo.Sample(filepath=row.filepath, score=row.score, flagged=row.flagged)
            sample["ground_truth"] = fo.Classification(label=row.ground_truth)
            sample["suggested"] = fo.Classification(label=row.suggested)
            dataset.add_sample(sample)
        fo.launch_app(dataset).wait()

    Raises InputError if the suspects are those of another set.
    """
    frame = table(image_set, suspects).rename(columns={"given": "ground_truth"})
    if not len(image_set.files):
        frame = frame[frame["flagged"]]
    files = [_text(str(file)) for file in pictures(Path(path).parent, image_set, frame.index)]
    columns = ["ground_truth", "suggested", "score", "flagged"]
    write_csv(path, pd.concat([pd.Series(files, frame.index, str, "filepath"), frame[columns]], axis=1))


def _text(value: str) -> str:
    """Return `value` with what cannot be encoded, as bytes of a file name that are no text, written as `\\udcff`."""
    return value.encode("utf-8", "backslashreplace").decode("utf-8")


def _texts(values: Iterable[str]) -> np.ndarray:
    return np.array([_text(value) for value in values], object)


def _xml(value: str) -> str:
    """Return `value` with what XML forbids replaced."""
    return NOT_XML.sub("\ufffd", _text(value))


def _cells(column: pd.Series) -> list[str]:
    """Return the cells of a column; texts are made `escape_formula`, numbers stay as they are."""
    values = column.to_numpy()  # whose float32 are written as short as they are
    return [_cell(escape_formula(value) if isinstance(value, str) else value) for value in values]


def _cell(value: object) -> str:
    text = "" if value is None or value != value else str(value)  # NaN alone differs from itself
    return '"' + text.replace('"', '""') + '"' if re.search('[",\r\n]', text) else text


def _write(path: str | Path, text: str) -> None:
    runs.write(Path(path), lambda temporary: temporary.write_bytes(text.encode("utf-8", "backslashreplace")))


def _quoted(file: str | Path, start: Path) -> str:
    """Return the path from `start` to `file`, percent-quoted; also the bytes that are no text."""
    return quote(os.fsencode(Path(os.path.relpath(file, start)).as_posix()))


def _link(file: str | Path, start: Path) -> str:
    """Return a URL that leads from the folder `start` to `file`."""
    try:
        return "./" + _quoted(file, start)  # nothing before the first slash can be taken for a scheme
    except ValueError:  # another drive of Windows
        return Path(os.path.abspath(file)).as_uri()


def _in_parallel(task: Callable[[int], object], rows: Iterable[int], title: str) -> list:
    """Return [task(row), ...], in threads, under a progress bar once it takes longer."""
    rows = [int(row) for row in rows]
    with ThreadPoolExecutor() as pool:
        done = pool.map(task, rows)
        return list(tqdm(done, title, len(rows), leave=False, unit=" images", delay=3))


def _thumbnail(image_set: ImageSet, row: int, side: int) -> Image.Image:
    try:
        picture = upright(image_set.files[row], 2 * side) if len(image_set.files) else _from_tensor(image_set, row)
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


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["sha256"] = lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return environment.get_template("gallery.html.j2")
