"""Where it runs, seeded draws, batches, folds, evaluation: counted, or compared with the plain way."""

import math
import os
import platform
import shutil
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from ptglab.errors import InputError
from ptglab.train import backbones, engine


@pytest.fixture
def gpus(monkeypatch):
    """Pretend to have a number of CUDA devices."""

    def pretend(number: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: number > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: number)

    return pretend


@pytest.mark.parametrize(
    "number, device, precision, chosen",
    [
        (0, "auto", "auto", ("cpu", "float32")),
        (2, "auto", "auto", ("cuda", "bfloat16")),
        (2, "cpu", "auto", ("cpu", "float32")),
        (2, "cuda:1", "float32", ("cuda:1", "float32")),
        (0, "cpu", "bfloat16", ("cpu", "bfloat16")),
    ],
)
def test_place(gpus, number, device, precision, chosen):
    gpus(number)
    place = engine.place(device, precision)
    assert (str(place.device), place.precision) == chosen


@pytest.mark.parametrize(
    "number, device, says",
    [
        (0, "cuda", r"'cuda' is not here \(0 CUDA devices\): use device=cpu"),
        (2, "cuda:2", r"'cuda:2' is not here \(2 CUDA devices\)"),
        (0, "gpu", "unknown device 'gpu': use auto, cpu, cuda or cuda:N"),
        (0, "", "unknown device ''"),
        (0, "meta", "unknown device 'meta'"),
        (0, "mps", "unknown device 'mps'"),
    ],
)
def test_place_that_is_not_there(gpus, number, device, says):
    gpus(number)
    with pytest.raises(InputError, match=says) as error:
        engine.place(device)
    assert "\n" not in str(error.value)


def test_unknown_precision():
    with pytest.raises(InputError, match="unknown precision 'float23': did you mean 'float32'"):
        engine.place("cpu", "float23")


def test_threads_are_the_cores_that_may_be_used(monkeypatch):
    """Those joblib finds, by affinity and control group, unless a number is asked for; only `prepare` sets them."""
    before = torch.get_num_threads()
    monkeypatch.setattr(engine.joblib, "cpu_count", lambda: 3)
    try:
        for asked, number in ((None, 3), ("5", 5), ("", 3), ("0", 1)):
            monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
            if asked is not None:
                monkeypatch.setenv("OMP_NUM_THREADS", asked)
            set_before = torch.get_num_threads()
            assert engine.threads() == number and engine.place("cpu") and torch.get_num_threads() == set_before
            assert engine.prepare("cpu") == engine.place("cpu") and torch.get_num_threads() == number
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("already, found", [(None, "1000"), ("7", "7")])
def test_waiting_threads_sleep_soon(already, found):
    """Set on import, before torch starts its threads, and never against what the user has set."""
    environment = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"}
    environment |= {"GOMP_SPINCOUNT": already} if already else {}
    code = "import os, sys, ptglab; print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert told.stdout.split() == [found, "False"]


@pytest.fixture
def compilations(monkeypatch):
    """Every function torch.compile was asked to compile; what it returns is told apart by its name alone."""
    asked = []

    def compile(function, dynamic):
        asked.append(function)
        assert dynamic is False
        return lambda *args: ("compiled", function(*args))

    monkeypatch.setattr(torch, "compile", compile)
    return asked


def test_compiled_from_enough_steps_on_and_once(compilations):
    def function(x):
        return x + 1

    place = engine.place("cpu", compile_from=100)
    assert place.compiled(function, 99) is function and not compilations
    compiled = place.compiled(function, 100)
    assert compiled(1) == ("compiled", 2)
    always = engine.place("cpu", compile_from=0)
    assert always.compiled(function, 1) is compiled and always.compiled(function, 0) is function
    assert compilations == [function]
    assert place.compiled(lambda x: x, 100) is not compiled and len(compilations) == 2


@pytest.mark.parametrize(
    "device, there, options, steps",
    [
        ("cpu", ["g++"], {}, engine.COMPILE_FROM),
        ("cpu", ["gcc"], {}, math.inf),
        ("auto", ["gcc"], {}, engine.COMPILE_FROM),
        ("auto", [], {}, math.inf),
        ("cuda:1", ["gcc"], {"compile_from": 7}, 7),
        ("cpu", [], {"compile_from": 0}, 0),
    ],
)
def test_compiles_long_runs_where_there_is_a_compiler(gpus, compilations, monkeypatch, device, there, options, steps):
    gpus(2)
    monkeypatch.delenv("CC", raising=False), monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: name if name in there else None)
    place = engine.place(device, **options)
    assert place.compile_from == steps

    def function(x):
        return x

    assert place.compiled(function, min(steps, 10**12) - 1) is function and not compilations
    assert (place.compiled(function, 10**12) is function) == (steps == math.inf)


