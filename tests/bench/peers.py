"""What people use today, for comparison: views made image by image in a loader, and lightly's recipe of SimCLR."""

from collections.abc import Callable
from functools import cache, partial

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ptglab.train import augment, backbones, engine, optim, pretrain

EPOCHS = 800  # of the run an epoch is taken from: long enough to be compiled


def random_images(n: int, size: int = 32, channels: int = 3, seed: int = 0) -> Tensor:
    """Return uint8 noise [n, channels, size, size]: what is in an image changes no time."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, channels, size, size), dtype=torch.uint8, generator=rng)


class TwoViews(Dataset):
    """Two views of each image, made one at a time by `transform` and `second`, or by a peer that takes PIL images."""

    def __init__(self, images: Tensor, transform: Callable, second: Callable | None = None, as_pil: bool = False):
        self.images, self.transform, self.second, self.as_pil = images, transform, second or transform, as_pil

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> list[Tensor]:
        if self.as_pil:
            return self.transform(Image.fromarray(self.images[i].permute(1, 2, 0).numpy()))
        return [self.transform(self.images[i]), self.second(self.images[i])]


def loader(dataset: Dataset, batch_size: int) -> DataLoader:
    """Return a loader with a worker per core, kept between epochs; beside a GPU they are spawned: forks may hang."""
    on_gpu = torch.cuda.is_available()
    return DataLoader(dataset, batch_size, shuffle=True, drop_last=True, num_workers=engine.threads(),
                      persistent_workers=True, pin_memory=on_gpu,
                      multiprocessing_context="spawn" if on_gpu else None)  # fmt: skip


def torchvision_views(size: int, recipe: augment.Recipe | None = None) -> Callable[[Tensor], Tensor]:
    """Return `recipe`, by default that of preset simclr, image by image, in torchvision's transforms v2."""
    from torchvision.transforms import v2

    r = recipe or augment.preset("simclr")[0]
    jitter = v2.ColorJitter(r.brightness, r.contrast, r.saturation, r.hue)
    return v2.Compose([
        v2.RandomResizedCrop(size, r.crop_scale, r.crop_ratio, antialias=False),
        v2.RandomHorizontalFlip(r.flip),
        v2.RandomApply([jitter], r.jitter),
        v2.RandomGrayscale(r.grey),
        v2.RandomApply([v2.GaussianBlur(3, r.blur_sigma)], r.blur),
        v2.RandomSolarize(128, r.solarize),
        v2.ToDtype(torch.float32, scale=True),
    ])  # fmt: skip


def kornia_views(size: int) -> Callable[[Tensor], Tensor]:
    """Return the recipe of preset simclr in kornia, which augments a batch at a time."""
    import kornia.augmentation as K

    r = augment.preset("simclr")[0]
    return K.AugmentationSequential(
        K.RandomResizedCrop((size, size), r.crop_scale, r.crop_ratio),
        K.RandomHorizontalFlip(p=r.flip),
        K.ColorJiggle(r.brightness, r.contrast, r.saturation, r.hue, p=r.jitter),
        K.RandomGrayscale(p=r.grey),
        K.RandomGaussianBlur((3, 3), r.blur_sigma, p=r.blur),
        data_keys=["input"],
    )


def run_epoch(*options) -> None:
    """Train one epoch; a function of the module, so that a process of its own can be asked for it."""
    epoch(*options)()


@cache  # a process keeps the network and the loader for its next epoch
def epoch(
    peer: str, n: int, size: int, width: int, batch_size: int, place: engine.Place, method: str = "simclr"
) -> Callable[[], None]:
    """Return a function that trains an epoch in the peer's way; see `speed.ssl_epoch`."""
    images, spec = random_images(n, size), pretrain.METHODS[method]
    backbone = backbones.build("resnet18", width, images, 0)
    projector = backbones.projector(backbone.num_features, spec.hidden, spec.out, spec.layers, 0)
    model = nn.Sequential(backbone, projector).to(place.device)
    if peer == "lightly":
        from lightly.loss import NTXentLoss
        from lightly.transforms import SimCLRTransform

        batches = loader(TwoViews(images, SimCLRTransform(size, cj_strength=1.0), as_pil=True), batch_size)
        criterion = NTXentLoss(**spec.options)
        forward = lambda views: [model(view.to(place.device, non_blocking=True)) for view in views]  # noqa: E731
    else:
        made = [torchvision_views(size, recipe) for recipe in augment.preset(spec.views)]
        batches, model = loader(TwoViews(images, *made), batch_size), place.put(model)
        criterion = partial(spec.loss, **spec.options)
        compiled = place.compiled(engine.forward, EPOCHS * len(batches))
        forward = lambda views: compiled(model, place.batch(torch.cat(views))).chunk(2)  # noqa: E731
    optimizer = optim.LARS(optim.parameter_groups([model], 0.1, 1e-4), lr=0.1)

    def theirs() -> None:
        for views in batches:
            with place.autocast():
                z1, z2 = forward(views)
            loss = criterion(z1.float(), z2.float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return theirs
