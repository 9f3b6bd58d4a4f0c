"""The editing bench: what is made once is not made again, and every figure is against the right picture."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest

from harmony.core.errors import UserError
from harmony.data.sources.editing import concepts, read_cases
from harmony.evaluation import editing as editing_bench
from harmony.evaluation.editing import EditingStudy, load_items
from harmony.evaluation.report import Report
from harmony.evaluation.study import StudyRun
from harmony.models.backbone import Backbone
from harmony.models.textual_inversion import Word, initial_vectors, save_word
from harmony.sampling.guidance import Settings

BENCH = Path(__file__).resolve().parents[2] / "datasets" / "editing"
OPTIONS = {"parts": ["reconstruction", "edits", "concepts"], "inner": 1, "self_attention_steps": 0.5, "threshold": 0.3}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A word for each concept of the tiny backbone, none of them learned."""
    folder, backbone = tmp_path_factory.mktemp("words"), Backbone("tiny")
    for name in concepts(BENCH):
        save_word(Word(f"<{name}>", initial_vectors(backbone, "car", 1) + 0.1), folder / name)
    return folder


def study(random_backbone, folder, words, **more):
    folder.mkdir(parents=True, exist_ok=True)
    parts = more.pop("parts", OPTIONS["parts"])
    run = StudyRun(
        "editing", folder, settings=Settings(steps=2, guidance=3.0), prepare=lambda: BENCH / "edits.jsonl",
        load=lambda: Backbone(str(random_backbone)), **{"limit": 2} | more,
    )  # fmt: skip
    return EditingStudy(run, words and str(words), **OPTIONS | {"parts": parts})


def test_all_rows_and_figures(words, tmp_path, monkeypatch):
    """Guards the tables: six ways back, six edits, two words; the source keeps its background exactly."""
    monkeypatch.setattr(editing_bench, "DRAWS", 1)
    report = study("tiny", tmp_path, words, limit=1).measure()
    figures, facts, text, drawn = report.figures, report.facts, report.text, report.pictures
    with open(tmp_path / "table.csv", newline="") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert len(rows) == 14 and facts["count"] == 1 and all(path.exists() for path in drawn) and len(drawn) == 2
    assert float(rows["source as it is"]["color/bg_mse"]) == 0 == figures["source as it is/kind/bg_mse"]
    assert rows["source as it is"]["light/psnr"] and "light/bg_mse" not in text.replace("kind/bg_mse", "")
    assert {"concept/clip_i", "concept/clip_t"} <= {name for name, v in rows["learned word"].items() if v}
    assert all(np.isfinite(value) for value in figures.values())


def test_the_truth_itself_is_the_best_edit(random_backbone, tmp_path):
    """Guards against a swap of pictures: given each case's own truth, psnr is infinite and clip_i is 100."""
    made = study(random_backbone, tmp_path, None, parts=["edits"])
    truths = [truth for item in made.items for truth in item.truths]
    (row,) = made.edit_figures({"edits/truth": np.stack(truths)}).values()
    assert all(row[f"{word}/psnr"] == np.inf for word in ("color", "kind", "light"))
    assert all(row[f"{word}/clip_i"] == pytest.approx(100, abs=1e-3) for word in ("color", "kind", "light"))
    assert row["color/fpsnr"] == np.inf and 0 < row["color/bg_mse"] < 50  # shadows and reflections differ


def test_what_is_made_is_not_made_again(random_backbone, tmp_path, monkeypatch):
    """Guards the resume: a second go inverts nothing; a changed backbone's pictures lie elsewhere."""
    first = study(random_backbone, tmp_path, None, parts=["reconstruction"])
    table = first.measure().text
    monkeypatch.setattr(editing_bench, "invert_pictures", None)
    again = study(random_backbone, tmp_path, None, parts=["reconstruction"])
    assert again.measure().text == table and not list(again.store.glob(".*"))
    other = tmp_path / "backbone"
    shutil.copytree(random_backbone, other)
    with open(other / "unet" / "config.json", "a") as file:
        file.write("\n")
    moved = study(other, tmp_path, None, parts=["reconstruction"])
    assert moved.store != again.store
    with pytest.raises(TypeError):
        moved.measure()


def test_two_processes_share_the_scenes(random_backbone, tmp_path, monkeypatch):
    """Guards ranks: each makes its blocks, and the table is that of one process."""
    monkeypatch.setattr("harmony.evaluation.blocks.BLOCK", 1)
    alone = study(random_backbone, tmp_path / "one", None, parts=["reconstruction"]).measure().figures
    shared = tmp_path / "two"
    made = study(random_backbone, shared, None, parts=["reconstruction"], rank=1, world=2)
    monkeypatch.setattr(editing_bench, "await_files", lambda files: None)
    assert made.measure() == Report() and [f.name for f in made.store.iterdir()] == ["00001.npz"]
    both = study(random_backbone, shared, None, parts=["reconstruction"], rank=0, world=2).measure().figures
    assert both == pytest.approx(alone, rel=1e-4)


def test_items(random_backbone):
    """Guards the sizes: everything at the backbone's resolution, spread over the bench."""
    items = load_items(BENCH / "edits.jsonl", 32, 3)
    assert [item.image.shape for item in items] == [(32, 32, 3)] * 3 and items[0].masks[2] is None
    assert items[0].masks[0].shape == (32, 32) and items[0].masks[0].any()
    assert items[-1].prompt == read_cases(BENCH / "edits.jsonl")[-1].source


def test_what_it_refuses(random_backbone, tmp_path):
    with pytest.raises(UserError, match="study.parts=nonsense: choose among reconstruction, edits, concepts"):
        study(random_backbone, tmp_path, None, parts=["nonsense"])
    with pytest.raises(UserError, match="there is no learned word .*azure_house"):
        study(random_backbone, tmp_path, tmp_path).measure()


def test_a_word_that_is_left_out_is_said(random_backbone, tmp_path):
    text = study(random_backbone, tmp_path, None, parts=["concepts"]).measure().text
    assert "concepts: left out, give study.words=FOLDER" in text