@pytest.mark.parametrize("nbytes, moves", [(50, True), (51, False), (10**15, False)])
def test_a_gpu_holds_what_leaves_half_of_its_memory(monkeypatch, nbytes, moves):
    """Half of what is free, not of all there is."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 10**15))
    place = engine.Place(torch.device("cuda"), "float32")
    inputs = SimpleNamespace(is_cuda=False, nbytes=nbytes, to=lambda device: ("moved", device))
    assert place.resident(inputs) == (("moved", torch.device("cuda")) if moves else inputs)


def test_images_and_filters_are_channels_last(cpu):
    images, features = torch.rand(2, 3, 5, 7), torch.rand(2, 3)
    placed = cpu.batch(images)
    assert torch.equal(placed, images) and placed.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(cpu.batch(features), features)
    conv = nn.Conv2d(3, 4, 3)
    before = conv.weight.detach().clone()
    assert cpu.put(conv) is conv and torch.equal(conv.weight, before)
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_draws_depend_on_seed_and_purpose_alone():
    def draw(*purpose) -> tuple:
        return tuple(torch.rand(4, generator=engine.generator("cpu", *purpose)).tolist())

    purposes = [(s, e, what) for s in range(20) for e in range(50) for what in ("order", "views", "weak")]
    purposes += [(1, 23), (12, 3), (123,), (3, 21), (0,), (10**12,), (10**12, 1)]
    first = {purpose: draw(*purpose) for purpose in purposes}
    assert len(set(first.values())) == len(purposes)
    torch.manual_seed(99)
    assert all(draw(*purpose) == first[purpose] for purpose in purposes[::100])


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 64])
@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 16, 50])
def test_shuffled_batches_cover_every_row_once(n, size, drop_last):
    rows = 100 + 3 * torch.arange(n)
    batches = list(engine.shuffled_batches(rows, size, engine.generator("cpu", n), drop_last))
    assert [len(batch) for batch in batches] == engine.batch_sizes(n, size, drop_last)
    seen = torch.cat(batches).tolist()
    assert len(set(seen)) == len(seen) and set(seen) <= set(rows.tolist())
    assert all(len(batch) == size for batch in batches[:-1])
    if not drop_last or n < size:
        assert len(seen) == n
    else:
        assert all(len(batch) == size for batch in batches) and n - len(seen) < size


@pytest.mark.parametrize(("n", "least", "sizes"), [(9, 2, [4, 5]), (10, 2, [4, 4, 2]), (10, 4, [4, 6]), (3, 4, [3])])
def test_a_rest_too_small_joins_the_batch_before(n, least, sizes):
    batches = engine.shuffled_batches(torch.arange(n), 4, engine.generator("cpu", n), least=least)
    assert [len(batch) for batch in batches] == sizes


class Elsewhere:
    """Rows that lie on no device of ours; `gathered` says which were asked for, and by which thread."""

    device = SimpleNamespace(type="elsewhere")

    def __init__(self, rows: torch.Tensor):
        self.rows, self.gathered, self.enough = rows, [], threading.Event()

    def __getitem__(self, index) -> torch.Tensor:
        rows = self.rows[index]
        self.gathered.append(threading.get_ident())
        if len(self.gathered) == 3:
            self.enough.set()
        return rows


ROWS = torch.arange(40).view(20, 2)
INDICES = [torch.tensor([3, 1, 1]), slice(4, 9), torch.tensor([19]), slice(18, 30), torch.tensor([0, 5]), slice(0, 1),
           torch.tensor([], dtype=torch.int64), torch.tensor([7, 2, 11])]  # fmt: skip


@pytest.mark.parametrize("wrap", [lambda rows: rows, Elsewhere], ids=["there", "elsewhere"])
@pytest.mark.parametrize("number", range(len(INDICES) + 1))
def test_fetched_rows_come_in_order(wrap, number):
    found = list(engine.prefetch(wrap(ROWS), iter(INDICES[:number]), torch.device("cpu")))
    assert len(found) == number
    for (index, rows), expected in zip(found, INDICES, strict=False):
        assert index is expected
        assert torch.equal(rows, torch.stack([ROWS[i] for i in torch.arange(20)[expected]]) if len(rows) else ROWS[:0])
        assert len(rows) == len(torch.arange(20)[expected])


def test_rows_elsewhere_are_gathered_two_batches_ahead():
    """By one thread, while the batch before is worked on: no fewer, and no more."""
    inputs, drawn = Elsewhere(ROWS), []
    batches = (drawn.append(i) or torch.tensor([i]) for i in range(20))
    for used, _ in enumerate(engine.prefetch(inputs, batches, torch.device("cpu")), start=1):
        assert inputs.enough.wait(10)
        assert len(inputs.gathered) <= len(drawn) == min(20, used + 2)
    assert len(inputs.gathered) == 20
    (reader,) = set(inputs.gathered)
    assert reader != threading.get_ident()


def test_rows_that_cannot_be_gathered_say_so():
    fetched = engine.prefetch(Elsewhere(ROWS), [torch.tensor([i]) for i in (1, 2, 20, 3)], torch.device("cpu"))
    assert [next(fetched)[1].tolist() for _ in range(2)] == [[[2, 3]], [[4, 5]]]
    with pytest.raises(IndexError):
        next(fetched)


@pytest.mark.parametrize("number", [2, 3, 5, 10])
@pytest.mark.parametrize("n, k", [(100, 10), (101, 3), (37, 12), (9, 2), (1000, 7)])
def test_folds_are_even_in_size_and_class(n, k, number):
    labels = np.random.default_rng(n).integers(0, k, n) ** 2  # not every class, none as large as another
    fold = engine.folds(labels, number, seed=0)
    assert fold.dtype == np.int64 and fold.shape == (n,)  # every row has exactly one
    sizes = np.bincount(fold, minlength=number)
    assert len(sizes) == number and np.ptp(sizes) <= 1
    for label in np.unique(labels):
        assert np.ptp(np.bincount(fold[labels == label], minlength=number)) <= 1
    assert np.array_equal(fold, engine.folds(labels, number, seed=0))


@pytest.mark.parametrize("block", [1, 7, 50, 512])
def test_evaluate_is_the_plain_forward(few, cpu, block):
    """In order, in evaluation mode, without a gradient; whatever the block."""
    backbone = cpu.put(backbones.build("resnet18", 4, few.images, seed=0))
    backbone(few.images[:64] / 255)  # running statistics of its own
    backbone.eval()
    images = few.images[:50]
    with torch.no_grad():
        expected = torch.cat([backbone(image[None] / 255) for image in images])
    backbone.train()
    state = {k: v.clone() for k, v in backbone.state_dict().items()}
    found = engine.evaluate(backbone, images, cpu, block)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not found.requires_grad and not backbone.training
    assert all(torch.equal(v, state[k]) for k, v in backbone.state_dict().items())


FAULTS = """
import resource, sys
from ptglab.train import engine
import torch
if sys.argv[1] == "placed":
    engine.prepare("cpu")
