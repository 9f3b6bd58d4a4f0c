"""The latent cache: the inputs of training steps, computed once, in checksummed memory-mapped shards.

A cache belongs to one split of one manifest and one backbone. Its key is a hash of everything that determines its
contents (the backbone's VAE, resolution, crop rule, hole rule, hint parameters, rows, schema version); a cache with
another key is an error. Posterior *moments* are stored, not samples, so that the latent's noise stays random. Each
shard is moved into place when it is complete: a killed process loses at most one shard, and the same command resumes. A
shard with a wrong checksum is built again, never trained on.
"""

import hashlib
import json
import math
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
from harmony.data.manifest import read_split
from harmony.pixels.composites import change_light
from harmony.pixels.exemplars import SHAPE_SHARE, cut_out, draw_crop, draw_hole, exemplar, extend_box
from harmony.pixels.hints import hint
from harmony.pixels.images import Crop, crop_resize, read_image, resize, sha256, square_around, to_model
from harmony.pixels.masks import bounding_box, coverage, hole, move_mask, read_mask, resize_mask, to_latent

CACHE_SCHEMA = 1
INDEX = "index.json"  # what describes a cache, written last
SHARD = 256  # items in a shard
SHAPE_SHARES = {"shape": SHAPE_SHARE, "box": 0.0}  # hole rules around the extended box -> share of arbitrary shapes


class Codec(Protocol):
    """The part of ``models.backbone.Backbone`` that the cache needs."""

    factor: int
    resolution: int
    device: torch.device

    def hash(self, part: str) -> str: ...

    def moments(self, x: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True)
class Recipe:
    """How a row becomes training items.

    ``crop``: ``center`` (the deterministic square around the instance), ``jitter`` (a random square that contains the
    instance, mirrored half of the time) or ``extended`` (Paint by Example's, around the extended box). ``hole``: a rule
    of ``masks.hole``, or for ``extended`` crops ``shape`` (half of the time of arbitrary shape) or ``box`` (always the
    extended box). ``variants``: items for each row, with different crops and holes. ``hints``: branch -> parameters of
    its operator; for ``exemplar`` the ``size`` S at which it is stored. Variant 0 of ``center`` + ``dilate`` is the
    test protocol.

    ``mismatch``: share of items whose hints show the instance under another light than the picture's: the render under
    a second light or the composite if the dataset has one, else a random change of exposure, contrast and white
    balance. Exemplars keep the picture's light.

    ``context``: side of the square relative to the longer side of the instance's box, as ``harmonize`` cuts it; random
    around it for ``jitter``. None: as large as the photograph allows.

    ``elsewhere``: share of items, of ``jitter`` crops, in which the mask is moved to another region of the photograph,
    which takes the place of the instance. What light an object needs can be learned on any part of a photograph.

    ``recolor``: share of items, of photographs alone, whose whole picture is first put under a random other light, so
    that a net cannot learn the colors of each photograph by heart.

    UserError for options that ``extended`` crops do not know, and for ``recolor`` with exemplars.
    """

    crop: str = "center"
    hole: str = "dilate"
    variants: int = 1
    hints: dict[str, dict] = field(default_factory=dict)
    seed: int = 0
    mismatch: float = 0.0
    elsewhere: float = 0.0
    recolor: float = 0.0
    context: float | None = None

    def __post_init__(self) -> None:
        extended = ("mismatch", "elsewhere", "recolor", "context") if self.crop == "extended" else ()
        for name in (*extended, *(("recolor",) if "exemplar" in self.hints else ())):
            if getattr(self, name):
                raise UserError(f"data.{name} is for ControlNets: leave it out where there are exemplars")


