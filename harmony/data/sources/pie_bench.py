"""PIE-Bench (Ju 2023) as a list of edits: photographs with two prompts, the kind of edit, and where it may change them.

    mapping_file.json               {ID: {image_path, original_prompt, editing_prompt, editing_type_id, mask}, ...}
    annotation_images/<image_path>

There are no truths. What it becomes is an ``edits.jsonl`` with masks in the work folder, where a link leads to the
photographs.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from harmony.core.errors import UserError
from harmony.core.files import replace_folder
from harmony.core.foreign import is_file_name, path_inside, read_json
from harmony.core.progress import tell
from harmony.data.sources.editing import SCHEMA, Case
from harmony.data.sources.files import locate
from harmony.data.sources.selection import BAD_NAME, KEPT, count_reasons, format_counts
from harmony.data.stamps import make_stamp
from harmony.pixels.images import open_image, write_image

MAPPING, PHOTOGRAPHS = "mapping_file.json", "annotation_images"
SIDE = 512  # of the masks, whatever the photographs' size
KINDS = (  # by editing_type_id
    "random",
    "change object",
    "add object",
    "delete object",
    "change content",
    "change pose",
    "change color",
    "change material",
    "change background",
    "change style",
)


def prepare_edits(recipe: dict, work: Path) -> Path:
    """Write the ``edits.jsonl`` of a recipe under ``work``, unless it is there; print the cases for each reason.

    UserError for a folder without the mapping, or if no case is kept.
    """
    root = locate(recipe)
    mapping = root / MAPPING
    stamp = make_stamp([str(mapping), str(root / PHOTOGRAPHS)])[:8]
    folder = work / recipe["name"] / f"{recipe['name']}-{stamp}"
    if (folder / "edits.jsonl").is_file():
        return folder / "edits.jsonl"
    if not isinstance(content := read_json(mapping), dict):
        raise UserError(f"{mapping}: expected {{ID: {{image_path, original_prompt, ...}}, ...}}; fetch it again")
    with replace_folder(folder) as temp_folder:
        results = [(id_, read_case(id_, facts, root, temp_folder)) for id_, facts in sorted(content.items())]
        cases = [case for _, case in results if isinstance(case, Case)]
        rows = [("test", id_, KEPT if isinstance(case, Case) else case) for id_, case in results]
        table = pl.DataFrame(rows, schema=dict.fromkeys(("split", "id", "reason"), pl.String), orient="row")
        tell(format_counts(count_reasons(table)))
        if not cases:
            raise UserError(f"{mapping}: no case is kept, for the reasons above; mend them and run the same command")
        table.write_csv(temp_folder / "selection.csv")
        lines = [{"schema": SCHEMA, "count": len(cases)}, *map(asdict, cases)]
        (temp_folder / "edits.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        (temp_folder / "images").symlink_to(root / PHOTOGRAPHS, target_is_directory=True)
    return folder / "edits.jsonl"


def read_case(id_: str, facts: Any, root: Path, folder: Path) -> Case | str:
    """Read one case and write its mask into ``folder``; or the reason for which it cannot be used."""
    texts = ("image_path", "original_prompt", "editing_prompt")
    if not isinstance(facts, dict) or not all(isinstance(facts.get(name), str) and facts[name] for name in texts):
        return "damaged row"
    image, source, target = (facts[name] for name in texts)
    if str(facts.get("editing_type_id")) not in map(str, range(len(KINDS))):
        return "damaged row"
    try:
        photograph = path_inside(root / PHOTOGRAPHS, image)
    except UserError:
        return BAD_NAME
    if not is_file_name(id_):
        return BAD_NAME
    if not photograph.is_file():
        return "image file missing"
    try:
        open_image(photograph)
        mask = read_runs(facts.get("mask"))
    except UserError:
        return "image undecodable"
    except (ValueError, TypeError, OverflowError):
        return "mask undecodable"
    name = None if mask.all() else f"masks/{id_}.png"
    if name is not None:
        write_image(folder / name, mask)
    prompts = (" ".join(text.replace("[", "").replace("]", "").split()) for text in (source, target))
    return Case(id_, KINDS[int(facts["editing_type_id"])], *prompts, f"images/{image}", None, name)


def read_runs(values: Any) -> np.ndarray:
    """The mask of runs [start, length, start, length, ...] along the rows, bool SIDE x SIDE. ValueError if wrong.

    Its rim counts as what may change, as in the code of Ju 2023, which so mends errors of annotation.
    """
    runs = np.array(values, np.int64).reshape(-1, 2)
    if (runs < 0).any() or (runs[:, 0] >= SIDE**2).any():
        raise ValueError("runs")
    mask = np.zeros(SIDE**2, bool)
    for start, length in runs.tolist():
        mask[start : start + length] = True
    mask = mask.reshape(SIDE, SIDE)
    mask[[0, -1]] = mask[:, [0, -1]] = True
    return mask
