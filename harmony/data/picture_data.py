"""The few pictures of one concept from which textual inversion learns a word."""

from functools import cached_property
from pathlib import Path

import lightning
import numpy as np
import torch
from torch.utils.data import DataLoader

from harmony.core.errors import UserError
from harmony.data.sources.files import folder_captions, list_pictures
from harmony.data.stream import Stream, generator
from harmony.models.backbone import Backbone
from harmony.pixels.images import crop_resize, read_image, resize, sha256, square_around, to_model


class Views(torch.utils.data.Dataset):
    """Latent moments N x 2 x 2C x h x w of pictures and their mirror images, with the random numbers of a step.

    An item is ``moments`` 2C x h x w, ``noise`` and ``encode`` (unit normal, C x h x w), ``time`` and ``template`` in
    [0, 1), which depend only on (seed, position), and the index of the ``picture``.
    """

    def __init__(self, moments: torch.Tensor, seed: int):
        self.moments, self.seed = moments, seed

    def __len__(self) -> int:
        return len(self.moments)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, torch.Tensor]:
        position, i = key
        rng = generator(self.seed, position)
        _, _, c, h, w = self.moments.shape
        noise, encode = torch.randn(2, c // 2, h, w, generator=rng)
        mirror, time, template = torch.rand(3, generator=rng)
        moments = self.moments[i, int(mirror < 0.5)]
        return {"moments": moments, "noise": noise, "encode": encode, "time": time, "template": template, "picture": i}


class PicturesData(lightning.LightningDataModule):
    """The few pictures of a concept, the image files of ``folder``; encoded once, in memory.

    A ``captions.json`` beside them may describe what else they show, with {} in place of the word to be learned:
    ``{"1.jpg": "a {} on grass"}``. ``center_crop`` takes the central square of each picture; without it the whole
    picture is squashed into a square. The validation data is one batch of ``previews`` indices, one for each
    preview's noise.
    """

    def __init__(
        self,
        folder: str,
        backbone: Backbone,
        batch_size: int = 4,
        center_crop: bool = True,
        previews: int = 8,
        seed: int = 0,
    ):
        super().__init__()
        self.folder, self.backbone, self.batch_size, self.seed = Path(folder), backbone, batch_size, seed
        self.center_crop, self.previews = center_crop, previews

    @cached_property
    def files(self) -> list[Path]:
        """The picture files, sorted by name. UserError if there are none."""
        return list_pictures(self.folder)

    @cached_property
    def pictures(self) -> list[np.ndarray]:
        """The pictures, uint8 R x R x 3, upright."""
        side, squares = self.backbone.resolution, []
        for image in map(read_image, self.files):
            height, width = image.shape[:2]
            center = square_around((width // 2, height // 2, width // 2 + 1, height // 2 + 1), width, height)
            squares.append(crop_resize(image, center, side) if self.center_crop else resize(image, side, side))
        return squares

    @cached_property
    def captions(self) -> list[str | None]:
        """The caption of each picture, or None. UserError for a caption without ``{}``."""
        texts = folder_captions(self.folder, {file.stem for file in self.files})
        captions = [next(iter(texts.get(file.stem, [])), None) for file in self.files]
        if errors := [text for text in captions if text is not None and "{}" not in text]:
            raise UserError(
                f"{self.folder}/captions.json: {errors[0]!r} has no {{}} in place of the word to be learned"
            )
        return captions

    def hashes(self) -> dict[str, str]:
        """Name and sha256 of each picture, and of their captions."""
        captions = self.folder / "captions.json"
        return {file.name: sha256(file) for file in (*self.files, *([captions] if captions.is_file() else ()))}

    def setup(self, stage: str | None = None) -> None:
        pixels = to_model(np.stack(self.pictures))
        pairs = torch.stack([pixels, pixels.flip(-1)], 1)
        moments = torch.stack([self.backbone.moments(pair.to(self.backbone.device)).float().cpu() for pair in pairs])
        self.views = Views(moments, self.seed)

    def train_dataloader(self) -> DataLoader:
        stream = Stream.of(self.trainer, len(self.views), self.batch_size, self.seed)
        return DataLoader(self.views, self.batch_size, sampler=stream)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(range(self.previews), self.previews)
