"""The run folder: nothing half-written, nothing mixed up, everything resumed exactly."""

import json
import os

import numpy as np
import pandas as pd
import pytest
import torch
from expected import refused
from matplotlib.figure import Figure
from PIL import Image

from ptglab import files
from ptglab.lab import runs
from ptglab.train import checkpoints

PARAMS = dict(dataset="digits", epochs=3, rate=0.4, cached=True, labels="", run_dir="a", device="cpu")


@pytest.fixture
def run(tmp_path):
    return runs.start(tmp_path / "run", **PARAMS)


# ---- start and stages


def test_parameters_survive_the_folder(run):
    assert run.params == PARAMS
    assert {name: type(value) for name, value in run.params.items()} == {n: type(v) for n, v in PARAMS.items()}
    for name in ("run_dir", "device", "devices"):  # where it runs is no difference
        assert runs.start(run.path, **PARAMS | {name: "elsewhere"}).params == PARAMS


def test_what_json_cannot_hold_leaves_no_file(tmp_path):
    with pytest.raises(TypeError):
        runs.start(tmp_path / "run", matrix=np.eye(2))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".lock", ".lock.txt"]


def test_where_no_folder_can_be_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    for path in ("file", "file/run", "loop", "loop/run/a", "n" * 300):
        refused(f"cannot write {tmp_path / path}: ", call=runs.start)(tmp_path / path, **PARAMS)


@pytest.mark.parametrize(
    ("change", "differences"),
    [({"epochs": 5, "dataset": "cifar10"}, ["dataset 'digits' there, 'cifar10' here", "epochs 3 there, 5 here"]),
     ({"width": 16}, ["width None there, 16 here"])],
)  # fmt: skip
def test_a_run_with_other_parameters_is_refused(run, change, differences):
    refused(str(run.path), *differences, call=runs.start)(run.path, **PARAMS | change)
    refused("epochs 3 there, None here", call=runs.start)(
        run.path, **{n: v for n, v in PARAMS.items() if n != "epochs"}
    )
    assert run.params == PARAMS


def test_what_may_change_is_no_difference_and_is_kept(tmp_path):
    runs.start(tmp_path, ("flag",), seed=1, flag="own")
    assert runs.start(tmp_path, ("flag",), seed=1, flag="rate").params == {"seed": 1, "flag": "rate"}
    refused("seed 1 there, 2 here", call=runs.start)(tmp_path, ("flag",), seed=2, flag="own")
    refused("flag 'rate' there, 'own' here", call=runs.start)(tmp_path, seed=1, flag="own")


def test_a_run_is_of_the_images_and_labels_it_was_begun_with(tmp_path):
    images, both, labels = runs.start(tmp_path / "a"), runs.start(tmp_path / "b"), np.arange(5)
    images.keep_fingerprint("a1")
    images.keep_fingerprint("a1")
    refused("other images or labels", call=images.keep_fingerprint)("b2")
    both.keep_fingerprint("a1", labels)
    both.keep_fingerprint("a1", labels.astype(np.int32))
    for other in (labels[::-1], labels[:4], None):
        refused("other images or labels", call=both.keep_fingerprint)("a1", other)


def test_the_environment_is_noted_whenever_it_changes(tmp_path, monkeypatch):
    for commit in ("a", "a", "b", "b", "a"):
        monkeypatch.setattr(runs, "commit", lambda commit=commit: commit)
        runs.start(tmp_path, seed=1)
    noted = json.loads((tmp_path / "environment.json").read_text())
    assert [entry["commit"] for entry in noted] == ["a", "b", "a"]
    assert {"torch", "python", "numpy", "gpu", "system"} <= noted[0].keys()
    (tmp_path / "environment.json").write_text("[{")
    runs.start(tmp_path, seed=1)
    assert len(json.loads((tmp_path / "environment.json").read_text())) == 1


