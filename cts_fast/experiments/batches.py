"""Batches of one task as tensors: resized once, then cropped, flipped and normalised a whole batch at a time."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cts_fast.data.images import LazyImages

RESIDENT = 4 << 30  # bytes of a task's images that a GPU may hold
Scale = Tensor | None  # float32 [2, 1, C, 1, 1]: mean and deviation of pixels 0 ... 255; None: 127.5 of both
SCALES = {
    "half": None,  # mean and deviation 0.5
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # what torchvision's weights were trained with
    "own": None,  # of a task's own images
}
"""How images are normalised, by name."""


def resize(images: Tensor, size: int | None) -> Tensor:
    """uint8 [N, C, H, W] to uint8 [N, C, size, size], bilinear with antialiasing; None keeps the size."""
    if size is None or tuple(images.shape[-2:]) == (size, size):
        return images
    parts = [
        F.interpolate(part.float(), (size, size), mode="bilinear", antialias=True).round_().clamp_(0, 255).byte()
        for part in images.split(1024)
    ]
    return torch.cat(parts)


def usual_padding(side: int) -> int:
    """Of a random crop: 4 up to 32 pixels, 8 above."""
    return 4 if side <= 32 else 8


def channel_scale(normalization: str, images: Tensor | LazyImages, size: int | None) -> Scale:
    """Mean and deviation by the name of a normalization; "own": of each channel over these images, uint8 [N, C, H, W].

    A channel that is the same everywhere counts as one with a deviation of 1.
    """
    if normalization == "own":
        counts = torch.zeros(images.shape[1], 256, dtype=torch.int64)  # of each value in each channel
        for part in _parts(len(images)):
            channels = resize(images[part], size).transpose(0, 1).flatten(1)
            counts += torch.stack([channel.bincount(minlength=256) for channel in channels])
        share = counts.double() / counts.sum(1, keepdim=True)
        values = torch.arange(256.0, dtype=torch.float64)
        mean = share @ values
        deviation = (share * (values - mean[:, None]) ** 2).sum(1).sqrt()
        scale = torch.stack([mean, torch.where(deviation > 0, deviation, 1.0)]).float()
    elif (published := SCALES[normalization]) is None:
        return None
    else:
        scale = 255 * torch.tensor(published)
    return scale[:, None, :, None, None]


def normalize(images: Tensor, scale: Scale = None) -> Tensor:
    """uint8 [N, C, H, W] to float32 [N, 3, H, W], channels-last, grey repeated to 3 channels.

    (x - mean) / deviation, by `scale`; without one (x / 255 - 0.5) / 0.5.
    """
    if scale is None:  # a tensor: by a number, a GPU multiplies with its reciprocal, which rounds otherwise
        half = torch.full((), 127.5, device=images.device)
        x = images.float().div_(half).sub_(1.0)
    else:
        mean, deviation = scale.to(images.device)
        x = (images.float() - mean).div_(deviation)
    return x.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)


def task_seed(seed: int, *names: object) -> int:
    """A 63-bit seed that depends on `seed` and on every name, the same in every process."""
    digest = hashlib.blake2b(repr((seed, *names)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def draw_together(streams: Sequence["TaskBatches"]) -> Tensor:
    """The next draws of all tasks, int64 [T, 4, B]; pinned where a GPU makes the batches: one copy takes all there."""
    drawn = torch.stack([stream.draw() for stream in streams])
    return drawn.pin_memory() if streams[0].device.type == "cuda" else drawn


class TaskBatches:
    """An endless stream of augmented batches (x float32 [B, 3, S, S] channels-last, y int64 [B]) of one task.

    Every epoch is a new order without replacement; a batch may join the end of one epoch and the start of the next.
    Each image is padded by `padding` black pixels and cropped to S x S at random, and flipped with probability 1/2 if
    `flip`.
    All random numbers come from one CPU generator, so the batches depend on `seed` alone and not on the device, and
    `state_dict` is enough to go on exactly.

    Images in memory are resized once and lie, padded, on the device. Of images that are not, only those of a batch are
    read, and padded, cropped and flipped on the device; a GPU takes all of them into its memory if they are few.

    Args:
        images: uint8 [N, C, H, W] with C 1 or 3, or `LazyImages`; labels: int64 [N].
        part: numbers of the images that the stream draws from; None: all.
        size: side length S, or None for the images' own size; padding: None for 4 up to 32 pixels and 8 above.
        normalization: one of `SCALES`; "own" is by the images of `part`.
    """

    def __init__(
        self,
        images: Tensor | LazyImages,
        labels: Tensor,
        batch_size: int,
        *,
        seed: int,
        part: Tensor | None = None,
        size: int | None = None,
        padding: int | None = None,
        flip: bool = False,
        normalization: str = "half",
        device: torch.device | str = "cpu",
    ):
        if part is not None:
            labels = labels[part]
            images = images[part] if isinstance(images, Tensor) else images.select(part)
        if len(images) == 0:
            raise ValueError("a task needs at least one image")
        self.device = torch.device(device)
        side = size or images.shape[-1]
        self.padding = usual_padding(side) if padding is None else padding
        self.size = size
        self.shape = [size or length for length in images.shape[-2:]]
        scale = channel_scale(normalization, images, size)
        self.scale = None if scale is None else scale.to(self.device)
        self.lazy: LazyImages | None = None
        self.images = torch.empty(0)
        if isinstance(images, Tensor):
            self.images = self._padded(resize(images, size)).to(self.device)
        elif self.device.type != "cpu" and len(images) * images.shape[1] * side * side <= RESIDENT:
            self.images = torch.cat(
                [self._padded(resize(images[i], size).to(self.device)) for i in _parts(len(images))]
            )
        else:
            self.lazy = images
        self.labels = labels.to(self.device)
        self.batch_size = batch_size
        self.flip = flip
        self.generator = torch.Generator().manual_seed(seed)
        self.order = torch.empty(0, dtype=torch.int64)
        self.cursor = 0
        self.ahead: tuple[dict[str, Any], Tensor] | None = None  # the next draw, and the state before it

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> "TaskBatches":
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        return self.batch(self.draw())

    def draw(self) -> Tensor:
        """What the next batch is made of, int64 [4, B] on the CPU: image numbers, crop's rows and columns, flips."""
        if self.lazy is None:
            return self._draw()
        drawn = self._draw() if self.ahead is None else self.ahead[1]
        self.ahead = None
        self.ahead = self.state_dict(), self._draw()
        self.lazy.prefetch(self.ahead[1][0])  # while the networks train on this one
        return drawn

    def _draw(self) -> Tensor:
        index = self._indices()
        n = len(index)
        offsets = torch.randint(2 * self.padding + 1, (2, n, 1), generator=self.generator)
        flipped = torch.rand(n, 1, generator=self.generator) < 0.5 if self.flip else torch.zeros(n, 1, dtype=torch.bool)
        return torch.cat([index[None], offsets.squeeze(2), flipped.squeeze(1)[None]])

    def batch(self, drawn: Tensor) -> tuple[Tensor, Tensor]:
        """The batch of a draw.

        With images and draw on the device it waits for nothing, so that a CUDA graph may hold it. Images that are read
        from a file want the draw on the CPU, which spares them a wait for the device.
        """
        source, place = self.images, None
        if self.lazy is not None:
            x = self.lazy[drawn[0].cpu()]
            x = x.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else x
            source, place = self._padded(resize(x, self.size)), torch.arange(len(x), device=self.device)
        drawn = drawn.to(self.device, non_blocking=True)
        index, top, left, flipped = drawn[..., None]
        rows, columns = (
            offset + torch.arange(side, device=self.device)
            for offset, side in zip((top, left), self.shape, strict=True)
        )
        if self.flip:
            columns = torch.where(flipped > 0, columns.flip(1), columns)
        place = index if place is None else place[:, None]
        x = source[place[:, None], rows[:, :, None], columns[:, None, :]]
        return normalize(x.permute(0, 3, 1, 2), self.scale), self.labels[index[:, 0]]

    def _padded(self, images: Tensor) -> Tensor:
        """[N, C, H, W] to padded [N, H, W, C]: crops come channels-last."""
        return F.pad(images, (self.padding,) * 4).permute(0, 2, 3, 1).contiguous()

    def _indices(self) -> Tensor:
        """The next `batch_size` image numbers; begins a new epoch as often as needed."""
        parts, missing = [], self.batch_size
        while missing:
            if self.cursor == len(self.order):
                self.order = torch.randperm(len(self), generator=self.generator)
                self.cursor = 0
            part = self.order[self.cursor : self.cursor + missing]
            self.cursor += len(part)
            missing -= len(part)
            parts.append(part)
        return torch.cat(parts)

    def state_dict(self) -> dict[str, Any]:
        """Generator, order and position; loads with `torch.load(weights_only=True)`."""
        if self.ahead is not None:
            return self.ahead[0]
        return {"generator": self.generator.get_state(), "order": self.order, "cursor": self.cursor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on exactly where `state` was taken; raises ValueError if it is of another number of images."""
        if len(state["order"]) not in (0, len(self)):
            raise ValueError(f"the stream's state is of {len(state['order'])} images, this task has {len(self)}")
        self.generator.set_state(state["generator"])
        self.order, self.cursor, self.ahead = state["order"], state["cursor"], None


def _parts(count: int) -> list[slice]:
    """Numbers up to `count`, 1024 at a time."""
    return [slice(start, start + 1024) for start in range(0, count, 1024)]
