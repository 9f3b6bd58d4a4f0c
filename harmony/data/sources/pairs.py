"""Composites with the photographs that they should become, as a ``Selection``.

    before/NAME.jpg                      after/NAME.jpg        masks/NAME.png         a user's; masks/ may be missing
    composite_images/ID_MASK_N.jpg       real_images/ID.jpg    masks/ID_MASK.png      iHarmony4 (Cong 2020)

Both stand in the folder itself, in folders of iHarmony4's subsets, or in folders of splits. A name's hash draws the
splits, so that all composites of one photograph fall into one. Lists such as ``HCOCO_train.txt`` or ``vallist.txt`` set
them instead, and may tear a photograph's composites apart, which is told; of a name in several, test holds before
validation and train. Without ``masks/`` the mask is where the two pictures differ.
"""

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import polars as pl

from harmony.core.errors import UserError
from harmony.core.foreign import is_file_name, read_lines
from harmony.core.row import SPLITS
from harmony.data.captions import NO_LABEL
from harmony.data.sources.files import (
    SPLIT_NAMES,
    folder_captions,
    image_files,
    list_words,
    locate,
    picture_name,
    split_folder,
    tell_names,
    tell_omissions,
)
from harmony.data.sources.folder import SCHEMA, draw, draw_split, draw_splits, mask_box, mask_files
from harmony.data.sources.open_images.batches import map_in_threads
from harmony.data.sources.selection import BAD_NAME, CORNERS, KEPT, Rules, Selection, Source, reject_repeats
from harmony.data.stamps import make_stamp
from harmony.pixels.images import open_image, read_image, write_image
from harmony.pixels.masks import find_change

VALIDATION = 0.1  # share of the photographs of a train list that has no validation list beside it
SUBSETS = ("HCOCO", "HAdobe5k", "HFlickr", "Hday2night")  # folders of iHarmony4


class Naming(NamedTuple):
    """The folders of composites and photographs, and how many words behind ``_`` their names add to others.

    ``mask_words``: to the mask's, ``truth_words``: to the photograph's.
    """

    composites: str
    truths: str
    mask_words: int
    truth_words: int


class Place(NamedTuple):
    """A folder with pairs of one naming, and the split that it belongs to; None where names decide."""

    folder: Path
    naming: Naming
    split: str | None


class Pair(NamedTuple):
    """The files of one composite, which may be missing; ``split`` as in ``Place``, ``truth_id`` names the photograph.

    ``mask``: None where the pictures themselves tell it.
    """

    id: str
    truth_id: str
    split: str | None
    composite: Path
    truth: Path
    mask: Path | None


NAMINGS = (Naming("before", "after", 0, 0), Naming("composite_images", "real_images", 1, 2))


def select_recipe(recipe: dict, work: Path) -> Selection:
    """Select the pairs of a recipe; masks that the pictures tell go to ``work``."""
    return select_pairs(locate(recipe), recipe["splits"], Rules.of(recipe["select"]), work)


def select_pairs(root: Path, splits: Sequence[str], rules: Rules, work: Path) -> Selection:
    """Select all composites whose photograph and mask are usable; the others get a reason.

    Raises UserError if there are no folders of pairs, or no composite in them.
    """
    places = find_places(root, splits)
    lists = read_lists({root, *(place.folder for place in places)})
    pairs = [pair for place in places for pair in list_pairs(place)]
    pairs += list_missing_pairs(places[0], lists, {pair.id for pair in pairs})
    if not pairs:
        raise UserError(
            f"{places[0].folder / places[0].naming.composites}: no pictures there; put the composites in it"
        )
    rows = map_in_threads(lambda pair: pair_row(pair, root, rules, work), pairs, "look at the pairs")
    set_splits(rows, pairs, lists)
    reject_repeats(rows)
    tell_shared_photographs(root, rows)
    table = pl.DataFrame(rows, schema=SCHEMA | {"composite": pl.String})
    return Selection(root, table.filter(pl.col("split").is_in(list(splits))).sort("split", "id"), rules)


