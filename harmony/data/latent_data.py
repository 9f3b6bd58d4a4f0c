"""Cached latents with their hints: the data for training UNets and ControlNets."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import lightning
import numpy as np
import torch
from torch.utils.data import DataLoader

from harmony.core.progress import tell
from harmony.data.latent_cache import INDEX, Cache, Latents, Recipe, cache_key, describe, example
from harmony.data.manifest import is_render, read_manifest, share_out
from harmony.data.shards import Shards, make_shards, predictor
from harmony.data.stream import Stream, generator
from harmony.models.backbone import Backbone
from harmony.pixels.exemplars import augment
from harmony.pixels.images import to_hint, to_model
from harmony.pixels.masks import to_latent


class Draws(torch.utils.data.Dataset):
    """Cached items with all random numbers of a training step, which depend only on (seed, position).

    Adds ``noise``, ``encode``, ``encode_masked`` (unit normal, C x h x w: diffusion noise and the two posterior
    samples), ``time`` in [0, 1) (the objective scales it to a timestep), ``drop`` in [0, 1) (prompt dropout),
    ``beside`` in [0, 1) (whether a companion runs) and ``tokens``. ``augment``: exemplars are augmented
    (``exemplars.augment``), also by (seed, position).
    """

    def __init__(self, latents: Latents, tokens: torch.Tensor, seed: int, augment: bool = False):
        self.latents, self.tokens, self.seed, self.augment = latents, tokens, seed, augment

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        position, i = key
        item = self.latents[i]
        rng = generator(self.seed, position)
        c, h, w = item["moments"].shape
        item["noise"], item["encode"], item["encode_masked"] = torch.randn(3, c // 2, h, w, generator=rng)
        item["time"], item["drop"], item["beside"] = torch.rand(3, generator=rng)
        if self.augment and "hint_exemplar" in item:
            picture = np.rint(255 * item["hint_exemplar"].numpy()).astype(np.uint8).transpose(1, 2, 0)
            item["hint_exemplar"] = to_hint(augment(picture, np.random.default_rng([self.seed, position])))
        return item | {"tokens": self.tokens[item["row"]]}


class LatentShards(Shards):
    """The shards of several caches of one backbone, one cache after another."""

    def __init__(self, backbone: Backbone, caches: Sequence[Cache], say: Callable[[str], None]):
        super().__init__("latents", say)
        self.backbone, self.caches = backbone, list(caches)
        self.places = [(cache, n) for cache in self.caches for n in range(len(cache.shards))]

    @property
    def sizes(self) -> list[int]:
        return [len(cache.shards[n]) for cache, n in self.places]

    def is_made(self, n: int) -> bool:
        cache, number = self.places[n]
        return cache.is_made(number)

    def on_predict_start(self) -> None:
        self.backbone.to(self.device)

    def make(self, n: int) -> None:
        cache, number = self.places[n]
        cache.make(number)

    def finish(self) -> None:
        for cache in self.caches:
            cache.finish()


def build(caches: Sequence[Cache], trainer: lightning.Trainer | None = None) -> list[Path]:
    """Build or complete ``caches`` of one backbone in the processes of ``trainer``; returns their folders.

    Good shards are not built again.
    """
    backbone, say = caches[0].backbone, caches[0].say
    make_shards(LatentShards(backbone, caches, say), trainer or predictor())
    backbone.to("cpu")
    return [cache.folder for cache in caches]


def only_set(parameters: dict) -> dict:
    """A hint's parameters without ``surroundings`` where it is false, so that older nets have the same parameters."""
    return {name: value for name, value in parameters.items() if name != "surroundings" or value}


