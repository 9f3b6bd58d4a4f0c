"""The latent cache: everything a training step needs, computed once, in checksummed memory-mapped shards.

A cache belongs to one split of one manifest and one backbone. Its key is a hash of all that decides its contents
(backbone's VAE, resolution, crop rule, hole rule, hint parameters, rows, schema version); a cache with another key
is refused by name. Posterior *moments* are stored, not samples, so that the latent's noise stays random. Shards are
written one by one and moved into place when complete: a kill at any point costs at most one shard a process, and the
same command goes on. A shard whose checksum is wrong is built again, never trained on.
"""

import errno
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors import safe_open

from harmony.core.errors import UserError
from harmony.core.files import write_json, write_tensors
from harmony.core.progress import tell
from harmony.core.row import Row
from harmony.data.manifest import read_manifest
from harmony.pixels.composites import change_light
from harmony.pixels.exemplars import SHAPE_SHARE, cut_out, draw_crop, draw_hole, exemplar, extend_box
from harmony.pixels.hints import hint
from harmony.pixels.images import Crop, crop_resize, read_image, resize, sha256, square_around, to_model
from harmony.pixels.masks import bounding_box, coverage, hole, read_mask, resize_mask, to_latent

CACHE_SCHEMA = 1
SHARD = 256  # items a shard
EXTENDED = {"shape": SHAPE_SHARE, "box": 0.0}  # hole rules around the extended box -> share of arbitrary shapes


class Codec(Protocol):
    """What the cache needs of a backbone (``models.backbone.Backbone``, which stands on the same floor)."""

    factor: int
    resolution: int
    device: torch.device

    def hash(self, part: str) -> str: ...

    def moments(self, x: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True)
class Recipe:
    """How a row becomes training items.

    ``crop``: ``centre`` (the deterministic square around the instance), ``jitter`` (a random square that holds the
    instance, mirrored half of the time) or ``extended`` (Paint by Example's, around the extended box). ``hole``: a rule
    of ``masks.hole``, or with the latter ``shape`` (half of the time of arbitrary shape) or ``box`` (the extended box
    always). ``variants``: items a row, each with a crop and a hole of its own. ``hints``: branch -> parameters of its
    operator; for ``exemplar`` the ``size`` S at which it is stored. Variant 0 of ``centre`` + ``dilate`` is the test
    protocol.

    ``mismatch``: share of items whose hints come from an instance under another light than the picture's: the render
    under its second light where the dataset has one, else a random change of exposure, contrast and white balance.
    Exemplars stay in the picture's own light.
    """

    crop: str = "centre"
    hole: str = "dilate"
    variants: int = 1
    hints: dict[str, dict] = field(default_factory=dict)
    seed: int = 0
    mismatch: float = 0.0


@dataclass(frozen=True)
class Example:
    """One row at the backbone's resolution, uint8 R x R x 3 and bool R x R; ``crop`` is where it lies in the picture
    (None = the whole of it, squashed).

    ``instance`` is the picture that hints are made from: ``image``, or the same object under another light.
    ``exemplar``: the instance's box cut out of the photograph (``exemplars.cut_out``), uint8 in its own size, where one
    is wanted.
    """

    image: np.ndarray
    mask: np.ndarray
    hole: np.ndarray
    crop: Crop | None
    mirrored: bool = False
    relit: np.ndarray | None = None
    exemplar: np.ndarray | None = None

    @property
    def instance(self) -> np.ndarray:
        return self.image if self.relit is None else self.relit


def jittered(box: Sequence[float], width: int, height: int, rng: np.random.Generator) -> Crop:
    """A random square of 70 to 100 % of the short side that holds the box wherever that is possible."""
    x0, y0, x1, y1 = box
    whole = square_around(box, width, height)
    side = round(max(max(x1 - x0, y1 - y0) + 1, whole.side * rng.uniform(0.7, 1)))
    if side >= whole.side:
        return whole

    def start(low: float, high: float, length: int) -> int:
        return int(rng.integers(max(0, int(np.ceil(high)) - side), min(int(low), length - side) + 1))

    return Crop(start(x0, x1, width), start(y0, y1, height), side)


