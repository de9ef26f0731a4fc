"""What processes do together, in two and four of them, beside the same done by one."""

import pytest
import shared_jobs
import torch
from torch import nn

from ptglab.train import collectives, processes


@pytest.fixture(scope="module", params=["2", "4"])
def parts(request):
    """What `shared_jobs.all_parts` yields in so many processes."""
    return int(request.param), list(processes.run(request.param, shared_jobs.all_parts, place=shared_jobs.CPU))


def test_shares_come_back_in_order_with_their_own_gradients(parts):
    """5 rows and 1 row: in order in every process; the gradient of a share is that of its rows, not summed twice."""
    number, (five, one, *_) = parts
    for found in (five, one):
        total = found["total"]
        whole = torch.arange(2.0 * total).view(total, 2)
        assert found["back"] == whole.tolist()
        sizes = [size for size, _ in found["parts"]]
        assert sum(sizes) == total and max(sizes) - min(sizes) <= 1 and len(sizes) == number
        assert [row for _, rows in found["parts"] for row in rows] == (1 + whole).tolist()


def test_gradients_are_summed_and_answers_told(parts):
    number, (_, _, found, *_) = parts
    assert found["told"] == 0
    assert found["p"] == [[sum(range(1, number + 1))]] * 2
    assert found["q"] == [i * sum(range(number)) for i in (0.0, 1.0, 2.0)]


@pytest.mark.parametrize("i", range(len(shared_jobs.SHAPES)))
def test_batch_norm_is_that_of_the_whole_batch(parts, i):
    """Outputs, gradients and running statistics beside PyTorch's own on all rows; some processes have no row."""
    found, (shape, rows) = parts[1][3 + i], shared_jobs.SHAPES[i]
    x, g, weight = shared_jobs.problem(shape, rows)
    norm = (nn.BatchNorm2d if len(shape) == 3 else nn.BatchNorm1d)(shape[0]).double()
    norm.weight.data = weight
    x.requires_grad_()
    y = norm(x)
    (y * g).sum().backward()
    expected = {"y": y, "dx": x.grad, "dw": norm.weight.grad, "db": norm.bias.grad, "mean": norm.running_mean,
                "var": norm.running_var, "steps": norm.num_batches_tracked}  # fmt: skip
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value.detach(), rtol=1e-9, atol=1e-12, msg=name)


def test_one_alone_does_nothing_of_this():
    rows = torch.arange(3)
    assert collectives.world() == 1 and collectives.rank() == 0
    assert collectives.share(rows) is rows and collectives.gathered(rows, 3) is rows
    assert collectives.told(max, 1, 2) == 2
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    collectives.sum_gradients([p])
    assert p.grad.tolist() == [1, 1]
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(collectives.BatchNorm1d(3)(x), nn.BatchNorm1d(3)(x))
