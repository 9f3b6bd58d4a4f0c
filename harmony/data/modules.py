"""LightningDataModules: pixels for the kit's encoders, cached latents for everything that trains a UNet, the few
pictures of one thing that textual inversion learns from, and composites for the judge.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import lightning
import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler, WeightedRandomSampler

from harmony.core.errors import UserError
from harmony.data.latent_cache import Cache, Latents, Recipe, describe, example, key, tell
from harmony.data.manifest import read_manifest
from harmony.data.relit_pairs import Composites
from harmony.data.shards import Shards, make_shards, predictor
from harmony.data.sources.files import folder_captions, pictures_in
from harmony.data.sources.pixels import PixelPool
from harmony.models.backbone import Kit
from harmony.pixels.exemplars import augment
from harmony.pixels.images import crop_resize, read_image, resize, sha256, square_around, to_hint, to_model
from harmony.pixels.masks import to_latent


class PixelData(lightning.LightningDataModule):
    """Squares of ``size`` pixels from a manifest, photographs making up ``photos`` of each batch.

    ``share`` is the range of a photograph's shorter side that a random crop takes (low for the VAE, near 1 where the
    caption must stay true). Batches: ``image`` B x 3 x H x W in [-1, 1], ``caption`` list, ``render`` B bool.
    """

    def __init__(
        self,
        manifest: str,
        size: int,
        batch_size: int,
        photos: float,
        share: tuple[float, float],
        workers: int = 0,
        seed: int = 0,
    ):
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.pools: dict[str, PixelPool] = {}

    def setup(self, stage=None):
        h = self.hparams
        if not self.pools:
            self.pools["train"] = PixelPool(h.manifest, "train", h.size, tuple(h.share), h.seed)
            self.pools["test"] = PixelPool(h.manifest, "test", h.size)

    def train_dataloader(self):
        h, pool = self.hparams, self.pools["train"]
        render = torch.tensor([pool.is_render(i) for i in range(len(pool))])
        total = max(1, int((~render).sum()))
        weight = torch.where(render, (1 - h.photos) / max(1, int(render.sum())), h.photos / total)
        count = max(len(pool), h.batch_size)  # at least one batch an epoch
        sampler = WeightedRandomSampler(weight, count, generator=torch.Generator().manual_seed(h.seed))
        return DataLoader(pool, h.batch_size, sampler=sampler, num_workers=h.workers, drop_last=True)

    def val_dataloader(self):
        return DataLoader([0])

    def captions(self) -> set[str]:
        """All training captions: what tokenizers are learnt from."""
        return {row.caption for row in self.pools["train"].rows}

    def held_out(self, limit: int = 192) -> dict[str, torch.Tensor]:
        """``renders`` and ``photos`` of the test split, N x 3 x H x W in [-1, 1]."""
        pool = self.pools["test"]
        chosen = {"renders": [], "photos": []}
        for i in range(len(pool)):
            images = chosen["renders" if pool.is_render(i) else "photos"]
            if len(images) < limit:
                images.append(pool[i]["image"])
        return {kind: torch.stack(images) for kind, images in chosen.items() if images}

    def retrieval(self, limit: int = 64) -> tuple[torch.Tensor, list[str]]:
        """The first ``limit`` test renders with distinct captions."""
        pool, images, captions = self.pools["test"], [], []
        for i in range(len(pool)):
            if pool.is_render(i) and pool.rows[i].caption not in captions and len(images) < limit:
                item = pool[i]
                images.append(item["image"])
                captions.append(item["caption"])
        return torch.stack(images), captions

    def sample(self, count: int) -> torch.Tensor:
        """``count`` training pictures in the proportions of a batch, N x 3 x H x W in [-1, 1]."""
        pool, sampler = self.pools["train"], self.train_dataloader().sampler
        order = itertools.chain.from_iterable(itertools.repeat(sampler))
        return torch.stack([pool[i]["image"] for i in itertools.islice(order, count)])


class Stream(Sampler[tuple[int, int]]):
    """An endless stream of (position, item): position p is the p-th sample that the whole run sees.

    Items come in shuffled passes that depend on (seed, pass) only. Rank r of R takes its share of each global batch,
    and a resumed run starts at the position it had reached, so that one process, eight, and a resumed run see the same
    samples.
    """

    def __init__(self, length: int, batch: int, seed: int = 0, rank: int = 0, world: int = 1, start: int = 0):
        self.length, self.batch, self.seed, self.rank, self.world, self.start = length, batch, seed, rank, world, start

    def item(self, position: int) -> int:
        around = position // self.length
        if getattr(self, "around", None) != around:
            self.around = around
            self.order = np.random.default_rng([self.seed, around]).permutation(self.length)
        return int(self.order[position % self.length])

    def __iter__(self):
        for n in itertools.count(self.start):  # global batches
            first = (n * self.world + self.rank) * self.batch
            for position in range(first, first + self.batch):
                yield position, self.item(position)


class Draws(torch.utils.data.Dataset):
    """Cached items with everything random that a training step needs, drawn from (seed, position) alone.

    Adds ``noise``, ``encode``, ``encode_masked`` (unit normal, C x h x w: diffusion noise and the two posterior
    samples), ``time`` in [0, 1) (scaled to a timestep by the objective), ``drop`` in [0, 1) (prompt dropout),
    ``beside`` in [0, 1) (whether a companion runs) and ``tokens``. ``augment``: exemplars are augmented
    (``exemplars.augment``), also by (seed, position).
    """

    def __init__(
        self, latents: Latents, tokens: torch.Tensor, branches: Sequence[str], seed: int, augment: bool = False
    ):
        self.latents, self.tokens, self.seed, self.augment = latents, tokens, seed, augment
        self.hints = {f"hint_{branch}" for branch in branches}

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        position, i = key
        item = self.latents[i]
        item = {k: v for k, v in item.items() if not k.startswith("hint_") or k in self.hints}
        rng = torch.Generator().manual_seed((self.seed * 1_000_003 + position) % 2**63)
        c, h, w = item["moments"].shape
        item["noise"], item["encode"], item["encode_masked"] = torch.randn(3, c // 2, h, w, generator=rng)
        item["time"], item["drop"], item["beside"] = torch.rand(3, generator=rng)
        if self.augment and "hint_exemplar" in item:
            picture = np.rint(255 * item["hint_exemplar"].numpy()).astype(np.uint8).transpose(1, 2, 0)
            item["hint_exemplar"] = to_hint(augment(picture, np.random.default_rng([self.seed, position])))
        return item | {"tokens": self.tokens[item["row"]]}


class LatentShards(Shards):
    """The shards of several caches of one kit, one cache after another."""

    def __init__(self, kit: Kit, caches: Sequence[Cache], say: Callable[[str], None]):
        super().__init__("latents", say)
        self.kit, self.caches = kit, list(caches)
        self.places = [(cache, n) for cache in self.caches for n in range(len(cache.shards))]

    @property
    def sizes(self) -> list[int]:
        return [len(cache.shards[n]) for cache, n in self.places]

    def is_made(self, n: int) -> bool:
        cache, at = self.places[n]
        return cache.is_made(at)

    def on_predict_start(self) -> None:
        self.kit.to(self.device)

    def make(self, n: int) -> None:
        cache, at = self.places[n]
        cache.make(at)

    def finish(self) -> None:
        for cache in self.caches:
            cache.finish()


def build(caches: Sequence[Cache], trainer: lightning.Trainer | None = None) -> list[Path]:
    """Make or complete ``caches`` of one kit over the processes of ``trainer``; returns their folders. Good shards are
    not redone.
    """
    kit, say = caches[0].kit, caches[0].say
    make_shards(LatentShards(kit, caches, say), trainer or predictor())
    kit.to("cpu")
    return [cache.folder for cache in caches]


class LatentData(lightning.LightningDataModule):
    """Cached latents of a manifest's train and validation split; reads manifest and cache only.

    ``batch_size`` is that of one process. ``branch`` names the hint, or the hints, that travel with a batch (None: no
    hint). ``augment``: exemplars are augmented in training.
    ``prepare`` must have been called before training, by every process of its trainer.
    """

    def __init__(
        self,
        manifest: str,
        kit: Kit,
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
        augment: bool = False,
    ):
        super().__init__()
        self.augment = augment
        self.manifest, self.kit, self.cache = Path(manifest), kit, Path(cache)
        self.batch_size, self.workers, self.seed = batch_size, workers, seed
        self.branches = [branch] if isinstance(branch, str) else list(branch or ())
        self.recipes = {
            "train": Recipe(crop, hole, variants, hints or {}, seed, mismatch),
            "validation": Recipe("centre", "kit" if hole == "kit" else "dilate", 1, hints or {}, seed, mismatch),
        }
        self.sets: dict[str, Draws] = {}

    def prepare(self, trainer: lightning.Trainer | None = None, say: Callable[[str], None] = tell) -> dict[str, Path]:
        """Make or complete the caches over the processes and devices of ``trainer`` (see ``shards.predictor``)."""
        caches = [Cache(self.manifest, split, self.kit, r, self.cache, say) for split, r in self.recipes.items()]
        return dict(zip(self.recipes, build(caches, trainer), strict=True))

    def setup(self, stage=None):
        for split, recipe in self.recipes.items():
            rows = read_manifest(self.manifest, split)[1]
            description = describe(self.kit, recipe, rows)
            latents = Latents(self.cache / f"{split}-{key(description)}", description)
            tokens = self.kit.tokens([row.caption for row in rows])
            self.sets[split] = Draws(latents, tokens, self.branches, self.seed, self.augment and split == "train")

    def train_dataloader(self):
        draws, trainer = self.sets["train"], self.trainer
        start = trainer.global_step * trainer.accumulate_grad_batches
        stream = Stream(len(draws), self.batch_size, self.seed, trainer.global_rank, trainer.world_size, start)
        return self.loader(draws, stream)

    def val_dataloader(self):
        draws = self.sets["validation"]
        return self.loader(draws, [(i, i) for i in range(len(draws))])

    def loader(self, draws: Draws, order) -> DataLoader:
        pin = torch.cuda.is_available()
        keep = self.workers > 0
        return DataLoader(
            draws, self.batch_size, sampler=order, num_workers=self.workers, pin_memory=pin, persistent_workers=keep
        )

    def examples(self, count: int, split: str = "test") -> dict:
        """``count`` held-out rows at the kit's resolution: ``image``, ``hole`` (latent), ``pixel_hole``, ``tokens``."""
        rows = read_manifest(self.manifest, split)[1]
        rows = rows[:: max(1, len(rows) // count)][:count]
        shown = [example(row, self.manifest.parent, Recipe(), self.kit.resolution) for row in rows]
        holes = torch.from_numpy(np.stack([e.hole for e in shown])[:, None]).float()
        return {
            "image": torch.stack([to_model(e.image) for e in shown]),
            "hole": to_latent(holes, self.kit.factor),
            "pixel_hole": holes,
            "tokens": self.kit.tokens([row.caption for row in rows]),
        }


class Views(torch.utils.data.Dataset):
    """Latent moments N x 2 x 2C x h x w of pictures and their mirror images, with what a step draws.

    An item is ``moments`` 2C x h x w, ``noise`` and ``encode`` (unit normal, C x h x w), ``time`` and ``template`` in
    [0, 1), all drawn from (seed, position) alone, and the number of the ``picture``.
    """

    def __init__(self, moments: torch.Tensor, seed: int):
        self.moments, self.seed = moments, seed

    def __len__(self) -> int:
        return len(self.moments)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, torch.Tensor]:
        position, i = key
        rng = torch.Generator().manual_seed((self.seed * 1_000_003 + position) % 2**63)
        _, _, c, h, w = self.moments.shape
        noise, encode = torch.randn(2, c // 2, h, w, generator=rng)
        mirrored, time, template = torch.rand(3, generator=rng)
        moments = self.moments[i, int(mirrored < 0.5)]
        return {"moments": moments, "noise": noise, "encode": encode, "time": time, "template": template, "picture": i}


class PicturesData(lightning.LightningDataModule):
    """The few pictures of a concept, in ``folder`` itself; encoded once, in memory.

    A ``captions.json`` beside them may say what else they show, with {} where the word belongs: ``{"1.jpg": "a {} on
    grass"}``. ``center_crop``: the central square of each; otherwise it is squashed to one. Validation has one batch of
    ``previews`` indices, the noise of the pictures that are looked at.
    """

    def __init__(
        self, folder: str, kit: Kit, batch_size: int = 4, center_crop: bool = True, previews: int = 8, seed: int = 0
    ):
        super().__init__()
        self.folder, self.kit, self.batch_size, self.seed = Path(folder), kit, batch_size, seed
        self.center_crop, self.previews = center_crop, previews

    @cached_property
    def files(self) -> list[Path]:
        """The pictures, by name. UserError where there are none."""
        return pictures_in(self.folder)

    @cached_property
    def pictures(self) -> list[np.ndarray]:
        """Uint8 R x R x 3, upright."""
        side, squares = self.kit.resolution, []
        for image in map(read_image, self.files):
            height, width = image.shape[:2]
            middle = square_around((width // 2, height // 2, width // 2 + 1, height // 2 + 1), width, height)
            squares.append(crop_resize(image, middle, side) if self.center_crop else resize(image, side, side))
        return squares

    @cached_property
    def captions(self) -> list[str | None]:
        """What is said of each picture; None where nothing is. UserError for one that has no place for the word."""
        given = folder_captions(self.folder)
        found = [next(iter(given.get(file.stem, given.get(file.name, []))), None) for file in self.files]
        if wrong := [text for text in found if text is not None and "{}" not in str(text)]:
            raise UserError(
                f"{self.folder}/captions.json: {wrong[0]!r} has no {{}}, the place of the word to be learnt"
            )
        return found

    def hashes(self) -> dict[str, str]:
        """Name and sha256 of each picture, and of their captions."""
        said = self.folder / "captions.json"
        return {file.name: sha256(file) for file in (*self.files, *([said] if said.is_file() else ()))}

    def setup(self, stage=None):
        pixels = to_model(np.stack(self.pictures))
        both = torch.stack([pixels, pixels.flip(-1)], 1)
        moments = torch.stack([self.kit.moments(pair.to(self.kit.device)).float().cpu() for pair in both])
        self.views = Views(moments, self.seed)

    def train_dataloader(self):
        trainer = self.trainer
        start = trainer.global_step * trainer.accumulate_grad_batches
        stream = Stream(len(self.views), self.batch_size, self.seed, trainer.global_rank, trainer.world_size, start)
        return DataLoader(self.views, self.batch_size, sampler=stream)

    def val_dataloader(self):
        return DataLoader(range(self.previews), self.previews)


class JudgeData(lightning.LightningDataModule):
    """Composites of a manifest for the judge, ``batch_size`` pairs at a time.

    ``photos``: the share of photographs among them where it has renders too. The validation loaders are the validation
    and the test split, each picture once.
    """

    def __init__(self, manifest: str, side: int, batch_size: int, photos: float = 0.5, workers: int = 0, seed: int = 0):
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.sets: dict[str, Composites] = {}

    def setup(self, stage=None):
        h = self.hparams
        for split in ("train", "validation", "test"):
            if split not in self.sets:
                crop, photos = ("jitter", h.photos) if split == "train" else ("centre", None)
                self.sets[split] = Composites(Path(h.manifest), split, h.side, crop, h.seed, photos)

    def train_dataloader(self):
        h, trainer, composites = self.hparams, self.trainer, self.sets["train"]
        start = trainer.global_step * trainer.accumulate_grad_batches
        stream = Stream(len(composites), h.batch_size, h.seed, trainer.global_rank, trainer.world_size, start)
        return DataLoader(composites, h.batch_size, sampler=stream, num_workers=h.workers)

    def val_dataloader(self):
        return [
            DataLoader(s, self.hparams.batch_size, sampler=[(i, i) for i in range(len(s))])
            for s in (self.sets["validation"], self.sets["test"])
        ]