def example(row: Row, root: Path, recipe: Recipe, resolution: int, variant: int = 0) -> Example:
    """Picture, instance and hole of a row: the one place where crop and hole are decided."""
    image = read_image(root / row.image)
    height, width = image.shape[:2]
    mask = read_mask(root / row.mask, (width, height), resize=True)
    rng = np.random.default_rng([recipe.seed, variant, int(hashlib.sha256(row.id.encode()).hexdigest()[:8], 16)])
    object_ = cut_out(image, mask) if "exemplar" in recipe.hints else None
    if recipe.crop == "extended":
        square = replace(extended_example(image, mask, recipe, resolution, rng), exemplar=object_)
        if not (square.mask.any() and square.hole.any()):
            raise vanished(row, resolution)
        return square
    jitter = recipe.crop == "jitter"
    crop = jittered(row.box, width, height, rng) if jitter else square_around(row.box, width, height)
    mirrored = bool(jitter and rng.random() < 0.5)
    image, mask = crop_resize(image, crop, resolution), crop_resize(mask, crop, resolution)
    if mirrored:
        image, mask = np.ascontiguousarray(image[:, ::-1]), np.ascontiguousarray(mask[:, ::-1])
        object_ = None if object_ is None else np.ascontiguousarray(object_[:, ::-1])
    if not mask.any():
        raise vanished(row, resolution)
    opened = hole(mask, recipe.hole, rng)
    relit = None
    if recipe.mismatch and rng.random() < recipe.mismatch:
        if "relit" in row.extras:
            relit = crop_resize(read_image(root / row.extras["relit"]), crop, resolution)
            relit = np.ascontiguousarray(relit[:, ::-1]) if mirrored else relit
        else:
            relit = change_light(image, rng)
    return Example(image, mask, opened, crop, mirrored, relit, object_)


def vanished(row: Row, resolution: int) -> UserError:
    return UserError(f"{row.mask}: the instance vanishes at {resolution} px; raise select.min_area and prepare again")


def extended_example(
    image: np.ndarray, mask: np.ndarray, recipe: Recipe, resolution: int, rng: np.random.Generator
) -> Example:
    """What Paint by Example trains on: the hole around the extended box, and a random square that holds it."""
    if recipe.hole not in EXTENDED:
        raise UserError(f"hole rule '{recipe.hole}' does not go with crop 'extended'; use one of {', '.join(EXTENDED)}")
    height, width = mask.shape
    box = bounding_box(mask)
    extended = extend_box(box, width, height, rng)
    painted = draw_hole(box, extended, width, height, rng, EXTENDED[recipe.hole])
    crop = draw_crop(extended, width, height, rng)
    if crop is not None:
        image, mask, painted = (crop_resize(a, crop, resolution) for a in (image, mask, painted))
    else:  # no square holds the box: squash the whole picture, as the released code of Yang 2022 does
        image = resize(image, resolution, resolution)
        mask, painted = (resize_mask(m, resolution, resolution) for m in (mask, painted))
    return Example(image, mask, painted, crop)


def describe(backbone: Codec, recipe: Recipe, rows: list[Row]) -> dict:
    """All that decides the contents of a cache."""
    facts = json.dumps([(r.id, r.sha256, r.mask, list(r.box)) for r in rows]).encode()
    return {
        "schema": CACHE_SCHEMA,
        "vae": backbone.hash("vae"),
        "resolution": backbone.resolution,
        **asdict(recipe),
        "rows": hashlib.sha256(facts).hexdigest(),
    }


def key(description: dict) -> str:
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]


def encode(examples: list[Example], backbone: Codec, recipe: Recipe) -> dict[str, torch.Tensor]:
    """Tensors of some items: float16 moments, uint8 masks and hints."""
    x = torch.stack([to_model(e.image) for e in examples]).to(backbone.device)
    holes = torch.from_numpy(np.stack([e.hole for e in examples])[:, None]).float()
    masks = torch.from_numpy(np.stack([e.mask for e in examples])[:, None]).float()
    masked = x * (1 - holes.to(backbone.device))
    tensors = {
        "moments": backbone.moments(x).to("cpu", torch.float16),
        "masked_moments": backbone.moments(masked).to("cpu", torch.float16),
        "hole": to_latent(holes, backbone.factor).to(torch.uint8),
        "weight": (coverage(masks, backbone.factor) * 255).round().to(torch.uint8),
    }
    for branch, parameters in recipe.hints.items():
        if branch == "exemplar":
            hints = np.stack([exemplar(e.exemplar, **parameters) for e in examples])
        else:
            hints = np.stack([hint(branch, e.instance, e.mask, **parameters) for e in examples])
        tensors[f"hint_{branch}"] = torch.from_numpy(hints).permute(0, 3, 1, 2).contiguous()
    return tensors


def write_shard(path: Path, tensors: dict[str, torch.Tensor]) -> str:
    """Write atomically; returns the sha256. UserError when the disk is full; nothing half-written stays."""
    try:
        write_tensors(path, tensors)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"disk full while writing {path}: free some space; the same command goes on") from None
        raise
    except Exception as error:  # safetensors wraps the operating system's error in one of its own
        if "No space left" in str(error) or "os error 28" in str(error):
            raise UserError(f"disk full while writing {path}: free some space; the same command goes on") from None
        raise
    return sha256(path)


