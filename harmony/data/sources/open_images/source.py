"""A recipe in Open Images layout: the bundled renders, new renders, a user's folder, or the real Open Images."""

from collections.abc import Sequence
from pathlib import Path

from harmony.data.sources.files import locate, split_folder
from harmony.data.sources.open_images.download import download
from harmony.data.sources.open_images.layout import Split
from harmony.data.sources.open_images.select import select
from harmony.data.sources.selection import Rules, Selection, Source
from harmony.data.sources.studio.files import generate


def select_recipe(recipe: dict, work: Path) -> Selection:
    """Select the images of a recipe; render first with ``count``, download Open Images first without a folder."""
    rules, splits = Rules.of(recipe["select"]), recipe["splits"]
    if recipe.get("count"):
        renders = generate(work / f"renders-{recipe['count']}", recipe["count"])
        return select(renders.resolve(), splits, rules)
    if recipe["dir"] is None and "download" in recipe:
        return download(splits, rules, work, recipe["download"]["examples"])
    return select(locate(recipe), splits, rules)


def read_captions(root: Path, splits: Sequence[str]) -> dict[str, list[str]]:
    """Read captions by people, {<split>/<id>: [caption, ...]}."""
    files = {split: Split(split_folder(root, split)) for split in splits}
    return {f"{split}/{id_}": texts for split in splits for id_, texts in files[split].captions().items()}


def list_places(root: Path, splits: Sequence[str]) -> list[Path]:
    """List the folders of the splits and their common metadata."""
    return [root / "metadata", *(split_folder(root, split) for split in splits)]


OPEN_IMAGES = Source(select_recipe, read_captions, list_places)
