"""What a sweep's file stands for, cell by cell; and every mistake in one, in a line, before anything runs."""

import copy
import json
import math
import re
from itertools import product
from pathlib import Path

import pytest
import yaml
from bad_inputs import parquet
from expected import refused
from PIL import Image

from ptglab import data
from ptglab.lab import notebooks, spec

ONE = "09_one_experiment"
SWEEP = {
    "title": "Mine",
    "parameters": {"dataset": "digits", "width": 4, "batch_size": 32, "device": "cpu"},
    "stages": {
        "simclr": {"notebook": "02_pretrain", "parameters": {"method": "simclr", "epochs": 2}, "seconds": 9},
        "vicreg": {"notebook": "02_pretrain", "parameters": {"method": "vicreg", "epochs": 2}, "shares": ["seed"]},
    },
    "grids": [
        {"notebook": ONE, "parameters": {"init": "scratch", "noise_rate": [0.2, 0.6], "seed": [0, 1]}, "seconds": 7},
        {
            "notebook": ONE,
            "parameters": {"init": ["simclr", "vicreg"], "pretrain_run": "@{init}", "mode": "linear", "seed": [0, 1],
                           "noise_rate": [0.2, 0.6]},
        },
    ],
}  # fmt: skip
LAST = ("grids", 1, "parameters")


@pytest.fixture
def write(tmp_path):
    """Return a function that writes SWEEP, with values put at places (None: taken away), and returns the path."""

    def changed(*changes):
        sweep = copy.deepcopy(SWEEP)
        for *inside, name, value in changes:
            part = sweep
            for key in inside:
                part = part[key]
            if value is None:
                del part[name]
            else:
                part[name] = copy.deepcopy(value)
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(sweep, sort_keys=False))
        return tmp_path / "mine.yaml"

    return changed


def read_and_plan(path, overrides=None):
    return spec.plan(spec.read(path, overrides))


def refuse(*words):
    return refused(*words, call=read_and_plan)


def names(cells, kind="cells"):
    return [cell.name for cell in cells if cell.name.startswith(f"{kind}/")]


def key(cell):
    """What tells two cells apart, but for their folders."""
    return cell.notebook, json.dumps({n: v for n, v in cell.parameters.items() if n != "device"}, sort_keys=True)


# ---- what a sweep stands for


def test_the_cells_are_the_products_of_the_lists(write):
    """By hand: defaults of the notebook, then the sweep's, then the grid's; the last list fastest."""
    cells = [cell for cell in read_and_plan(write()) if cell.name.startswith("cells/")]
    asked = [("scratch", rate, seed) for rate, seed in product([0.2, 0.6], [0, 1])]
    asked += [(init, rate, seed) for init, seed, rate in product(["simclr", "vicreg"], [0, 1], [0.2, 0.6])]
    assert [tuple(c.parameters[n] for n in ("init", "noise_rate", "seed")) for c in cells] == asked
    declared = notebooks.declared_parameters(ONE)
    for cell, (init, rate, seed) in zip(cells, asked, strict=True):
        own = {"init": init, "noise_rate": rate, "seed": seed}
        if init != "scratch":
            own |= {"mode": "linear", "pretrain_run": cell.needs[0]}
        assert cell.parameters == {n: v for n, v in declared.items() if n != "run_dir"} | SWEEP["parameters"] | own
        assert cell.notebook == ONE and cell.seconds == (7 if init == "scratch" else 0)
        assert {n: type(v) for n, v in cell.parameters.items()} == {n: type(declared[n]) for n in cell.parameters}


def test_a_stage_is_run_once_for_all_that_share_it_and_before_them(write):
    cells = read_and_plan(write())
    stages = [cell for cell in cells if cell.name.startswith("stages/")]
    assert cells[: len(stages)] == stages and not any(stage.needs for stage in stages)
    assert [(s.parameters["method"], s.parameters["seed"]) for s in stages] == list(
        product(["simclr", "vicreg"], [0, 1])
    )
    assert [s.seconds for s in stages] == [9, 9, 0, 0]
    by_name = {stage.name: stage for stage in stages}
    for cell in cells[len(stages) :]:
        if cell.parameters["init"] == "scratch":
            assert cell.needs == () and cell.parameters["pretrain_run"] == ""
            continue
        (need,) = cell.needs
        assert cell.parameters["pretrain_run"] == need
        assert by_name[need].parameters["method"] == cell.parameters["init"]
        for name in ("seed", "dataset", "width", "device"):
            assert by_name[need].parameters[name] == cell.parameters[name]
    assert by_name[need].parameters["epochs"] == 2 and cell.parameters["epochs"] != 2