class LatentData(lightning.LightningDataModule):
    """Cached latents of a manifest's train and validation split; reads only manifest and cache.

    ``batch_size`` is that of one process. ``branch`` names the hint or hints of a batch (None: no hint). ``photos``:
    share of photographs in what is trained on, where the dataset has renders too (None: as many as there are).
    ``augment``: exemplars are augmented in training. Every process of the trainer must call ``prepare`` before
    training.
    """

    def __init__(
        self,
        manifest: str,
        backbone: Backbone,
        cache: str,
        batch_size: int,
        branch: str | Sequence[str] | None = "color",
        hints: dict[str, dict] | None = None,
        crop: str = "jitter",
        hole: str = "train",
        variants: int = 2,
        workers: int = 0,
        seed: int = 0,
        mismatch: float = 0.0,
        elsewhere: float = 0.0,
        recolor: float = 0.0,
        context: float | None = None,
        photos: float | None = None,
        augment: bool = False,
    ):
        super().__init__()
        self.augment, self.photos = augment, photos
        self.manifest, self.backbone, self.cache = Path(manifest), backbone, Path(cache)
        self.batch_size, self.workers, self.seed = batch_size, workers, seed
        self.branches = [branch] if isinstance(branch, str) else list(branch or ())
        hints = {branch: only_set(parameters) for branch, parameters in (hints or {}).items()}
        rule = "backbone" if hole == "backbone" else "dilate"
        self.recipes = {
            "train": Recipe(crop, hole, variants, hints, seed, mismatch, elsewhere, recolor, context),
            "validation": Recipe("center", rule, 1, hints, seed, mismatch, context=context),
        }
        self.sets: dict[str, Draws] = {}

    def prepare(self, trainer: lightning.Trainer | None = None, say: Callable[[str], None] = tell) -> dict[str, Path]:
        """Build or complete the caches in the processes of ``trainer`` (see ``shards.predictor``)."""
        caches = [Cache(self.manifest, split, self.backbone, r, self.cache, say) for split, r in self.recipes.items()]
        return dict(zip(self.recipes, build(caches, trainer), strict=True))

    def setup(self, stage: str | None = None) -> None:
        for split, recipe in self.recipes.items():
            rows = read_manifest(self.manifest, split)[1]
            description = describe(self.backbone, recipe, rows)
            latents = Latents(self.cache / f"{split}-{cache_key(description)}", description, self.branches)
            captions = [row.caption for row in rows]
            if count := sum(map(bool, self.backbone.unread_ends(captions))):
                tell(
                    f"{split}: {count} of {len(rows)} captions are too long, the text encoder does not read their ends"
                )
            tokens = self.backbone.tokens(captions)
            self.sets[split] = Draws(latents, tokens, self.seed, self.augment and split == "train")

    @property
    def indices(self) -> dict[str, Path]:
        """Split -> the file that describes its cache, once the caches are read."""
        return {split: draws.latents.folder / INDEX for split, draws in self.sets.items()}

    def train_dataloader(self) -> DataLoader:
        draws = self.sets["train"]
        return self.loader(draws, Stream.of(self.trainer, len(draws), self.batch_size, self.seed, self.shares))

    @property
    def shares(self) -> np.ndarray | None:
        """The share of each training item in what is trained on, sum 1; None: each item once in a pass."""
        if self.photos is None:
            return None
        rows = read_manifest(self.manifest, "train")[1]
        return share_out(np.repeat([is_render(row) for row in rows], self.recipes["train"].variants), self.photos)

    def val_dataloader(self) -> DataLoader:
        draws = self.sets["validation"]
        return self.loader(draws, [(i, i) for i in range(len(draws))])

    def loader(self, draws: Draws, order: Iterable[tuple[int, int]]) -> DataLoader:
        return DataLoader(
            draws,
            self.batch_size,
            sampler=order,
            num_workers=self.workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.workers > 0,
        )

    def examples(self, count: int, split: str = "test") -> dict:
        """``count`` rows of a split as tensors: ``image``, ``hole`` (latent), ``pixel_hole``, ``tokens``."""
        rows = read_manifest(self.manifest, split)[1]
        rows = rows[:: max(1, len(rows) // count)][:count]
        squares = [example(row, self.manifest.parent, Recipe(), self.backbone.resolution) for row in rows]
        holes = torch.from_numpy(np.stack([e.hole for e in squares])[:, None]).float()
        return {
            "image": torch.stack([to_model(e.image) for e in squares]),
            "hole": to_latent(holes, self.backbone.factor),
            "pixel_hole": holes,
            "tokens": self.backbone.tokens([row.caption for row in rows]),
        }
