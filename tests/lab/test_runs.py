"""The run folder: nothing half-written, nothing mixed up, everything resumed exactly."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from expected import refused
from matplotlib.figure import Figure
from PIL import Image

from ptglab.errors import InputError
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
    assert runs.start(run.path, **PARAMS).params == PARAMS


def test_what_json_cannot_hold_leaves_no_file(tmp_path):
    with pytest.raises(TypeError):
        runs.start(tmp_path / "run", matrix=np.eye(2))
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"epochs": 5}, "(epochs 3 there, 5 here)"),
        ({"epochs": 5, "dataset": "cifar10"}, "(dataset 'digits' there, 'cifar10' here; epochs 3 there, 5 here)"),
        ({"width": 16}, "(width None there, 16 here)"),
    ],
)
def test_a_run_with_other_parameters_is_refused(run, change, difference):
    refused(str(run.path), difference, "another run_dir", call=runs.start)(run.path, **PARAMS | change)
    assert run.params == PARAMS


def test_a_dropped_parameter_is_a_difference(run):
    fewer = {name: value for name, value in PARAMS.items() if name != "epochs"}
    refused("epochs 3 there, None here", call=runs.start)(run.path, **fewer)


@pytest.mark.parametrize("name", ["run_dir", "device", "devices"])
def test_where_it_runs_is_no_difference(run, name):
    assert runs.start(run.path, **PARAMS | {name: "elsewhere"}).params == PARAMS


def test_what_may_change_is_no_difference_and_is_kept(tmp_path):
    runs.start(tmp_path, ("flag",), seed=1, flag="own")
    assert runs.start(tmp_path, ("flag",), seed=1, flag="rate").params == {"seed": 1, "flag": "rate"}
    refused("seed 1 there, 2 here", call=runs.start)(tmp_path, ("flag",), seed=2, flag="own")
    refused("flag 'rate' there, 'own' here", call=runs.start)(tmp_path, seed=1, flag="own")


def test_a_run_is_of_the_images_it_was_begun_with(run):
    run.keep_fingerprint("a1")
    run.keep_fingerprint("a1")
    refused("other images or labels, or they have changed", call=run.keep_fingerprint)("b2")
    run.keep_fingerprint("a1")


def test_a_run_is_of_the_labels_it_was_begun_with(run):
    labels = np.arange(5)
    run.keep_fingerprint("a1", labels)
    run.keep_fingerprint("a1", labels.astype(np.int32))
    for other in (labels[::-1], labels[:4], None):
        refused("other images or labels", call=run.keep_fingerprint)("a1", other)


def test_the_environment_is_noted_whenever_it_is_another(tmp_path, monkeypatch):
    for commit in ("a", "a", "b", "b", "a"):
        monkeypatch.setattr(runs, "commit", lambda commit=commit: commit)
        runs.start(tmp_path, seed=1)
    noted = json.loads((tmp_path / "environment.json").read_text())
    assert [entry["commit"] for entry in noted] == ["a", "b", "a"]
    assert (
        noted[0]["torch"] == torch.__version__.split("+")[0] and {"python", "numpy", "gpu", "system"} <= noted[0].keys()
    )
    (tmp_path / "environment.json").write_text("[{")
    runs.start(tmp_path, seed=1)
    assert len(json.loads((tmp_path / "environment.json").read_text())) == 1


def test_what_a_killed_process_left_half_written_goes(run):
    (run.stage("a").path / ".model.safetensors.7.tmp").write_bytes(b"x")
    runs.start(run.path, **PARAMS)
    assert list(run.stage("a").path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        refused(f"cannot write the run folder {path}", call=runs.start)(path, epochs=3)


def test_a_folder_without_a_run_is_named(tmp_path):
    refused(f"no run at {tmp_path}", "notebook", call=lambda: runs.Run(tmp_path).params)()
    refused(f"no results in {tmp_path}", "notebook", call=runs.Run(tmp_path).results)()


def test_finish_marks_the_stage_and_drops_its_checkpoint(run):
    stage = run.stage("pretrain")
    assert stage.path == run.path / "pretrain" and not stage.done
    stage.checkpoint.write_bytes(b"x")
    checkpoints.previous(stage.checkpoint).write_bytes(b"x")
    assert checkpoints.previous(stage.checkpoint).name == "checkpoint.previous.safetensors"
    stage.finish()
    assert stage.done and run.stage("pretrain").done and not run.done
    assert [path.name for path in stage.path.iterdir()] == ["done"]
    stage.finish()  # without a checkpoint, too


# ---- records


def test_a_record_is_on_disk_before_the_next_epoch(run):
    records = [{"epoch": i, "loss": 1 / (i + 1)} for i in (1, 2, 3)]
    seen = []

    def steps():
        for record in records:
            yield record
            seen.append([json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()])

    run.follow(steps(), "pretrain", 3)
    assert seen == [records[:1], records[:2], records]


def test_the_progress_bar_counts_what_a_resumed_run_has_done(run, capsys):
    run.follow([{"epoch": 8}, {"epoch": 10}], "pretrain", 10)
    assert "pretrain" in (shown := capsys.readouterr().err) and "10/10" in shown


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
    for end in range(len(content) + 1):
        path.write_bytes(content[:end])
        run.follow([again], "pretrain", 9)
        whole = content[:end].decode().count("\n")
        assert path.read_bytes() == "".join([*lines[:whole], json.dumps(again) + "\n"]).encode()
        assert run.records()["epoch"].tolist() == [*range(1, whole + 1), 9]
    assert [path.name for path in run.path.iterdir() if path.name.startswith(".")] == [".lock"]


def test_the_records_of_a_killed_run_can_be_read(run):
    (run.path / "metrics.jsonl").write_text('{"epoch": 1}\n{"epo')
    assert run.records()["epoch"].tolist() == [1]
    (run.path / "metrics.jsonl").write_text('{"epo')
    assert run.records().empty


def test_a_stop_is_one_line_and_what_was_recorded_stays(run):
    def steps():
        yield {"epoch": 1}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="^stopped; run again, it goes on where it was$"):
        run.follow(steps(), "pretrain", 2)
    assert run.records()["epoch"].tolist() == [1]


def test_records_without_a_torn_line_are_not_written_anew(run, monkeypatch):
    run.follow([{"epoch": 1}], "pretrain", 2)
    monkeypatch.setattr(runs, "write", None)
    run.follow([{"epoch": 2}], "pretrain", 2)
    assert (run.path / "metrics.jsonl").read_text() == '{"epoch": 1}\n{"epoch": 2}\n'


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
    assert back.dtype == np.asarray(array).dtype
    np.testing.assert_array_equal(back, array)
    assert [path.name for path in (run.path / "arrays").iterdir()] == ["probs.npy"]


def test_a_large_array_is_memory_mapped(run):
    run.save_array("features", np.ones((4, 4)))
    assert isinstance(run.array("features"), np.memmap) and not run.array("features").flags.writeable


def test_arrays_of_objects_are_refused(run):
    run.save_array("probs", np.ones(3))
    with pytest.raises(ValueError, match="Object arrays cannot be saved"):
        run.save_array("probs", np.array([{}, None]))
    np.testing.assert_array_equal(run.array("probs"), np.ones(3))
    assert len(list((run.path / "arrays").iterdir())) == 1


def test_an_unknown_array_is_answered_with_those_there_are(run):
    refused("no array 'probs'", str(run.path), "there are none", call=run.array)("probs")
    run.save_array("probs", np.ones(1))
    run.save_array("features", np.ones(1))
    refused("no array 'prob'", "there are features, probs", call=run.array)("prob")


def test_a_growing_array_goes_on_where_it_was_left(run):
    array = run.growing_array("history", (3, 4))
    assert array.dtype == np.float32 and not array.any()
    array[0] = 1.5
    array.flush()
    np.testing.assert_array_equal(run.array("history"), [[1.5] * 4, [0] * 4, [0] * 4])
    again = run.growing_array("history", (3, 4))
    again[1] = 2.5
    again.flush()
    np.testing.assert_array_equal(run.array("history"), [[1.5] * 4, [2.5] * 4, [0] * 4])


def test_a_growing_array_appears_whole_or_not_at_all(run, monkeypatch):
    path, seen = run.path / "arrays" / "history.npy", []

    def full_disk(file, mode, *args, original=np.lib.format.open_memmap):
        array = original(file, mode, *args)
        seen.append((path.exists(), array.shape))
        if len(seen) == 1:
            raise OSError(28, "No space left on device")
        return array

    monkeypatch.setattr(np.lib.format, "open_memmap", full_disk)
    with pytest.raises(InputError, match=f"cannot write {path.parent}: the disk is full"):
        run.growing_array("history", (3, 4))
    assert list(path.parent.iterdir()) == []
    assert run.growing_array("history", (3, 4)).shape == (3, 4)
    assert seen == [(False, (3, 4)), (False, (3, 4)), (True, (3, 4)), (True, (3, 4))]
    assert list(path.parent.iterdir()) == [path]


def test_a_growing_array_that_is_there_is_not_made_anew(run, monkeypatch):
    run.save_array("history", np.arange(12, dtype=np.float32).reshape(3, 4))
    monkeypatch.setattr(runs, "write", None)
    array = run.growing_array("history", (3, 4))
    np.testing.assert_array_equal(array, np.arange(12).reshape(3, 4))
    array[2] = -1
    array.flush()
    np.testing.assert_array_equal(run.array("history"), [[0, 1, 2, 3], [4, 5, 6, 7], [-1] * 4])


def test_stored_labels_belong_to_their_images(run):
    ids = ["a/1.png", "b/2.png", "c/3.png"]
    for name, array in dict(ids=ids, labels_given=[0, 1, 1], labels_true=[0, 1, 2]).items():
        run.save_array(name, np.array(array))
    labels = run.labels(ids, "digits")
    assert {name: array.tolist() for name, array in labels.items()} == {
        "labels_given": [0, 1, 1], "labels_true": [0, 1, 2]
    }  # fmt: skip
    for other in (ids[::-1], ids[:2], [*ids, "d.png"]):
        refused(str(run.path), "other images", "dataset 'digits'", "same parameters", call=run.labels)(other, "digits")
    refused(str(run.path), "other images", call=run.labels)(ids, "cifar10")
    refused("no run at", call=runs.Run(run.path / "none").labels)(ids, "digits")


# ---- results and figures

# design.md, Contracts; `labels` and `n_train` say which columns and rows of the data set
CONTRACT = """
dataset backbone init mode loss noise noise_rate effective_rate seed accuracy_last accuracy_best accuracy_selected
detector precision recall f1 balanced_accuracy auroc average_precision seconds_pretrain seconds_finetune seconds_detect
device torch_version commit
"""


def test_results_have_the_columns_of_the_contract(run):
    rows = [{"seed": 1, "dataset": "digits", "noise": "none"}, {"auroc": 0.1 + 0.2, "detector": "knn", "seed": 2}]
    written = run.save_results(iter(rows))
    header = (run.path / "results.csv").read_text().splitlines()[0].split(",")
    assert [column for column in header if column not in ("labels", "n_train", "recipe")] == CONTRACT.split()
    results = run.results()
    assert list(results.columns) == list(written.columns) == header
    assert results["seed"].tolist() == [1, 2] and results["noise"].tolist()[0] == "none"
    assert results["auroc"].tolist()[1] == 0.1 + 0.2 and np.isnan(results["auroc"][0])
    assert (results["torch_version"] == torch.__version__).all()
    assert results["f1"].isna().all()


def test_a_commit_of_digits_stays_a_text(run):
    run.save_results([{"commit": "0123456"}, {"commit": "12e4567"}])
    assert run.results()["commit"].tolist() == ["0123456", "12e4567"]


def test_an_unknown_result_column_is_refused(run):
    run.save_results([{"seed": 1}])
    refused("unknown result column 'accuracy_lst'", "did you mean 'accuracy_last'", call=run.save_results)(
        [{"seed": 2}, {"accuracy_lst": 0.5}]
    )
    assert run.results()["seed"].tolist() == [1]


def test_a_table_comes_back_as_it_was(run):
    table = pd.DataFrame({"epoch": [1, 2], "accuracy": [0.1 + 0.2, np.nan], "recipe": ["né, plain", "gce"]})
    table.index = [7, 8]
    run.save_table("curves", table)
    assert (run.path / "curves.csv").read_text().splitlines()[0] == "epoch,accuracy,recipe"
    back = pd.read_csv(run.path / "curves.csv")
    pd.testing.assert_frame_equal(back, table.reset_index(drop=True), check_exact=True)


def test_no_text_of_a_table_is_a_formula(run):
    """A folder of images may have any name; it is in the results."""
    run.save_results([{"dataset": "=HYPERLINK(1)", "seed": 1, "noise": "uniform"}])
    run.save_table("curves", pd.DataFrame({"name": ["@x", "a", None, -1.5], "rate": [-0.5, 1, 2, 3]}))
    assert run.results()["dataset"].tolist() == ["'=HYPERLINK(1)"] and run.results()["noise"].tolist() == ["uniform"]
    assert (run.path / "curves.csv").read_text() == "name,rate\n'@x,-0.5\na,1.0\n,2.0\n-1.5,3.0\n"


def test_a_table_that_cannot_be_written_leaves_the_one_before(run, monkeypatch):
    def torn(table, path, **options):
        path.write_text("epoch,accu")
        raise OSError(28, "No space left on device")

    run.save_table("curves", pd.DataFrame({"epoch": [1]}))
    monkeypatch.setattr(pd.DataFrame, "to_csv", torn)
    with pytest.raises(InputError, match=f"cannot write {run.path}: the disk is full"):
        run.save_table("curves", pd.DataFrame({"epoch": [2]}))
    assert (run.path / "curves.csv").read_text() == "epoch\n1\n"
    assert sorted(p.name for p in run.path.iterdir()) == [".lock", "curves.csv", "environment.json", "params.json"]


def test_a_figure_is_written_beside_what_it_was_drawn_from(run):
    figure, drawn_from = Figure(figsize=(2, 1)), pd.DataFrame({"rate": [0.2, 0.4], "accuracy": [0.1 + 0.2, 0.9]})
    figure.add_subplot().plot(drawn_from["rate"], drawn_from["accuracy"])
    run.save_figure("alone", figure)
    run.save_figure("losses", figure, drawn_from)
    folder = run.path / "figures"
    assert sorted(path.name for path in folder.iterdir()) == ["alone.png", "losses.csv", "losses.png"]
    with Image.open(folder / "losses.png") as image:
        assert image.format == "PNG" and image.width > 150
    pd.testing.assert_frame_equal(pd.read_csv(folder / "losses.csv"), drawn_from, check_exact=True)


def test_the_commit_of_an_installed_copy_is_empty(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "__file__", str(tmp_path / "ptglab" / "runs.py"))
    assert runs.commit() == ""