def test_a_stage_is_run_for_all_that_it_shares(write):
    """Not for the noise rate: the stage does not depend on it."""
    shared = ("stages", "simclr", "shares", ["seed", "subset"])
    cells = read_and_plan(write(shared, (*LAST, "subset", [100, 200]), (*LAST, "init", "simclr")))
    stages = [cell.parameters for cell in cells if cell.name.startswith("stages/")]
    assert [(s["seed"], s["subset"]) for s in stages] == [(0, 100), (0, 200), (1, 100), (1, 200)]
    for cell in cells[8:]:
        (need,) = cell.needs
        assert stages[names(cells, "stages").index(need)]["subset"] == cell.parameters["subset"]


def test_overrides_are_the_sweeps_own_parameters(write):
    given = {"dataset": "digits", "width": "8", "epochs": "3", "noise_kind": "asymmetric"}
    for cell in read_and_plan(write(), given):
        assert cell.parameters["width"] == 8
        assert cell.parameters["epochs"] == (2 if cell.name.startswith("stages/") else 3)  # a stage's own stay
        assert cell.parameters.get("noise_kind", "asymmetric") == "asymmetric"


def test_a_list_takes_the_place_of_a_grids_list(write):
    """The stages that the cells share come with them."""
    cells = read_and_plan(write(), {"seed": "[3, 4, 5]", "noise_rate": "[0.5]"})
    assert len(cells) == 2 * 3 + 3 + 2 * 3
    assert {cell.parameters["seed"] for cell in cells} == {3, 4, 5}
    assert {cell.parameters.get("noise_rate", 0.5) for cell in cells} == {0.5}


# ---- folders


def test_folders_are_of_their_own_and_can_be_read(write):
    long = [f"{'a long word ' * 20}{i}" for i in range(3)]
    cells = read_and_plan(write((*LAST, "detectors", ["knn", "confidence,knn"]), (*LAST, "epochs", [3, 4])))
    cells += read_and_plan(write((*LAST, "labels", ["label", ""])))
    folders = {cell.name: key(cell) for cell in cells}
    assert len(set(folders.values())) == len(folders) == len({key(cell) for cell in cells})
    for cell in cells:
        assert re.fullmatch(r"(cells|stages)/[\w.]+(-[\w.]+)*-[0-9a-f]{8}", cell.name)
        for name in ("seed", "noise_rate") if cell.name.startswith("cells") else ("seed",):
            assert f"{name}{cell.parameters[name]}" in cell.name.split("/")[1].split("-")
        assert cell.parameters.get("init", cell.parameters.get("method")) in cell.name
    some = {"notebook": ONE, "parameters": {"init": long}}
    cells = read_and_plan(write(("grids", [some])))
    assert len(set(names(cells))) == 3 and max(len(name) for name in names(cells)) < 100


SAME = {
    "grids": [("grids", SWEEP["grids"][::-1])],
    "values": [(*LAST, "seed", [1, 0]), (*LAST, "init", ["vicreg", "simclr"])],
    "stages": [("stages", dict(reversed(SWEEP["stages"].items())))],
    "the sweep's parameters": [("parameters", dict(reversed(SWEEP["parameters"].items())))],
    "device": [("parameters", "device", "cuda")],
    "no device": [("parameters", "device", None)],
    "title and seconds": [("title", "Other"), ("grids", 0, "seconds", 99.5)],
    "a default, said": [("grids", 0, "parameters", "recipe", "plain"), ("stages", "simclr", "parameters", "width", 4)],
    "keys of a grid": [(*LAST[:2], "parameters", dict(reversed(SWEEP["grids"][1]["parameters"].items())))],
    "mode, said in the grid": [("grids", 0, "parameters", "mode", "full")],
    "mode, said for all": [("parameters", "mode", "linear"), (*LAST, "mode", None),
                           ("grids", 0, "parameters", "mode", "full")],
    "a list in a new grid": [("grids", [*SWEEP["grids"], {"notebook": ONE, "parameters": {"recipe": ["gce", "ema"]}}]),
                             ("grids", 0, "parameters", "recipe", "plain")],
}  # fmt: skip


