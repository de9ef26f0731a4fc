"""One set of images from start to report: `run` audits it, `reopen` opens what was found, `corrections` mends it."""

from pathlib import Path

from ptglab.audit import stages
from ptglab.detect import calibration, label_errors, noise_rate
from ptglab.detect.suspects import Suspects
from ptglab.lab import notebooks, runs
from ptglab.train import engine


def run(
    source: str | Path, out: str | Path, budget: str = "quick", *, split: str = "", table: str | Path = "",
    id_column: str = "", labels: str = "", seed: int = 0, device: str = "auto", image_size: int = 0, flip: bool = True,
    start: str | Path = "auto", method: str = "simclr", backbone: str = "resnet18", width: int = 0, epochs: int = -1,
    batch_size: int = 256, detector: str = "ensemble", flag: str = "own", precision: float = 0.0, update: bool = False,
) -> Suspects:  # fmt: skip
    """Audit the labels of `source`, leave the report in the folder `out`, and return the suspects, row by row.

    The parameters are those of notebook 6, which says what they mean, and so are the stages: what either has finished
    in `out`, the other does not compute again. `out` gets suspects.csv, unreadable.csv, gallery.html, summary.json,
    duplicates.csv, outliers.csv, label_studio.json and .xml, and fiftyone.csv; only the notebook draws figures. A run
    that was interrupted is resumed; another `detector`, `flag` or `precision` judges again what is stored; `update`
    keeps what is known where images have come, gone or changed. Raises InputError, in one line, for a parameter or a
    source that cannot be used, and for a folder that holds an audit with other parameters or of other images.

        import pandas as pd

        from ptglab import audit

        audit.run("photos/", "runs/photos")
        table = pd.read_csv("runs/photos/suspects.csv")
        print(table.head(10).to_string(index=False))
    """
    parameters = locals() | {"run_dir": str(out), "dataset": str(source), "start": str(start), "table": str(table)}
    del parameters["source"], parameters["out"]
    notebooks.checked(stages.NOTEBOOK, notebooks.declared_parameters(stages.NOTEBOOK), parameters)
    plan, place = stages.plan(budget, detector, flag, precision), engine.place(device)
    with stages.refusal_leaves_nothing(out):
        folder = runs.start(out, stages.CHANGEABLE, **parameters)
        reading = {name: parameters[name] for name in stages.READING}
        images, pixels = stages.load(folder, str(source), plan, update, **reading)
        networks = stages.start(str(start), backbone, width or plan.width, pixels, seed)
    given, classes, views = images.labels_given, images.num_classes, stages.views(pixels, flip, str(source))
    epochs = stages.epochs(epochs, plan, pixels, networks)
    stages.pretrain(folder, networks, pixels, given, method, epochs, batch_size, views, seed, place)
    features, used = stages.features(folder, networks, images, pixels, seed, place, start == "auto")
    probs = stages.probabilities(folder, networks, plan, pixels, features, given, classes, views, seed, place)
    inputs, nearest = {"probs": probs, "features": features}, stages.nearest(folder, features)
    if detector not in label_errors.usable(inputs, len(given)):
        inputs["history"] = stages.history(folder, features, given, classes, seed, place)
    found = {
        name: label_errors.detect(name, given, **inputs, neighbours=nearest, seed=seed)
        for name in {"ensemble", detector}
    }
    rate = found["ensemble"].flagged.mean()
    unknown = calibration.knowledge(given, probs, features)
    likely = calibration.posterior(found[detector], given, probs, features, nearest)
    suspects = stages.flag(found[detector], flag, precision, rate, likely, given, probs)
    estimates = [
        noise_rate.estimate(given, classes, probs, features, way, seed=seed, neighbours=nearest)
        for way in noise_rate.METHODS
    ]
    _, conflicting, odd = stages.odd_images(folder, images, pixels, nearest)
    about = {"detector": detector, "start": used, "epochs": epochs, "duplicates": int(conflicting.sum()),
             "outliers": int(odd.sum())}  # fmt: skip
    stages.report(folder, images, suspects, str(source), rate, estimates, likely, probs, unknown, about)
    return suspects
