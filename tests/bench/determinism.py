"""Whether the same seed gives the same bits: a tiny pipeline in two fresh processes, compared stage by stage."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterable

import numpy as np
from torch import Tensor, nn

from ptglab import data
from ptglab.data import noise
from ptglab.detect import label_errors
from ptglab.errors import InputError
from ptglab.train import backbones, engine, finetune, predict, pretrain

STAGES = ("noise", "pre-trained weights", "fine-tuned weights", "features", "history", "probabilities", "scores")
IMAGES, WIDTH, BATCH = 256, 4, 64
DETECTORS = ("confidence", "confident_learning", "knn", "margin_history", "ensemble")


def hashes(seed: int = 0, device: str = "auto") -> dict[str, str]:
    """Return {stage: hex SHA-256 of what it computes}, for each of STAGES in order.

    256 digits, 40 % of them labelled wrongly: one epoch of SimCLR at width 4, one of fine-tuning the whole network,
    features, out-of-fold probabilities, and the scores of five detectors.
    """
    place = engine.place(device)
    digits = data.load("digits").subset(IMAGES, seed)
    given = noise.apply("uniform", digits.labels_true, 0.4, digits.num_classes, seed)
    found = {"noise": _hash([given])}
    network = backbones.build("resnet18", WIDTH, digits.images, seed)
    options = {"epochs": 1, "batch_size": BATCH, "seed": seed, "place": place}
    for _ in pretrain.train(network, digits.images, "simclr", augmentation="digits", projection=32, **options):
        pass
    found["pre-trained weights"] = _hash(_weights(network))
    head, history = backbones.head(network.num_features, digits.num_classes), np.zeros((1, IMAGES), np.float32)
    for _ in finetune.train(network, head, digits.images, given, mode="full", history=history, **options):
        pass
    found["fine-tuned weights"] = _hash([*_weights(network), *_weights(head)])
    features = predict.features(network, digits.images, place)
    probs = predict.out_of_fold(features, given, digits.num_classes, seed=seed)
    found |= {"features": _hash([features]), "history": _hash([history]), "probabilities": _hash([probs])}
    inputs = {"probs": probs, "features": features, "history": history, "seed": seed}
    suspects = [label_errors.detect(name, given, **inputs) for name in DETECTORS]
    found["scores"] = _hash([array for s in suspects for array in (s.score, s.flagged, s.suggested)])
    return found


def compare(seed: int = 0, device: str = "auto") -> dict[str, bool]:
    """Return {stage: whether two fresh processes computed the same bits}. Raises InputError if one of them fails."""
    first, second = (_in_a_process(seed, device) for _ in range(2))
    return {stage: first[stage] == second[stage] for stage in STAGES}


def _in_a_process(seed: int, device: str) -> dict[str, str]:
    code = (
        "import json, sys; from ptglab import determinism as d; print(json.dumps(d.hashes(*json.loads(sys.argv[1]))))"
    )
    words = [sys.executable, "-c", code, json.dumps([seed, device])]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        said = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise InputError(f"the pipeline did not run to its end: {said}")
    return json.loads(lines[-1])


def _weights(module: nn.Module) -> list[np.ndarray]:
    return [tensor.detach().cpu().numpy() for _, tensor in sorted(module.state_dict().items())]


def _hash(arrays: Iterable[np.ndarray | Tensor]) -> str:
    """Return the hex SHA-256 of arrays: their kinds, shapes and bytes."""
    digest = hashlib.sha256()
    for array in arrays:
        array = np.ascontiguousarray(array)
        digest.update(f"{array.dtype.str} {array.shape};".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