def test_what_a_killed_process_left_half_written_goes(run):
    (run.stage("a").path / ".model.safetensors.7.ptglab.tmp").write_bytes(b"x")
    runs.start(run.path, **PARAMS)
    assert list(run.stage("a").path.iterdir()) == []


def test_folders_without_a_run_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        refused(f"cannot write {path}: a file stands", call=runs.start)(path, epochs=3)
    refused(f"no run at {tmp_path}", call=lambda: runs.Run(tmp_path).params)()
    refused(f"no results in {tmp_path}", call=runs.Run(tmp_path).results)()


def test_finish_marks_the_stage_and_drops_its_checkpoint(run):
    stage = run.stage("pretrain")
    assert stage.path == run.path / "pretrain" and not stage.done
    stage.checkpoint.write_bytes(b"x")
    checkpoints.previous(stage.checkpoint).write_bytes(b"x")
    for _ in range(2):  # without a checkpoint, too
        stage.finish()
        assert stage.done and run.stage("pretrain").done and not run.done
        assert [path.name for path in stage.path.iterdir()] == ["done"]


def test_a_stage_keeps_the_lock_of_its_run(tmp_path):
    stage = runs.start(tmp_path, seed=1).stage("inner")
    refused("another sweep is at work", f"process {os.getpid()}", call=files.lock)(tmp_path, "sweep")
    del stage
    with files.lock(tmp_path, "sweep"):
        pass


# ---- records


def test_a_record_is_on_disk_before_the_next_epoch(run, capsys):
    records = [{"epoch": i, "loss": 1 / (i + 1)} for i in (1, 2, 3)]
    seen = []

    def steps():
        for record in records:
            yield record
            seen.append([json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()])

    run.follow(steps(), "pretrain", 3)
    assert seen == [records[:1], records[:2], records]
    run.follow([{"epoch": 8}, {"epoch": 10}], "resumed", 10)  # the bar counts what was done before
    assert "resumed" in (shown := capsys.readouterr().err) and "10/10" in shown


def test_a_repeated_epoch_counts_once_and_the_last_time(run):
    assert run.records().empty
    for epochs, loss in [((1, 2, 3), 9.0), ((2, 3, 4), 0.1 + 0.2), ((1,), 5.0)]:
        run.follow([{"epoch": epoch, "loss": loss * epoch} for epoch in epochs], "pretrain", 4)
    again = 0.1 + 0.2
    expected = pd.DataFrame({"epoch": [1, 2, 3, 4], "loss": [5.0, 2 * again, 3 * again, 4 * again]})
    pd.testing.assert_frame_equal(run.records(), expected, check_exact=True)


def test_a_record_that_was_torn_is_dropped_wherever_it_was_torn(run):
    """A kill may leave any part of the last line; whole lines stay, and the epoch that is run again follows them."""
    path, again = run.path / "metrics.jsonl", {"epoch": 9}
    lines = [json.dumps({"epoch": epoch, "loss": 1 / epoch}) + "\n" for epoch in (1, 2)]
    content = "".join(lines).encode()
    for end in range(0, len(content) + 1, 3):
        path.write_bytes(content[:end])
        whole = content[:end].decode().count("\n")
        assert len(run.records()) == whole
        run.follow([again], "pretrain", 9)
        assert path.read_bytes() == "".join([*lines[:whole], json.dumps(again) + "\n"]).encode()
        assert run.records()["epoch"].tolist() == [*range(1, whole + 1), 9]
    assert not list(run.path.glob("*.tmp"))


# ---- arrays


@pytest.mark.parametrize(
    "array",
    [np.arange(6, dtype=np.float32).reshape(2, 3), np.zeros((0, 3)), np.float32(2.5), np.array(["né", "b"])],
    ids=["matrix", "empty", "scalar", "text"],
)
def test_an_array_comes_back_as_it_was(run, array):
    run.save_array("probs", np.ones(5))
    run.save_array("probs", array)
    back = run.array("probs")
    assert back.dtype == np.asarray(array).dtype and isinstance(back, np.memmap) and not back.flags.writeable
    np.testing.assert_array_equal(back, array)
    with pytest.raises(ValueError, match="Object arrays"):
        run.save_array("probs", np.array([{}, None]))
    assert [path.name for path in (run.path / "arrays").iterdir()] == ["probs.npy"]


