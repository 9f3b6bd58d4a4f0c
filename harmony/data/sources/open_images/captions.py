"""Captions of the samples of a FiftyOne dataset: which are missing, and how they are written."""

from pathlib import Path
from typing import TYPE_CHECKING

from harmony.core.errors import UserError
from harmony.data.captions import GIVEN, captioner_name

if TYPE_CHECKING:
    from harmony.data.sources.open_images.database import Dataset


def find_uncaptioned(
    dataset: "Dataset", captions: dict[str, list[str]], captioner: str | Path | None
) -> tuple[str | None, list[list[str]]]:
    """(the captioner's name, [sample id, path, sha256] of each kept photograph that it has to caption).

    ``captions`` by people, {<split>/<id>: [caption, ...]}, are written at once, the first of each; what is there stays.
    UserError without a captioner where one is needed.
    """
    fields = ("id", "harmony_id", "filepath", "sha256", "caption", "caption_model")
    kept = list(zip(*dataset.match_tags("kept").values(list(fields)), strict=True))
    firsts = {i: (captions[key][0], (text, model)) for i, key, _, _, text, model in kept if key in captions}
    set_captions(dataset, {i: text for i, (text, present) in firsts.items() if present != (text, GIVEN)}, GIVEN)
    others = [(i, path, digest, model) for i, key, path, digest, _, model in kept if key not in captions]
    if not others:
        return None, []
    if captioner is None:
        raise UserError(f"{dataset.name}: {len(others)} images lack a caption; give a backbone that has a captioner")
    name = captioner_name(captioner)
    return name, [[i, path, digest] for i, path, digest, model in others if model != name]


def set_captions(dataset: "Dataset", captions: dict[str, str], model: str) -> None:
    """Write captions by sample id; the model's name comes last, because it marks a caption as complete."""
    if captions:
        dataset.set_values("caption", captions, key_field="id")
        dataset.set_values("caption_model", dict.fromkeys(captions, model), key_field="id")