class Cache:
    """The shards of one split of a manifest under ``root``, as they are made. UserError when the split has no rows."""

    def __init__(
        self,
        manifest: Path,
        split: str,
        backbone: Codec,
        recipe: Recipe,
        root: Path,
        say: Callable[[str], None] = tell,
    ):
        rows = read_manifest(manifest, split)[1]
        if not rows:
            raise UserError(f"{manifest} has no rows in split {split}: check the recipe's splits and selection")
        self.manifest, self.split, self.backbone, self.recipe, self.say = manifest, split, backbone, recipe, say
        self.description = describe(backbone, recipe, rows)
        self.folder = root / f"{split}-{key(self.description)}"
        items = [(row, v) for row in rows for v in range(recipe.variants)]
        self.shards = [items[i : i + SHARD] for i in range(0, len(items), SHARD)]

    def file(self, n: int) -> Path:
        return self.folder / f"{n:05d}.safetensors"

    def record(self, n: int) -> Path:
        """What states the checksum of a shard, written behind it."""
        return self.folder / f"{n:05d}.json"

    def is_made(self, n: int) -> bool:
        """Whether shard ``n`` is there and has its checksum; a damaged one is reported and forgotten."""
        path, record = self.file(n), self.record(n)
        if not (path.exists() and record.exists()):
            return False
        if sha256(path) == stated_sha256(record):
            return True
        self.say(f"latents {self.split}: {path.name} is damaged (checksum differs), building it again")
        record.unlink()
        return False

    def make(self, n: int, batch: int = 32) -> None:
        """Write shard ``n``, ``batch`` items at a time through the VAE."""
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, list[torch.Tensor]] = {}
        squashed, shard = 0, self.shards[n]
        for i in range(0, len(shard), batch):
            part = shard[i : i + batch]
            examples = [example(row, self.manifest.parent, self.recipe, self.backbone.resolution, v) for row, v in part]
            if self.recipe.crop == "extended":
                uneven = [row.width != row.height for row, _ in part]
                squashed += sum(u and e.crop is None for u, e in zip(uneven, examples, strict=True))
            for name, tensor in encode(examples, self.backbone, self.recipe).items():
                tensors.setdefault(name, []).append(tensor)
        digest = write_shard(self.file(n), {name: torch.cat(parts) for name, parts in tensors.items()})
        write_json(self.record(n), {"sha256": digest})
        if squashed:
            self.say(f"{self.file(n).name}: {squashed} items are squashed pictures, no square holds their extended box")

    def finish(self) -> None:
        """Write the index, which says that all shards are there; what killed processes left half-written goes away."""
        for file in self.folder.glob(".*.partial"):
            file.unlink()
        names = [self.file(n).name for n in range(len(self.shards))]
        sizes = dict(zip(names, map(len, self.shards), strict=True))
        known = {name: stated_sha256(self.record(n)) for n, name in enumerate(names)}
        facts = {"key": key(self.description), "description": self.description, "sizes": sizes, "shards": known}
        write_json(self.folder / "index.json", facts)


def stated_sha256(record: Path) -> str | None:
    """What the record beside a shard says its checksum is; None when the record itself is torn."""
    try:
        return json.loads(record.read_text())["sha256"]
    except (ValueError, KeyError, TypeError):
        return None


def read_index(folder: Path) -> dict:
    try:
        return json.loads((folder / "index.json").read_text())
    except FileNotFoundError:
        raise UserError(
            f"no complete latent cache in {folder}: run the same command again without interrupting it"
        ) from None
    except json.JSONDecodeError:
        raise UserError(f"{folder}/index.json is damaged: run harmony.fit again, which builds it anew") from None


class Latents(torch.utils.data.Dataset):
    """The items of one cache. ``expected`` (a description) refuses a cache that was made for something else.

    Item: ``moments``, ``masked_moments`` float32 2C x h x w, ``hole``, ``weight`` float32 1 x h x w, ``hint_<branch>``
    float32 3 x H x W in [0, 1] (exemplars 3 x S x S), ``row`` and ``index`` int. Item i belongs to row i // variants.
    """

    def __init__(self, folder: Path, expected: dict | None = None):
        self.folder = Path(folder)
        index = read_index(self.folder)
        if expected is not None and index["key"] != key(expected):
            actual = index["description"]
            differs = [f"{k} {actual.get(k)!r} instead of {v!r}" for k, v in expected.items() if actual.get(k) != v]
            raise UserError(
                f"latent cache {self.folder} is stale or foreign ({'; '.join(differs)}): delete it, prepare again"
            )
        self.variants = index["description"]["variants"]
        self.files = list(index["sizes"])
        self.starts = np.cumsum([0, *index["sizes"].values()])
        self.open: dict[int, dict] = {}

    def __len__(self) -> int:
        return int(self.starts[-1])

    def shard(self, n: int) -> dict:
        """Memory-mapped slices of a shard, opened once in each process."""
        if n not in self.open:
            file = safe_open(self.folder / self.files[n], "pt")
            self.open[n] = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return self.open[n]

    def __getitem__(self, i: int) -> dict:
        n = int(np.searchsorted(self.starts, i, side="right")) - 1
        at = i - int(self.starts[n])
        item = {}
        for name, part in self.shard(n).items():
            value = part[at]
            item[name] = value.float() / 255 if name.startswith(("hint", "weight")) else value.float()
        return item | {"index": i, "row": i // self.variants}

    def __getstate__(self) -> dict:  # open files do not travel to loader processes
        return vars(self) | {"open": {}}