def test_a_growing_array_goes_on_where_it_was_left(run):
    for row in range(3):
        array = run.growing_array("history", (3, 4))
        assert array.dtype == np.float32 and not array[row:].any() and (array[:row] == 1.5).all()
        array[row] = 1.5
        array.flush()
    assert (run.array("history") == 1.5).all()
    refused("holds float32 (3, 4) where float32 (4, 4)", call=run.growing_array)("history", (4, 4))


def test_stored_labels_belong_to_their_images(run):
    ids = ["a/1.png", "b/2.png", "c/3.png"]
    for name, array in dict(ids=ids, labels_given=[0, 1, 1], labels_true=[0, 1, 2]).items():
        run.save_array(name, np.array(array))
    labels = run.labels(ids, "digits")
    assert {name: array.tolist() for name, array in labels.items()} == {
        "labels_given": [0, 1, 1], "labels_true": [0, 1, 2]
    }  # fmt: skip
    for other in (ids[::-1], ids[:2], [*ids, "d.png"]):
        refused(str(run.path), "other images", "dataset 'digits'", call=run.labels)(other, "digits")
    refused(str(run.path), "other images", call=run.labels)(ids, "cifar10")
    refused("no run at", call=runs.Run(run.path / "none").labels)(ids, "digits")


# ---- results and figures

# design.md, Contracts
CONTRACT = """
dataset labels n_train backbone init mode loss recipe noise noise_rate effective_rate seed accuracy_last accuracy_best
accuracy_selected detector precision recall f1 balanced_accuracy auroc average_precision seconds_pretrain
seconds_finetune seconds_detect device torch_version commit
"""


def test_results_have_the_columns_of_the_contract(run):
    rows = [
        {"seed": 1, "dataset": "=HYPERLINK(1)", "commit": "0123456"},
        {"auroc": 0.1 + 0.2, "noise": "none", "seed": 2},
    ]
    written = run.save_results(iter(rows))
    results = run.results()
    assert list(results.columns) == list(written.columns) == CONTRACT.split()
    assert results["seed"].tolist() == [1, 2] and results["noise"].tolist()[1] == "none"
    assert results["auroc"].tolist()[1] == 0.1 + 0.2 and np.isnan(results["auroc"][0]) and results["f1"].isna().all()
    assert results["commit"][0] == "0123456" and (results["torch_version"] == torch.__version__).all()
    assert results["dataset"][0] == "=HYPERLINK(1)"  # on disk, it is no formula
    assert '"\'=HYPERLINK(1)"' in (run.path / "results.csv").read_text()
    refused("unknown result column 'accuracy_lst'", "'accuracy_last'", call=run.save_results)([{"accuracy_lst": 0.5}])
    assert run.results()["seed"].tolist() == [1, 2]


def test_a_figure_is_written_beside_what_it_was_drawn_from(run):
    figure, drawn_from = Figure(figsize=(2, 1)), pd.DataFrame({"rate": [0.2, 0.4], "accuracy": [0.1 + 0.2, 0.9]})
    figure.add_subplot().plot(drawn_from["rate"], drawn_from["accuracy"])
    run.save_figure("alone", figure)
    run.save_figure("losses", figure, drawn_from)
    folder = run.path / "figures"
    assert sorted(path.name for path in folder.iterdir()) == ["alone.png", "losses.csv", "losses.png"]
    with Image.open(folder / "losses.png") as image:
        assert image.format == "PNG" and image.width > 150
    pd.testing.assert_frame_equal(files.read_csv(folder / "losses.csv"), drawn_from, check_exact=True)
