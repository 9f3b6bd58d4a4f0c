"""PIE-Bench: its run lengths, prompts and kinds of edit; what is wrong is counted and named."""

import json

import numpy as np
import pytest

from harmony.core.errors import UserError
from harmony.data.preparation import ensure
from harmony.data.sources.editing import read_cases
from harmony.data.sources.pie_bench import KINDS, read_runs
from harmony.evaluation.editing import EditingStudy, load_items
from harmony.evaluation.study import StudyRun
from harmony.models.backbone import Backbone
from harmony.pixels.images import read_image, write_image
from harmony.pixels.masks import read_mask
from harmony.sampling.guidance import Settings

OPTIONS = {"parts": ["reconstruction", "edits", "concepts"], "inner": 1, "self_attention_steps": 0.5, "threshold": 0.3}
SQUARE = [value for y in range(100, 300) for value in (y * 512 + 50, 200)]


def make(root, ids=("000", "100"), **changes):
    """A mapping with a case for each id, of the kind of its first digit; ``changes``: id -> other facts."""
    mapping = {}
    for n, id_ in enumerate(ids):
        path = f"{id_[0]}_kind/1_artificial/{id_}.jpg"
        write_image(root / "annotation_images" / path, np.full((64, 64, 3), 40 + n, np.uint8))
        facts = {"image_path": path, "original_prompt": "a [red] car", "editing_prompt": "a [blue]  car"}
        facts |= {"editing_type_id": id_[0], "blended_word": "car car", "mask": SQUARE, "editing_instruction": "Paint"}
        mapping[id_] = facts | changes.get(f"c{id_}", {})
    (root / "mapping_file.json").write_text(json.dumps(mapping))


def prepare(tmp_path):
    recipe = {"name": "pie", "layout": "pie_bench", "dir": str(tmp_path / "in")}
    return ensure(recipe, "tiny", str(tmp_path / "work"))


def test_runs_go_along_the_rows():
    """Guards masks: start and length in a flat picture of 512 x 512, cut at its end; the rim may change too."""
    mask = np.zeros((512, 512), bool)
    mask[100:300, 50:250] = True
    mask[[0, -1]] = mask[:, [0, -1]] = True
    assert np.array_equal(read_runs(SQUARE), mask)
    assert read_runs([0, 512 * 512 + 9]).all() and read_runs([]).sum() == 4 * 511
    for values in ([1, 2, 3], [-1, 5], [512 * 512, 1], [[1], [2, 3]], ["a", "b"], None, [10**30, 1]):
        with pytest.raises((ValueError, TypeError, OverflowError)):
            read_runs(values)


def test_cases_are_read_as_edits(tmp_path):
    make(tmp_path / "in", c100={"mask": [0, 512 * 512]})
    file = prepare(tmp_path)
    first, second = read_cases(file)
    assert (first.id, first.word, first.source, first.target) == ("000", "random", "a red car", "a blue car")
    assert first.truth is None and second.word == "change object" and second.mask is None
    assert read_mask(file.parent / first.mask).sum() == 200 * 200 + 4 * 511
    assert (read_image(file.parent / first.image) == 40).all()
    time = file.stat().st_mtime_ns
    assert prepare(tmp_path) == file and file.stat().st_mtime_ns == time, "nothing has changed"
    make(tmp_path / "in", ids=("300",))
    assert [case.word for case in read_cases(prepare(tmp_path))] == [KINDS[3]]


