"""What a sweep has stored: the cells of a choice are the sweep's own, and only what is missing is computed."""

import pytest
from expected import refused
from explored import CHOICE, FAILS

from ptglab.errors import InputError
from ptglab.lab import spec
from ptglab.ui import stored


@pytest.fixture
def store(tmp_path) -> stored.Stored:
    return stored.Stored(spec.read("explore"), tmp_path)


def test_cells_of_a_choice_are_those_of_the_sweep(store):
    whole = {cell.name: cell for cell in spec.plan(spec.read("explore"))}
    chosen = [store.cells(init, "uniform", rate) for init in store.choices["init"] for rate in (0.2, 0.4, 0.6)]
    assert {cell.name: cell for cells in chosen for cell in cells} == whole
    *stages, cell = store.cells("simclr", "asymmetric", 0.8)
    assert cell.name not in whole and [stage.name for stage in stages] == list(cell.needs)
    assert (cell.parameters["noise_kind"], cell.parameters["noise_rate"]) == ("asymmetric", 0.8)
    assert store.cells("scratch", "uniform", 0.4)[0].parameters["mode"] == "full"  # its own grid's


def test_every_list_of_a_sweep_can_be_chosen_from(tmp_path):
    digits = stored.Stored(spec.read("digits"), tmp_path)
    inits, rates = digits.choices["init"], [0.0, 0.2, 0.4, 0.6, 0.8]
    assert {"scratch", "simclr", "barlow_twins", "vicreg", "random", "pixels"} <= set(inits)
    kinds = ["uniform", "asymmetric", "instance", "pair_flip"]
    assert digits.choices == {"noise_rate": rates, "noise_kind": kinds, "init": inits}
    chosen = {c.name for init in inits for rate in rates for c in digits.cells(init, "uniform", rate)}
    assert chosen <= {cell.name for cell in spec.plan(spec.read("digits"))}
    assert digits.cells("vicreg", "uniform", 0.4)[0].parameters["method"] == "vicreg"


def test_only_what_is_missing_is_computed(swept):
    store, executed = swept[0].stored, swept[1]
    assert not store.missing(**CHOICE) and list(store.compute(CHOICE)) == [] and not executed
    other = CHOICE | {"init": "scratch"}
    assert [cell.name for cell in store.missing(**other)] == [store.folder(**other).relative_to(store.out).as_posix()]
    assert [(done, whole) for done, whole, _ in store.compute(CHOICE, other)] == [(0, 1), (1, 1)]
    assert len(executed) == 1 and not store.missing(**other)
    assert store.curves(**CHOICE)["accuracy_test"].tolist() == [0.5, 0.6]
    assert store.curves(**CHOICE | {"noise_rate": 0.2}) is None
    list(store.compute(CHOICE | {"noise_kind": "pair_flip"}))  # no cell of its grid, and still among the results
    results = store.results()
    assert sorted(zip(results["arm"], results["noise"], strict=True)) == [
        ("scratch", "uniform"), ("simclr + linear", "pair_flip"), ("simclr + linear", "uniform")
    ]  # fmt: skip
    with pytest.raises(InputError, match=r"^cells/.*made to fail"):
        list(store.compute(CHOICE | {"noise_rate": FAILS}))


def test_what_cannot_be_chosen_is_refused(store, tmp_path):
    refused("simcrl", "simclr", call=store.cells)("simcrl", "uniform", 0.4)
    refused("noise_rate", "1.5", call=store.cells)("simclr", "uniform", 1.5)
    only = spec.Spec(title="None", grids=[spec.Part(notebook="02_pretrain")])
    refused("None", call=stored.Stored)(only, tmp_path)
    refused("labels", call=stored.Stored)(spec.read("explore", {"labels": "label_worse"}), tmp_path)
    assert store.results().empty