def find_places(root: Path, splits: Sequence[str]) -> list[Place]:
    """Find the folders of pairs. UserError if there are none."""
    folders = [(root, None), *((root / subset, None) for subset in SUBSETS)]
    folders += [(split_folder(root, split), split) for split in splits]
    places = [
        Place(folder, naming, split)
        for folder, split in folders
        for naming in NAMINGS
        if (folder / naming.composites).is_dir() and (folder / naming.truths).is_dir()
    ]
    if not places:
        names = " nor ".join(f"{naming.composites}/ with {naming.truths}/" for naming in NAMINGS)
        raise UserError(f"{root}: neither {names} there; see datasets/pairs/README.md")
    return places


def list_pairs(place: Place) -> Iterator[Pair]:
    """Yield the pairs of a folder; name the photographs and masks of no composite."""
    folder, naming, split = place
    truths = {path.stem: path for path in image_files(folder / naming.truths)}
    masks = mask_files(folder / "masks")
    truth_ids, mask_ids = set(), set()
    for composite in image_files(folder / naming.composites):
        truth_id, mask_id = (cut_words(composite.stem, n) for n in (naming.truth_words, naming.mask_words))
        truth = truths.get(truth_id, folder / naming.truths / f"{truth_id}.jpg")
        mask = masks.get(mask_id, folder / "masks" / f"{mask_id}.png") if (folder / "masks").is_dir() else None
        truth_ids.add(truth_id)
        mask_ids.add(mask_id)
        yield Pair(composite.stem, truth_id, split, composite, truth, mask)
    lonely_truths = [path.name for stem, path in truths.items() if stem not in truth_ids]
    tell_omissions(f"{folder / naming.truths}: photographs of no composite", lonely_truths)
    lonely_masks = [path.name for stem, path in masks.items() if stem not in mask_ids]
    tell_omissions(f"{folder / 'masks'}: masks of no composite", lonely_masks)


def cut_words(name: str, count: int) -> str:
    """The name without its last ``count`` words behind ``_``."""
    return name.rsplit("_", count)[0]


def read_lists(folders: Iterable[Path]) -> dict[str, str]:
    """Read {name of a composite: its split} from the lists ``*train.txt``, ``*test.txt``, ... in ``folders``.

    A name in lists of several splits is told; test holds before validation, and that before train.
    """
    paths = sorted(path for folder in folders for path in folder.glob("*.txt"))
    splits, repeats = {}, set()
    for split in SPLITS:  # the last holds
        lines = [line.strip() for path in paths if split_of_list(path) == split for line in read_lines(path)]
        names = {picture_name(Path(line).name) for line in lines} - {""}
        repeats |= names & set(splits)
        splits |= dict.fromkeys(names, split)
    tell_names("names in lists of several splits, of which test holds before validation and train", sorted(repeats))
    return splits


def split_of_list(path: Path) -> str | None:
    """The split of a list, which is the last word of its name or stands before ``list``; None for other texts."""
    words = list_words(path.stem)
    return SPLIT_NAMES.get("".join(words[-2:] if words[-1:] == ["list"] else words[-1:]).removesuffix("list"))


def list_missing_pairs(place: Place, lists: dict[str, str], names: set[str]) -> Iterator[Pair]:
    """Yield a pair of ``place`` for each name in a list that has no file."""
    folder, naming, _ = place
    for name in sorted(set(lists) - names):
        truth_id = cut_words(name, naming.truth_words)
        paths = (folder / naming.composites / f"{name}.jpg", folder / naming.truths / f"{truth_id}.jpg")
        yield Pair(name, truth_id, None, *paths, None)


def set_splits(rows: Sequence[dict], pairs: Sequence[Pair], lists: dict[str, str]) -> None:
    """Set the split of each row: its folder's, else that of the lists, else one drawn by the photograph's name."""
    has_validation = "validation" in lists.values()
    drawn_splits = draw_splits(sorted({pair.truth_id for pair, row in zip(pairs, rows) if row["reason"] == KEPT}))
    for pair, row in zip(pairs, rows, strict=True):
        row["split"] = pair.split or drawn_splits.get(pair.truth_id) or draw_split(pair.truth_id)
        if lists and pair.split is None:
            row["split"] = split_by_lists(pair, lists, has_validation)
            if pair.id not in lists and row["reason"] == KEPT:
                row["reason"] = "id not listed"