def test_bad_cases_are_counted_and_the_others_are_kept(tmp_path, capsys):
    bad = {
        "c001": {"image_path": "../../mapping_file.json"},
        "c002": {"image_path": "/etc/passwd"},
        "c003": {"editing_type_id": "12"},
        "c004": {"original_prompt": 5},
        "c005": {"image_path": "0_kind/gone.jpg"},
        "c006": {"mask": [1, 2, 3]},
        "c007": {"mask": None},
    }
    make(tmp_path / "in", ids=("000", *(name[1:] for name in bad), "008"), **bad)
    photograph = tmp_path / "in" / "annotation_images" / "0_kind" / "1_artificial" / "008.jpg"
    photograph.write_bytes(photograph.read_bytes()[:100])
    file = prepare(tmp_path)
    assert [case.id for case in read_cases(file)] == ["000"]
    rows = [line.split(",")[1:] for line in (file.parent / "selection.csv").read_text().splitlines()[1:]]
    assert dict(rows) == {
        "000": "kept",
        "001": "no file name",
        "002": "no file name",
        "003": "damaged row",
        "004": "damaged row",
        "005": "image file missing",
        "006": "mask undecodable",
        "007": "mask undecodable",
        "008": "image undecodable",
    }
    out = capsys.readouterr().out
    assert "damaged row                      2" in out and "kept                             1" in out


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "mapping_file.json cannot be read: it does not exist"),
        ("[]", "mapping_file.json: expected {ID: "),
        ('{"a": 1}', "no case is kept"),
    ],
)
def test_what_is_no_pie_bench_is_refused(tmp_path, text, message):
    (tmp_path / "in").mkdir()
    if text:
        (tmp_path / "in" / "mapping_file.json").write_text(text)
    with pytest.raises(UserError, match=message):
        prepare(tmp_path)
    assert not (tmp_path / "work").exists()


def test_an_edit_of_the_whole_picture_counts_where_it_can(random_backbone, tmp_path):
    """Guards the authors' rule: a mask of everything leaves no background, but words and structure are measured."""
    make(tmp_path / "in", c000={"mask": [0, 512 * 512]}, c100={"mask": [0, 512 * 512]})
    file = prepare(tmp_path)
    run = StudyRun(
        "editing", tmp_path / "run", settings=Settings(steps=2, guidance=3.0), prepare=lambda: file,
        load=lambda: Backbone(str(random_backbone)), weights={"dino_i": str(tmp_path / "nowhere")},
    )  # fmt: skip
    (tmp_path / "run").mkdir()
    report = EditingStudy(run, None, **OPTIONS).measure()
    names = {name.rpartition("pie/")[2] for name in report.figures if "/pie/" in name}
    assert names == {"clip_whole", "clip_edited"}
    assert report.figures["prompt alone/pie/clip_whole"] == report.figures["prompt alone/pie/clip_edited"]
    assert "dino_i: left out" in report.text


WORDS = ("random", "change object")  # kinds of edit of the cases below


def test_edits_without_a_truth_are_measured_by_words_and_outside_the_mask(random_backbone, tmp_path):
    """Guards the study on photographs: no figure that wants a truth, the source's background is exact, a prompt that is
    too long for the backbone costs its scene alone, and there are no concepts.
    """
    make(tmp_path / "in", ids=("000", "100", "200"), c200={"editing_prompt": "a very " + "long " * 30 + "car"})
    file = prepare(tmp_path)
    assert load_items(file, 32)[0].truths == [None]
    run = StudyRun(
        "editing", tmp_path / "run", settings=Settings(steps=2, guidance=3.0), prepare=lambda: file,
        load=lambda: Backbone(str(random_backbone)),
    )  # fmt: skip
    (tmp_path / "run").mkdir()
    report = EditingStudy(run, "words", **OPTIONS).measure()
    names = {name.split("/", 1)[1] for name in report.figures if name.startswith("source as it is/")}
    parts = {f"{word}/{figure}" for word in WORDS for figure in ("clip_t", "bg_mse")}
    pie = {f"pie/{name}" for name in ("psnr", "mse", "ssim", "clip_whole", "clip_edited")}
    assert names == parts | pie
    assert report.figures["source as it is/pie/psnr"] == 100 and report.figures["source as it is/pie/mse"] == 0
    whole, edit = (report.figures[f"prompt alone/pie/clip_{name}"] for name in ("whole", "edited"))
    assert whole == pytest.approx(np.mean([report.figures[f"prompt alone/{w}/clip_t"] for w in WORDS]))
    assert edit != whole, "all outside the mask is black"
    assert report.figures["source as it is/random/bg_mse"] == 0
    assert "1 scenes left out, such as 200: the prompt 'a very long" in report.text
    assert "concepts: left out, the dataset has none" in report.text and report.facts["count"] == 2