@dataclass(frozen=True)
class Example:
    """A row at the backbone's resolution: pictures uint8 R x R x 3 and masks bool R x R.

    ``crop`` is the square of the photograph (None: the whole photograph, squashed). ``instance`` is the picture that
    hints are made from: ``image``, or the same object under another light (``relit``). ``exemplar`` is the instance's
    box cut out of the photograph (``exemplars.cut_out``), uint8 at its original size, if the recipe needs one.
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
        """The picture of the instance for hints."""
        return self.image if self.relit is None else self.relit


def draw_jitter_crop(
    box: Sequence[float], width: int, height: int, rng: np.random.Generator, context: float | None = None
) -> Crop:
    """A random square that contains the box if possible: 70 to 100 % of the short side, or of ``context`` boxes.

    With ``context`` it is 75 to 150 % of that many box sides, but not more than the short side.
    """
    x0, y0 = (max(0, math.floor(value)) for value in box[:2])
    x1, y1 = (min(length, math.ceil(value)) for value, length in zip(box[2:], (width, height), strict=True))
    whole, longer = square_around(box, width, height), max(x1 - x0, y1 - y0)
    share = rng.uniform(0.7, 1) if context is None else rng.uniform(0.75, 1.5)
    usual = whole.side if context is None else context * longer
    side = round(max(longer + 1, min(whole.side, usual * share)))
    if side >= whole.side:
        return whole

    def start(low: int, high: int, length: int) -> int:
        return int(rng.integers(max(0, high - side), min(low, length - side) + 1))

    return Crop(start(x0, x1, width), start(y0, y1, height), side)


def example(row: Row, root: Path, recipe: Recipe, resolution: int, variant: int = 0) -> Example:
    """Build the example of a row: the only place where crop and hole are chosen."""
    image = read_image(root / row.image)
    height, width = image.shape[:2]
    mask = read_mask(root / row.mask, (width, height), resize=True)
    rng = np.random.default_rng([recipe.seed, variant, row.number])
    object_ = cut_out(image, mask) if "exemplar" in recipe.hints else None
    if recipe.crop == "extended":
        square = replace(build_extended_example(image, mask, recipe, resolution, rng), exemplar=object_)
        if not (square.mask.any() and square.hole.any()):
            raise empty_mask_error(row, resolution)
        return square
    jitter, light = recipe.crop == "jitter", row.extras.get("relit") or row.extras.get("composite")
    if jitter:
        crop = draw_jitter_crop(row.box, width, height, rng, recipe.context)
    else:
        crop = square_around(row.box, width, height, recipe.context)
    if jitter and recipe.elsewhere and rng.random() < recipe.elsewhere:
        moved = move_mask(mask, rng)
        place = draw_jitter_crop(bounding_box(moved), width, height, rng, recipe.context)
        if crop_resize(moved, place, resolution).any():  # a thin shape may vanish where the instance did not
            mask, crop, light = moved, place, row.extras.get("relit")  # a composite shows its object alone in it
    mirrored = bool(jitter and rng.random() < 0.5)
    image, mask = crop_resize(image, crop, resolution), crop_resize(mask, crop, resolution)
    if mirrored:
        image, mask = np.ascontiguousarray(image[:, ::-1]), np.ascontiguousarray(mask[:, ::-1])
        object_ = None if object_ is None else np.ascontiguousarray(object_[:, ::-1])
    if not mask.any():
        raise empty_mask_error(row, resolution)
    hole_mask = hole(mask, recipe.hole, rng)
    if recipe.recolor and "relit" not in row.extras and rng.random() < recipe.recolor:
        image = change_light(image, rng)
    relit = None
    if recipe.mismatch and rng.random() < recipe.mismatch:
        if light is not None:
            relit = crop_resize(read_image(root / light), crop, resolution)
            relit = np.ascontiguousarray(relit[:, ::-1]) if mirrored else relit
        else:
            relit = change_light(image, rng)
    return Example(image, mask, hole_mask, crop, mirrored, relit, object_)


def empty_mask_error(row: Row, resolution: int) -> UserError:
    """The error for a mask that has no pixel at ``resolution``."""
    return UserError(f"{row.mask}: the instance vanishes at {resolution} px; raise select.min_area and prepare again")


def build_extended_example(
    image: np.ndarray, mask: np.ndarray, recipe: Recipe, resolution: int, rng: np.random.Generator
) -> Example:
    """The example for Paint by Example: a hole around the extended box, and a random square that contains it."""
    if recipe.hole not in SHAPE_SHARES:
        raise UserError(
            f"hole rule '{recipe.hole}' does not go with crop 'extended'; use one of {', '.join(SHAPE_SHARES)}"
        )
    height, width = mask.shape
    box = bounding_box(mask)
    outer_box = extend_box(box, width, height, rng)
    hole_mask = draw_hole(box, outer_box, width, height, rng, SHAPE_SHARES[recipe.hole])
    crop = draw_crop(outer_box, width, height, rng)
    if crop is not None:
        image, mask, hole_mask = (crop_resize(a, crop, resolution) for a in (image, mask, hole_mask))
    else:  # no square contains the box: squash the whole picture, as the released code of Yang 2022 does
        image = resize(image, resolution, resolution)
        mask, hole_mask = (resize_mask(m, resolution, resolution) for m in (mask, hole_mask))
    return Example(image, mask, hole_mask, crop)


def describe(backbone: Codec, recipe: Recipe, rows: list[Row]) -> dict:
    """Everything that determines the contents of a cache."""
    facts = json.dumps([(r.id, r.mask, list(r.box), *row_hashes(r).values()) for r in rows]).encode()
    return {
        "schema": CACHE_SCHEMA,
        "vae": backbone.hash("vae"),
        "resolution": backbone.resolution,
        **asdict(recipe),
        "rows": hashlib.sha256(facts).hexdigest(),
    }


def row_hashes(row: Row) -> dict[str, str | None]:
    """The hashes that the manifest has of a row's files, {path: sha256}."""
    hashes = {row.image: row.sha256, row.mask: row.extras.get("mask_sha256")}
    others = ("relit", "composite")
    return hashes | {row.extras[name]: row.extras.get(f"{name}_sha256") for name in others if name in row.extras}