def tell_shared_photographs(root: Path, rows: Sequence[dict]) -> None:
    """Name the photographs whose composites are in several splits, which only lists can say."""
    splits = defaultdict(set)
    for row in rows:
        if row["reason"] == KEPT:
            splits[row["image"]].add(row["split"])
    names = sorted(Path(image).name for image, others in splits.items() if len(others) > 1)
    tell_names(f"{root}: photographs with composites in several splits, as the lists say", names)


def split_by_lists(pair: Pair, lists: dict[str, str], has_validation: bool) -> str:
    """The split of a pair where lists set them; validation is a tenth of train, by photographs, if it has no list."""
    split = lists.get(pair.id, "train")
    is_drawn = split == "train" and not has_validation and draw(pair.truth_id) < VALIDATION
    return "validation" if is_drawn else split


def pair_row(pair: Pair, root: Path, rules: Rules, work: Path) -> dict:
    """The row of ``COLUMNS`` of a pair, with its composite and without a split."""
    mask = pair.mask or work / "changes" / (pair.split or "") / f"{pair.id}-{stamp_pair(pair)}.png"
    paths = {"image": pair.truth, "mask": mask, "composite": pair.composite}
    if not all(is_file_name(path.name) for path in paths.values()):
        name = pair.composite.name.encode(errors="replace").decode()
        return {"id": name, "reason": BAD_NAME, "label": NO_LABEL, **dict.fromkeys(paths, name)}
    row = {"id": pair.id, "label": NO_LABEL} | {name: os.path.relpath(path, root) for name, path in paths.items()}
    size = read_size(pair)
    if isinstance(size, str):
        return row | {"reason": size}
    if not (pair.mask or mask.is_file()):
        write_image(mask, find_change(read_image(pair.composite), read_image(pair.truth)))
    reason, box = mask_box(pair.truth, mask, rules, size)
    return row | {"reason": reason, **dict(zip(CORNERS, box, strict=True))}


def read_size(pair: Pair) -> tuple[int, int] | str:
    """Width and height of a composite and its photograph, or the reason for which they do not go together."""
    if not pair.composite.is_file():
        return "composite file missing"
    if not pair.truth.is_file():
        return "image file missing"
    try:
        size = open_image(pair.composite).size
    except UserError:
        return "composite undecodable"
    try:
        return size if open_image(pair.truth).size == size else "composite shape differs"
    except UserError:
        return "image undecodable"


def stamp_pair(pair: Pair) -> str:
    """A part of a name that changes with the two pictures."""
    return make_stamp([str(pair.composite), str(pair.truth)])[:8]


def read_captions(root: Path, splits: Sequence[str]) -> dict[str, list[str]]:
    """Read captions by people, {<split>/<id>: [caption, ...]}, by the names of composites or of photographs."""
    captions = {}
    for folder, naming, split in find_places(root, splits):
        ids = [path.stem for path in image_files(folder / naming.composites)]
        truth_ids = {id_: cut_words(id_, naming.truth_words) for id_ in ids}
        texts = folder_captions(folder, {*truth_ids, *truth_ids.values()})
        for id_, truth_id in truth_ids.items():
            if text := texts.get(id_) or texts.get(truth_id):
                captions |= {f"{other}/{id_}": text for other in ([split] if split else splits)}
    return captions


def list_places(root: Path, splits: Sequence[str]) -> list[Path]:
    """List the folders of pairs, the lists and the captions, also of subsets and splits that may come."""
    names = ["masks", "captions.json", *(name for naming in NAMINGS for name in (naming.composites, naming.truths))]
    folders = ["", *SUBSETS, *SPLIT_NAMES]
    lists = [path for folder in folders for path in sorted((root / folder).glob("*.txt"))]
    return [root / folder / name for folder in folders for name in names] + lists


PAIRS = Source(select_recipe, read_captions, list_places)
