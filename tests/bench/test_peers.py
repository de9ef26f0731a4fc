"""The peers do the same work as we do: the same recipe of views, the same network, every image once an epoch."""

import warnings

import numpy as np
import peers
import pytest
import torch

from ptglab.train import augment


@pytest.mark.parametrize("peer", [peers.torchvision_views, peers.kornia_views])
def test_peers_make_views_like_ours(peer):
    """The mean of the views, and where brightness means the same (kornia adds it), their deviation too."""
    yy, xx = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    picture = torch.stack([8 * xx, 8 * yy, 255 - 4 * (xx + yy)]).to(torch.uint8)
    images = picture.expand(400, 3, 32, 32).contiguous()
    ours = augment.two_views(images, "simclr", torch.Generator().manual_seed(0))[0]
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        change = peer(32)
        batched = peer is peers.kornia_views
        theirs = change(images.float() / 255) if batched else torch.stack([change(image) for image in images])
    assert theirs.shape == ours.shape
    assert theirs.mean().item() == pytest.approx(ours.mean().item(), rel=0.1)
    if not batched:
        for deviation in (lambda v: v.std((1, 2, 3)).mean(), lambda v: v.mean((1, 2, 3)).std()):
            assert deviation(theirs).item() == pytest.approx(deviation(ours).item(), rel=0.15)


@pytest.mark.slow
def test_a_loader_gives_two_views_of_every_image_once():
    """The transform gets each image: as a tensor, or for lightly as a picture with the same pixels."""
    images = peers.random_images(8, 16)
    picture = peers.TwoViews(images, lambda image: image, as_pil=True)[3]
    assert np.array_equal(np.asarray(picture), images[3].permute(1, 2, 0).numpy())
    seen = torch.cat([views[0] for views in peers.loader(peers.TwoViews(images, lambda image: image), 4)])
    assert sorted(seen.flatten(1).tolist()) == sorted(images.flatten(1).tolist())