def check_files(row: Row, root: Path) -> None:
    """Raise UserError unless the files of a row are those of the manifest."""
    for name, digest in row_hashes(row).items():
        if not (root / name).exists():
            raise UserError(f"{root / name} does not exist: run harmony.prepare, which takes up what has changed")
        if digest is not None and sha256(root / name) != digest:
            raise UserError(f"{root / name} is not the file of the manifest (its sha256 differs): run harmony.prepare")


def cache_key(description: dict) -> str:
    """The key of a cache: a hash of its description."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]


def encode(examples: list[Example], backbone: Codec, recipe: Recipe) -> dict[str, torch.Tensor]:
    """The tensors of examples: float16 moments, uint8 masks and hints."""
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
            hints = np.stack(
                [
                    hint(branch, e.instance, e.mask, e.image, e.hole, cell=backbone.factor, **parameters)
                    for e in examples
                ]
            )
        tensors[f"hint_{branch}"] = torch.from_numpy(hints).permute(0, 3, 1, 2).contiguous()
    return tensors


def write_shard(path: Path, tensors: dict[str, torch.Tensor]) -> str:
    """Write a shard atomically; returns its sha256."""
    write_tensors(path, tensors)
    return sha256(path)


class Cache:
    """Writes the shards of one split of a manifest under ``root``. UserError if the split has no rows."""

    def __init__(
        self,
        manifest: Path,
        split: str,
        backbone: Codec,
        recipe: Recipe,
        root: Path,
        say: Callable[[str], None] = tell,
    ):
        rows = read_split(manifest, split)
        self.manifest, self.split, self.backbone, self.recipe, self.say = manifest, split, backbone, recipe, say
        self.description = describe(backbone, recipe, rows)
        self.folder = root / f"{split}-{cache_key(self.description)}"
        items = [(row, v) for row in rows for v in range(recipe.variants)]
        self.shards = [items[i : i + SHARD] for i in range(0, len(items), SHARD)]

    def file(self, n: int) -> Path:
        """The file of shard ``n``."""
        return self.folder / f"{n:05d}.safetensors"

    def record(self, n: int) -> Path:
        """The file with the checksum of shard ``n``, which is written after the shard."""
        return self.folder / f"{n:05d}.json"

    def is_made(self, n: int) -> bool:
        """Whether shard ``n`` exists with the right checksum; a damaged one is reported and its record removed."""
        path, record = self.file(n), self.record(n)
        if not (path.exists() and record.exists()):
            return False
        if sha256(path) == read_digest(record):
            return True
        self.say(f"latents {self.split}: {path.name} is damaged (checksum differs), building it again")
        record.unlink()
        return False

    def make(self, n: int, batch: int = 32) -> None:
        """Write shard ``n``, ``batch`` items at a time through the VAE."""
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, list[torch.Tensor]] = {}
        squash_count, shard = 0, self.shards[n]
        for i in range(0, len(shard), batch):
            batch_items = shard[i : i + batch]
            for row in {row.id: row for row, _ in batch_items}.values():
                check_files(row, self.manifest.parent)
            examples = [
                example(row, self.manifest.parent, self.recipe, self.backbone.resolution, v) for row, v in batch_items
            ]
            if self.recipe.crop == "extended":
                not_square = [row.width != row.height for row, _ in batch_items]
                squash_count += sum(u and e.crop is None for u, e in zip(not_square, examples, strict=True))
            for name, tensor in encode(examples, self.backbone, self.recipe).items():
                tensors.setdefault(name, []).append(tensor)
        digest = write_shard(self.file(n), {name: torch.cat(parts) for name, parts in tensors.items()})
        write_json(self.record(n), {"sha256": digest})
        if squash_count:
            name = self.file(n).name
            self.say(f"{name}: {squash_count} items are squashed pictures, no square holds their extended box")

    def finish(self) -> None:
        """Write the index, which marks the cache as complete."""
        names = [self.file(n).name for n in range(len(self.shards))]
        sizes = dict(zip(names, map(len, self.shards), strict=True))
        digests = {name: read_digest(self.record(n)) for n, name in enumerate(names)}
        facts = {"key": cache_key(self.description), "description": self.description, "sizes": sizes, "shards": digests}
        write_json(self.folder / INDEX, facts)


def read_digest(record: Path) -> str | None:
    """Read the checksum in the record of a shard; None if the record is damaged."""
    try:
        return json.loads(record.read_text())["sha256"]
    except (ValueError, KeyError, TypeError):
        return None


def read_index(folder: Path) -> dict:
    """Read the index of a cache. UserError if it is missing or damaged."""
    try:
        return json.loads((folder / INDEX).read_text())
    except FileNotFoundError:
        raise UserError(
            f"no complete latent cache in {folder}: run the same command again without interrupting it"
        ) from None
    except json.JSONDecodeError:
        raise UserError(f"{folder / INDEX} is damaged: run harmony.fit again to rebuild it") from None


class Latents(torch.utils.data.Dataset):
    """The items of one cache, with the hints of ``branches`` (None: all), which alone are read.

    UserError for a cache whose description is not ``description`` (None: any).

    Item: ``moments``, ``masked_moments`` float32 2C x h x w, ``hole``, ``weight`` float32 1 x h x w, ``hint_<branch>``
    float32 3 x H x W in [0, 1] (exemplars 3 x S x S), ``row`` and ``index`` int. Item i belongs to row i // variants.
    """

    def __init__(self, folder: Path, description: dict | None = None, branches: Sequence[str] | None = None):
        self.folder = Path(folder)
        index = read_index(self.folder)
        if description is not None and index["key"] != cache_key(description):
            facts = index["description"]
            differences = [
                f"{k} {facts.get(k)!r} instead of {v!r}" for k, v in description.items() if facts.get(k) != v
            ]
            raise UserError(
                f"latent cache {self.folder} is stale or foreign ({'; '.join(differences)}): delete it, prepare again"
            )
        self.variants = index["description"]["variants"]
        self.files = list(index["sizes"])
        self.starts = np.cumsum([0, *index["sizes"].values()])
        self.branches = branches
        self.slices: dict[int, dict] = {}

    def __len__(self) -> int:
        return int(self.starts[-1])

    def shard(self, n: int) -> dict:
        """The memory-mapped slices of shard ``n``, opened once in each process."""
        if n not in self.slices:
            file = safe_open(self.folder / self.files[n], "pt")
            self.slices[n] = {name: file.get_slice(name) for name in file.keys() if self.reads(name)}  # noqa: SIM118
        return self.slices[n]

    def reads(self, name: str) -> bool:
        """Whether the tensor ``name`` belongs to an item."""
        branch = name.removeprefix("hint_")
        return branch == name or self.branches is None or branch in self.branches

    def __getitem__(self, i: int) -> dict:
        n = int(np.searchsorted(self.starts, i, side="right")) - 1
        index = i - int(self.starts[n])
        item = {}
        for name, part in self.shard(n).items():
            value = part[index]
            item[name] = value.float() / 255 if name.startswith(("hint", "weight")) else value.float()
        return item | {"index": i, "row": i // self.variants}

    def __getstate__(self) -> dict:  # open files are not sent to loader processes
        return vars(self) | {"slices": {}}
