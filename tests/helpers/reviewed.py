"""A small run to review: 200 digits of which a fifth is labelled wrongly, and what an audit leaves of them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ptglab import data
from ptglab.audit import reopen
from ptglab.data import noise
from ptglab.detect import label_errors
from ptglab.lab import runs
from ptglab.train import predict

EVIL = "<img src=x onerror=alert(1)>"


def leave(folder: Path, number: int = 200, detector: str = "confidence") -> tuple[runs.Run, np.ndarray, np.ndarray]:
    """Leave such a run in `folder`; return (run, labels given, labels true). Features are the pixels, as shares."""
    run = runs.Run(folder)
    run.path.mkdir(parents=True)
    params = {"dataset": "digits", "labels": "", "subset": number, "seed": 0}
    (run.path / "params.json").write_text(json.dumps(params))
    images = data.load("digits").subset(number, 0)
    run.keep_fingerprint(images.fingerprint)
    given = noise.apply("uniform", images.labels_given, 0.2, 10, 0)
    features = images.images.flatten(1).numpy().astype(np.float32) / 255
    probs = predict.out_of_fold(features, given, 10)
    suspects = label_errors.detect(detector, given, probs)
    reopen.keep(run, replace(images, labels_given=given), suspects, detector, probs=probs, features=features)
    return run, given, images.labels_given


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> reopen.Findings:
    """What such a run has left, opened."""
    return reopen.read(leave(tmp_path_factory.mktemp("left") / "run")[0].path)
