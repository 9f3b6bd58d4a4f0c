"""Captions of the samples of a FiftyOne dataset: finding the missing ones, and writing."""

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from harmony.core.errors import UserError
from harmony.core.progress import tell
from harmony.data.captions import (
    BLIP,
    HUMAN_CAPTION,
    LABEL_CAPTION,
    captioner_name,
    knows_photographs,
    label_caption,
)

if TYPE_CHECKING:
    from harmony.data.sources.open_images.database import Dataset


def find_uncaptioned(
    dataset: "Dataset", captions: dict[str, list[str]], captioner: str | Path | None, photographs: Collection[str]
) -> tuple[str | None, list[list[str]]]:
    """Find (the captioner's name, [sample id, path, sha256] of each kept photograph without its caption).

    Captions by people, ``captions`` {<split>/<id>: [caption, ...]}, are written at once, the first of each, and so are
    those by the label, for the splits in ``photographs`` if the captioner does not know photographs. UserError if a
    captioner is needed and there is none.
    """
    fields = ("id", "harmony_id", "filepath", "sha256", "caption", "caption_model")
    rows = list(zip(*dataset.match_tags("kept").values(list(fields)), strict=True))
    human_captions = {i: (captions[key][0], (text, model)) for i, key, _, _, text, model in rows if key in captions}
    new_captions = {
        i: text for i, (text, old_caption) in human_captions.items() if old_caption != (text, HUMAN_CAPTION)
    }
    set_captions(dataset, new_captions, HUMAN_CAPTION)
    uncaptioned_rows = [(i, path, digest, model) for i, key, path, digest, _, model in rows if key not in captions]
    if not uncaptioned_rows:
        return None, []
    if captioner is None:
        raise UserError(
            f"{dataset.name}: {len(uncaptioned_rows)} images lack a caption; give a backbone that has a captioner"
        )
    if not knows_photographs(captioner):
        is_photograph = {i: key.split("/")[0] in photographs for i, key, *_ in rows}
        caption_by_label(dataset, [i for i, *_ in uncaptioned_rows if is_photograph[i]])
        uncaptioned_rows = [row for row in uncaptioned_rows if not is_photograph[row[0]]]
    name = captioner_name(captioner)
    return name, [[i, path, digest] for i, path, digest, model in uncaptioned_rows if model != name]


def caption_by_label(dataset: "Dataset", ids: list[str]) -> None:
    """Caption samples by their labels, empty where these say nothing."""
    if not ids:
        return
    fields = ("id", "instance.label", "caption", "caption_model")
    rows = zip(*dataset.select(ids).values(list(fields)), strict=True)
    captions = {i: (label_caption(label), (text, model)) for i, label, text, model in rows}
    new_captions = {i: text for i, (text, old) in captions.items() if old != (text, LABEL_CAPTION)}
    set_captions(dataset, new_captions, LABEL_CAPTION)
    empty_count = sum(not text for text, _ in captions.values())
    tell(
        f"captions: the captioner does not know photographs; {len(ids) - empty_count} are captioned by their label and "
        f"{empty_count} have none: write captions, or set dataset.captions.captioner={BLIP}"
    )


def set_captions(dataset: "Dataset", captions: dict[str, str], model: str) -> None:
    """Write captions by sample id; the model's name comes last, because it marks the caption as complete."""
    if captions:
        dataset.set_values("caption", captions, key_field="id")
        dataset.set_values("caption_model", dict.fromkeys(captions, model), key_field="id")