@pytest.mark.parametrize("changes", SAME.values(), ids=SAME)
def test_folders_do_not_depend_on_order_nor_on_where_it_runs_nor_on_how_it_is_said(write, changes):
    """So that a sweep that was written anew goes on where it was."""
    before = {key(cell): cell.name for cell in read_and_plan(write())}
    after = {key(cell): cell.name for cell in read_and_plan(write(*changes))}
    assert {which: after[which] for which in before} == before


# ---- files


@pytest.fixture
def own(tmp_path):
    """A notebook whose parameters name files."""
    source = 'run_dir = "r"\ndataset = "digits"\nlabels = ""\nweights = ""\nsource = ""\nother = ""\n'
    cell = {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": source}
    (tmp_path / "own.ipynb").write_text(json.dumps({"cells": [cell], "metadata": {}}))
    return str(tmp_path / "own.ipynb")


def photos(folder):
    folder.mkdir(parents=True)
    for name in ("a.png", "b.png"):
        Image.new("L", (4, 4)).save(folder / name)
    (folder / "labels.csv").write_text("id,label,label_worse\na.png,x,y\nb.png,y,x\n")
    return folder


def test_relative_paths_become_absolute(write, tmp_path, monkeypatch, own):
    """A cell has a folder of its own to run in; a name is none, though a folder be called so."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PTGLAB_DATA", str(tmp_path / "root"))
    photos(tmp_path / "here")
    photos(tmp_path / "digits")
    photos(tmp_path / "root" / "there")
    values = {"weights": "there", "source": "here/../digits", "other": "here"}
    grid = {"notebook": own, "parameters": {"dataset": ["here", "there", "digits", "./digits"]} | values}
    cells = read_and_plan(write(("grids", [grid]), ("parameters", {})))
    root = tmp_path / "root" / "there"
    expected = [str(tmp_path / "here"), str(root), "digits", str(tmp_path / "digits")]
    assert [cell.parameters["dataset"] for cell in cells] == expected
    assert cells[0].parameters == {
        "dataset": expected[0], "labels": "", "weights": str(root),
        "source": str(tmp_path / "digits"), "other": "here",
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["folder", "parquet", "digits"])
def test_a_label_column_that_is_not_there_is_refused(write, tmp_path, kind):
    source = {"folder": tmp_path / "photos", "parquet": tmp_path / "x.parquet", "digits": "digits"}[kind]
    if kind == "folder":
        photos(source)
    if kind == "parquet":
        source.write_bytes(parquet([b"a", b"b"], label=[0, 1], label_worse=[1, 0]))
    source, right = str(source), "label" if kind == "digits" else "label_worse"
    wrong = right[:-2] + right[-1]
    cells = read_and_plan(write(("parameters", "dataset", source), ("parameters", "labels", right)))
    assert {(cell.parameters["dataset"], cell.parameters["labels"]) for cell in cells} == {(source, right)}
    refuse(f"'{wrong}'", f"did you mean '{right}'")(
        write(("parameters", "dataset", source), (*LAST, "labels", [right, wrong]))
    )


def test_images_that_are_not_there_are_refused(write, tmp_path):
    refuse("unknown dataset 'digist'", "did you mean 'digits'")(write(("parameters", "dataset", "digist")))
    refuse("no such file or folder: no/where")(write((*LAST, "dataset", ["digits", "no/where"])))
    (tmp_path / "empty").mkdir()
    refuse("holds no images")(write(("stages", "vicreg", "parameters", "dataset", str(tmp_path / "empty"))))


# ---- mistakes


MISSPELT = {
    "top level": (("parametres", {}), ["in the sweep 'parametres'", "'parameters'"]),
    "in a stage": (("stages", "simclr", "share", ["seed"]), ["in stages.simclr 'share'", "'shares'"]),
    "in a grid": (("grids", 1, "second", 3), ["in grids.2 'second'", "'seconds'"]),
    "shares in a grid": (("grids", 0, "shares", ["seed"]), ["in grids.1 'shares'"]),
    "the sweep's parameter": (("parameters", "widht", 4), ["of any notebook of the sweep 'widht'", "'width'"]),
    "a stage's parameter": (("stages", "simclr", "parameters", "epohcs", 3), ["of 02_pretrain 'epohcs'", "'epochs'"]),
    "a grid's parameter": ((*LAST, "noise_rat", [0.1]), [f"of {ONE} 'noise_rat'", "'noise_rate'"]),
    "a stage's notebook": (("stages", "vicreg", "notebook", "02_pretran"), ["notebook '02_pretran'", "'02_pretrain'"]),
    "a grid's notebook": (("grids", 0, "notebook", "09_one_experment"), ["notebook '09_one_experment'", f"'{ONE}'"]),
    "a stage by name": ((*LAST, "pretrain_run", "@simcrl"), ["stage 'simcrl'", "'simclr'"]),
    "a stage by a value": ((*LAST, "init", ["simclr", "vicrge"]), ["stage 'vicrge'", "'vicreg'"]),
    "shares": (("stages", "simclr", "shares", ["sed"]), ["share stage simclr 'sed'", "'seed'"]),
    "shares of no use": (("stages", "simclr", "shares", ["mode"]), ["of 02_pretrain 'mode'"]),
    "method": (("stages", "simclr", "parameters", "method", "simclear"), ["method 'simclear'", "'simclr'"]),
    "schedule": (("stages", "simclr", "parameters", "schedule", "shrt"), ["schedule 'shrt'", "'short'"]),
    "recipe": ((*LAST, "recipe", ["plain", "gec"]), ["recipe 'gec'", "'gce'"]),
    "mode": ((*LAST, "mode", "liner"), ["mode 'liner'", "'linear'"]),
    "noise_kind": (("parameters", "noise_kind", "unifrom"), ["noise_kind 'unifrom'", "'uniform'"]),
    "backbone": (("parameters", "backbone", "resnet81"), ["backbone 'resnet81'", "'resnet18'"]),
    "detector": ((*LAST, "detectors", "knn,confidance"), ["detectors 'confidance'", "'confidence'"]),
}  # fmt: skip


@pytest.mark.parametrize("case", MISSPELT)
def test_unknown_names_are_refused_with_the_nearest(write, case):
    change, words = MISSPELT[case]
    nearest = [f"did you mean {word}" if word.startswith("'") else word for word in words]
    refuse("unknown ", *nearest)(write(change))


@pytest.mark.parametrize(
    "reference", ["@{inti}", "@{init", "@{init.x}", "@{init[x]}", "@{init.__class__}", "@{init!r}", "@{}", "@{0}"]
)
def test_a_reference_to_what_is_no_parameter_is_refused(write, reference):
    refuse("unknown ")(write((*LAST, "pretrain_run", reference)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("title", 3), ["title", "valid string"]),
        (("title", None), ["title", "required"]),
        (("grids", None), ["grids", "required"]),
        (("grids", 0, "notebook", None), ["grids.1.notebook", "required"]),
        (("grids", {"a": 1}), ["grids", "valid list"]),
        (("stages", ["simclr"]), ["stages", "valid dictionary"]),
        (("stages", "simclr", "shares", "seed"), ["stages.simclr.shares", "valid list"]),
        (("stages", "simclr", "seconds", "long"), ["stages.simclr.seconds", "valid number"]),
        (("grids", 1, "parameters", [1]), ["grids.2.parameters", "valid dictionary"]),
        (("parameters", "width", [4, 8]), ["parameters.width"]),
        (("parameters", "width", {"a": 4}), ["parameters.width"]),
        ((*LAST, "seed", [[0]]), ["grids.2.parameters.seed"]),
        ((*LAST, "seed", {"from": 0}), ["grids.2.parameters.seed"]),
        ((*LAST, 3, [0]), ["grids.2.parameters.3", "valid string"]),
        ((3, 3), ["strings"]),
        (("parameters", "width", "4"), ["'width'", "'4'", "type int"]),
        (("parameters", "width", 4.0), ["'width'", "4.0", "type int"]),
        ((*LAST, "seed", [0, True]), [f"'seed' of {ONE}", "True", "type int"]),
        ((*LAST, "noise_rate", ["0.2"]), ["'noise_rate'", "'0.2'", "type float"]),
        (("stages", "simclr", "parameters", "epochs", 2.5), ["'epochs' of 02_pretrain", "2.5", "type int"]),
        ((*LAST, "pretrain_run", 3), ["'pretrain_run'", "type str"]),
    ],
    ids=str,
)
def test_values_of_another_type_are_refused(write, change, words):
    refuse(*words)(write(change))


def test_a_sweep_that_is_not_there_is_refused(tmp_path):
    refuse("unknown sweep 'digit'", "did you mean 'digits'", "smoke")("digit")
    for path in ("no.yaml", "no/such", tmp_path / "no.yaml", tmp_path):
        refuse(f"no such sweep: {path}")(path)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"widht": "4"}, ["'widht'", "did you mean 'width'"]),
        ({"width": "four"}, ["'width'", "'four'", "type int"]),
        ({"width": "[4, 8]"}, ["'width'", "[4, 8]", "type int"]),
        ({"width": ""}, ["'width'", "None", "type int"]),
        ({"seed": "[]"}, ["parameters.seed", "one or more"]),
        ({"width": "[4"}, ["cannot be read as YAML"]),
        ({"dataset": "digist"}, ["unknown dataset 'digist'", "did you mean 'digits'"]),
        ({"run_dir": "a"}, ["run_dir is the sweep's to choose"]),
    ],
    ids=str,
)
def test_overrides_that_will_not_do_are_refused(write, given, words):
    refused(*words, call=read_and_plan)(write(), given)


# ---- ours


FOLDER = Path(__file__).parents[2] / "notebooks" / "sweeps"
OURS = sorted(path.stem for path in FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("name", OURS)
def test_every_sweep_of_ours_is_one(name, monkeypatch):
    """As many cells as the lists say; those of data that is not here are planned without looking at it."""
    raw = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    if raw["parameters"].get("dataset") != "digits":
        monkeypatch.setattr(data, "check_labels", lambda *args: None)
    cells = read_and_plan(name)
    assert cells == read_and_plan(FOLDER / f"{name}.yaml")
    lists = [[v for v in grid["parameters"].values() if isinstance(v, list)] for grid in raw["grids"]]
    assert len(names(cells)) == len(set(names(cells))) == sum(math.prod(map(len, each)) for each in lists)
    come = set()
    for cell in cells:
        assert come.issuperset(cell.needs)
        come.add(cell.name)
        assert not any(str(value).startswith("@") for value in cell.parameters.values())
    assert {need for cell in cells for need in cell.needs} == set(names(cells, "stages"))
    used = {name.split("/")[1].split("-")[0] for name in names(cells, "stages")}
    assert used == raw.get("stages", {}).keys()


# ---- files that are made to do harm


def test_aliases_of_aliases_are_not_written_out(tmp_path):
    """A billion laughs, in lists and in merged mappings; and a list that holds itself."""
    levels = "abcdefghij"
    lists = "a: &a [ha, ha, ha, ha, ha, ha, ha, ha, ha, ha]\n"
    merged = "a: &a {k: ha}\n"
    for above, level in zip(levels, levels[1:], strict=False):
        lists += f"{level}: &{level} [{', '.join([f'*{above}'] * 10)}]\n"
        merged += f"{level}: &{level} {{<<: [{', '.join([f'*{above}'] * 10)}]}}\n"
    for text in (lists, merged, "title: &a [*a]\n", "title: &a {b: *a}\n"):
        (tmp_path / "x.yaml").write_text(text)
        refused("x.yaml cannot be read as YAML", "aliases stand for more", call=spec.read)(tmp_path / "x.yaml")
    refused("aliases stand for more", call=spec.read)("smoke", {"width": "[" + lists.replace("\n", ", ") + "]"})


@pytest.mark.parametrize("value", ["../../up", "/etc/passwd", "a/../../b", "..", "a\nb", "\0", "'; touch x; '", "{0}"])
def test_no_parameter_leads_a_cell_out_of_the_sweep(write, value):
    """The folder of a cell is below the sweep's, whatever its parameters are."""
    path = write(
        ("stages", None), ("grids", [{"notebook": ONE, "parameters": {"init": "scratch", "pretrain_run": [value]}}])
    )
    for cell in read_and_plan(path):
        assert re.fullmatch(r"cells/[\w.-]+", cell.name) and ".." not in cell.name.split("/")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([("grids", [])], ["grids", "at least 1"]),
        ([(*LAST, "seed", [])], ["grids.2.parameters.seed", "one or more"]),
        ([(*LAST, "seed", [0, 1, 0])], ["two cells of the sweep are the same", "cells/simclr-"]),
        ([(*LAST, "noise_rate", [1, 0.5, 1.0])], ["two cells of the sweep are the same"]),
        ([("stages", "simclr", "parameters", "method", ["simclr"])], ["stages.simclr.parameters.method", "must be"]),
        ([("stages", "other", {"notebook": "02_pretrain", "parameters": {"epohcs": 3}})], ["'epohcs'"]),
        ([("stages", "other", {"notebook": "02_pretrain", "parameters": {"method": "simclear"}})], ["'simclear'"]),
        ([("parameters", "run_dir", "a")], ["run_dir is the sweep's to choose"]),
        ([(*LAST, "run_dir", ["a", "b"])], ["run_dir is the sweep's to choose"]),
        ([(*LAST, "init", ["vicreg"]), (*LAST, "pretrain_run", "")], ["init vicreg needs a pretrain_run", "'@vicreg'"]),
        (
            [(*LAST, "init", "random"), (*LAST, "pretrain_run", ""), (*LAST, "mode", "full")],
            ["random is frozen", "full"],
        ),
        ([(*LAST, "noise_rate", [0.2, 1.5])], ["noise_rate is 1.5"]),
        ([("title", None), ("titel", "Mine")], ["'titel'", "'title'"]),
        ([("grids", 0, "notebook", None), ("grids", 0, "notbook", ONE)], ["'notbook'", "'notebook'"]),
    ],
    ids=str,
)
def test_a_plan_that_will_not_do_is_refused(write, changes, words):
    refuse(*words)(write(*changes))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("title: [a", ["cannot be read as YAML", "line 1"]),
        ("a: *b", ["cannot be read as YAML"]),
        ("title: !!python/object/apply:os.system ['touch marker']", ["cannot be read as YAML", "python/object"]),
        (b"\xff\xfe\xff", ["cannot be read as YAML"]),
        ("title: " + "[" * 3_000, ["cannot be read as YAML"]),
        ("title: 2001-99-99", ["cannot be read as YAML"]),
        ("title: " + "9" * 5000, ["cannot be read as YAML"]),
        ("title: " + "x" * 2_000_000, ["longer than 1,048,576"]),
        ("? [a, b]\n: c", ["cannot be read as YAML"]),
        ("", ["is no sweep"]),
        ("- title", ["is no sweep"]),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_no_spec_is_refused_in_a_line(tmp_path, monkeypatch, content, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    refused("x.yaml", *words, call=spec.read)("x.yaml")
    assert [path.name for path in tmp_path.iterdir()] == ["x.yaml"]


@pytest.mark.parametrize("name", ["../../x", "a/b", ".", ".hidden", "a\x1b[0m", "", "x" * 100])
def test_a_stage_stays_in_the_folder_of_the_sweep(name):
    stage = spec.Stage(notebook="02_pretrain")
    parts = [spec.Part(notebook="09_one_experiment")]
    refused("stage '", call=spec.plan)(spec.Spec(title="t", stages={name: stage}, grids=parts))


def test_a_sweep_of_too_many_cells_is_refused_before_they_are_made():
    lists = {name: list(range(1000)) for name in ("seed", "epochs", "width")}
    parts = [spec.Part(notebook="09_one_experiment", parameters=lists)]
    refused("1,000,000,000 cells", call=spec.plan)(spec.Spec(title="t", grids=parts))