torch.ones(12_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(12_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep memory in their own ways")
def test_freed_memory_serves_the_next_array():
    """Of ten arrays of 48 MB, one after the other, fewer are fetched anew from the system, 4 KB at a time."""
    pages = [
        int(subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True).stdout)
        for how in ("placed", "as it is")
    ]
    assert pages[0] < 0.8 * pages[1]


# ---- memory that is too small


def memory_of(most: int, seen: list):
    """Return a function that doubles its rows, on a device that holds `most` of them."""

    def double(x, *others):
        seen.append(len(x))
        if len(x) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 2 * x

    return double


@pytest.mark.parametrize(("most", "sizes"), [(9, [9]), (5, [9, 5, 4]), (3, [9, 5, 3, 2, 4, 2, 2])])
def test_what_memory_does_not_hold_is_computed_in_parts(most, sizes):
    x, seen = torch.arange(9.0), []
    assert torch.equal(engine.in_parts(memory_of(most, seen), x), 2 * x) and seen == sizes


def test_the_batch_that_fits_is_named():
    seen = []
    assert engine.within_memory(memory_of(8, seen), torch.zeros(8), torch.zeros(8)).shape == (8,) and seen == [8]
    for most, mend in [(8, "batch_size=8 fits"), (31, "batch_size=16 fits"), (1, "not even two rows fit")]:
        with pytest.raises(InputError, match=f"too small for a batch of 32, .*: {mend}"):
            engine.within_memory(memory_of(most, []), torch.zeros(32), torch.zeros(32))
