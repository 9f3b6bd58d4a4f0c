"""``python -m harmony.edit`` as a person types it: one photograph in, the edit and what led to it out."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from PIL import Image

from harmony import edit
from harmony.cli.compose import compose
from harmony.core.errors import UserError
from harmony.data import captions
from harmony.methods import edit_inputs
from harmony.methods import prompt_editing as sampling
from harmony.metrics.fidelity import psnr
from harmony.models.textual_inversion import Word, save_word
from harmony.pixels.images import Crop, crop_resize, read_image

STUDIO = Path(__file__).resolve().parents[1] / "datasets" / "studio" / "test"
SOURCE, TARGET = "a red mushroom on snow", "a red car on snow"
WHOLE = ("edit", "source", "reconstruction", "raw", "attention", "sheet")
LOCAL = ("edit", "source", "reconstruction", "raw", "mask", "mask_source", "mask_target", "attention", "sheet")
CROP = Crop(20, 10, 90)


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A folder with a photograph of 150 x 110 in it, a bundled render, the current folder."""
    Image.open(sorted((STUDIO / "data").glob("*.jpg"))[0]).resize((150, 110)).save(tmp_path / "p.png")
    (tmp_path / "text.png").write_text("not a picture")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def command(random_backbone, monkeypatch, capsys):
    """Runs the entry point in this process: exit code, lines of output, lines of errors."""

    def run(*words):
        fixed = [
            f"model.path={random_backbone}",
            "image=p.png",
            f"source={SOURCE}",
            f"target={TARGET}",
            "steps=2",
            "inner=0",
        ]
        keys = {word.split("=")[0]: word for word in [*fixed, *words]}  # the last of each key counts, "x=" takes it out
        given = [word for word in keys.values() if word not in ("image=", "source=", "target=")]
        monkeypatch.setattr(sys, "argv", ["harmony-edit", *given])
        code = 0
        try:
            edit.main()
        except SystemExit as leave:
            code = leave.code
        out, err = capsys.readouterr()
        return code, out.splitlines(), err.splitlines()

    return run


def pictures(lines: list[str], names: tuple[str, ...] = LOCAL) -> dict[str, np.ndarray]:
    """What was written, by name; exactly these files, with the figures and the configuration beside them."""
    paths = [Path(line) for line in lines[-len(names) :]]
    assert [path.stem for path in paths] == list(names) and all(path.is_absolute() for path in paths)
    there = {path.name for path in paths[0].parent.iterdir()}
    assert there == {*(f"{name}.png" for name in names), "metrics.json", "config.yaml"}
    return {path.stem: read_image(path) for path in paths}


def test_an_edit_keeps_the_color_profile(desk, command, swapped_profile):
    """Guards colors: the edit is in the photograph's space, what the model sees and makes in sRGB; what is unusable is
    told.
    """
    pixels = read_image("p.png") // 2 + 64  # colors that both spaces hold
    Image.fromarray(np.ascontiguousarray(pixels[..., ::-1])).save("p.png", icc_profile=swapped_profile)
    code, out, _ = command()
    assert code == 0
    files = {Path(line).stem: Path(line) for line in out if line.endswith(".png")}
    for name, path in files.items():
        assert Image.open(path).info.get("icc_profile") == (swapped_profile if name == "edit" else None), name
    source = read_image(files["source"]).astype(int)
    height, width = pixels.shape[:2]
    middle = Crop((width - height) // 2, 0, height)
    assert np.abs(source - crop_resize(pixels, middle, len(source))).mean() < 1
    Image.open("p.png").save("p.png", icc_profile=b"damaged" * 40)
    assert "the color profile of p.png cannot be used: its colors are taken as sRGB" in command()[1]


def test_an_edit_with_the_shipped_backbone(desk, command, monkeypatch):
    """Guards the whole command: files, figures, the square, every pixel outside the mask, and an inversion that is used
    again for another target.
    """
    said = next(iter(json.loads((STUDIO / "metadata" / "human_captions.json").read_text()).values()))[0]
    article, colour, *rest = said.split()
    prompts = [f"source={said}", f"target={' '.join([article, 'purple' if colour != 'purple' else 'green', *rest])}"]
    words = ["model.path=tiny", "steps=4", "square=20,10,90", *prompts]
    code, out, err = command(*words, "threshold=0.8")
    assert code == 0, err
    assert any(line.startswith("replace, local: ") and said in line for line in out)
    made, photograph = pictures(out), read_image(desk / "p.png")
    mask = made["mask"][..., 0] > 0
    assert made["edit"].shape == photograph.shape == (110, 150, 3) and np.array_equal(
        made["edit"][~mask], photograph[~mask]
    )
    square = mask[10:100, 20:110]
    assert mask.sum() == square.sum() and 0.02 < square.mean() < 0.98, "some of the square, none of what is around it"
    assert (made["edit"] != photograph)[mask].mean() > 0.5
    small = (made["mask_source"] | made["mask_target"])[..., 0] > 0
    assert (crop_resize(mask, CROP, 64) == small).mean() > 0.95, "the masks, laid where the square is"
    assert np.array_equal(made["source"], crop_resize(photograph, CROP, 64))
    assert made["raw"].shape == made["reconstruction"].shape == made["mask_source"].shape == (64, 64, 3)
    folder = Path(out[-1]).parent
    assert folder.parents[1] == desk / "runs"
    figures = json.loads((folder / "metrics.json").read_text())
    assert figures["reconstruction/psnr"] == pytest.approx(psnr(made["reconstruction"], made["source"]))
    assert 15 < figures["reconstruction/psnr"] < figures["autoencoder/psnr"]
    settings = OmegaConf.load(folder / "config.yaml")
    assert (settings.steps, settings.inner, settings.square, settings.source) == (4, 0, "20,10,90", said)
    (kept,) = (desk / "work" / "inversions").iterdir()
    before = kept.stat().st_mtime_ns

    def never(*given):
        raise AssertionError("inverted once more")

    monkeypatch.setattr(sampling, "invert_pictures", never)
    code, out, err = command(*words, f"target={said} at night", "mode=style")
    assert code == 0, err
    assert any(line.startswith("style, in the whole picture: ") for line in out)
    other = pictures(out, WHOLE)
    assert np.array_equal(other["source"], made["source"]) and not np.array_equal(other["raw"], made["raw"])
    assert (other["edit"] != photograph)[10:100, 20:110].mean() > 0.5
    around = np.ones((110, 150), bool)
    around[10:100, 20:110] = False
    assert np.array_equal(other["edit"][around], photograph[around])
    assert kept.stat().st_mtime_ns == before and Path(out[-1]).parent != folder


def test_the_captioner_names_the_source(desk, command, monkeypatch):
    """Guards source=null: the backbone's captioner looks at the photograph, and what it says is said and kept."""
    monkeypatch.setattr(captions, "knows_photographs", lambda folder: True)
    code, out, err = command("model.path=tiny", "source=", "target=a")
    assert code == 0, err
    (line,) = [line for line in out if "by the captioner" in line]
    settings = OmegaConf.load(Path(out[-1]).parent / "config.yaml")
    assert len(settings.source.split()) >= 4 and f"{settings.source!r}" in line


@pytest.mark.parametrize(
    ("words", "reason"),
    [((), "has no captioner"), (["model.path=tiny"], "the backbone's captioner does not know photographs")],
)
def test_no_captioner_that_knows_photographs(desk, command, words, reason):
    """Guards source=null where nobody says what the photograph shows: the source is empty, and a line says so."""
    code, out, err = command(*words, "source=", "target=a")
    assert code == 0, err
    (line,) = [line for line in out if line.startswith("the source is empty, its words would be the handles")]
    assert reason in line and OmegaConf.load(Path(out[-1]).parent / "config.yaml").source == ""


@pytest.mark.parametrize(
    ("words", "said", "names"),
    [
        (["target=a red mushroom on grass"], "replace, local: ", LOCAL),
        (["target=a blue red mushroom on snow"], "insert, local: ", LOCAL),
        (["mode=insert", "local=false"], "insert, in the whole picture: ", WHOLE),
        (["paste=false"], "replace, local: ", None),
        (["cross_attention_steps=0.25", "self_attention_steps=1"], "; cross-attention 0.25, self-attention 1; ", LOCAL),
    ],
)
def test_the_mode_is_inferred(desk, command, words, said, names):
    """Guards what is printed and written: the mode that the prompts mean, or the one that is asked for."""
    code, out, err = command(*words)
    assert code == 0, err
    assert any(said in line and repr(SOURCE) in line for line in out)
    if names:
        pictures(out, names)


def test_a_word_becomes_stronger(desk, command):
    """Guards reweight=, as the help has it: the same words, no mask, and the factor reaches the picture."""
    raw = []
    for factor in (1, 6):
        code, out, err = command(f"target={SOURCE}", f"reweight={{red: {factor}}}")
        assert code == 0, err
        assert any(line.startswith("reweight, in the whole picture: ") for line in out)
        made = pictures(out, WHOLE)
        raw.append(made["raw"])
    assert not np.array_equal(*raw)


def test_a_learnt_word(desk, command):
    """Guards words=: a word of two vectors from its file stands for one word of the source."""
    save_word(Word("<toy>", torch.randn(2, 32, generator=torch.Generator().manual_seed(0))), desk / "run" / "export")
    code, out, err = command("target=a red <toy> on snow", "words=run")
    assert code == 0, err
    assert out[0] == "<toy> is a word of 2 vectors, from run" and out[1].startswith("replace, local: ")
    pictures(out)


def test_words_that_are_looked_at(desk, command):
    """Guards look_at= and output=: other words, another region; a folder with commas is a folder."""
    made = [pictures(command("threshold=0.97", *more)[1]) for more in (["output=a, (b)"], ["look_at=snow", "output=c"])]
    assert not np.array_equal(made[0]["mask"], made[1]["mask"])
    assert (desk / "a, (b)" / "edit.png").exists() and not (desk / "runs").exists()


def test_the_central_square(desk, command):
    """Guards square=null: the largest square in the middle."""
    made = pictures(command()[1])
    assert np.array_equal(made["source"], crop_resize(read_image(desk / "p.png"), Crop(20, 0, 110), 32))
    mask = made["mask"][..., 0] > 0
    assert mask.any() and not mask[:, :20].any() and not mask[:, 130:].any()


MISTAKES = {
    ("image=gone.png",): "gone.png does not exist",
    ("image=text.png",): "text.png cannot be decoded",
    ("target=",): "target not given; add target=...",
    ("mode=remove",): "mode=remove: give one of replace, insert, style, reweight, or null",
    ("mode=replace", "target=a red car"): "mode=replace needs equally many words: the source has 5, the target 3",
    (f"target={SOURCE.upper()}",): "are the same words: change one, or give reweight=",
    (f"target={SOURCE}",): "are the same words: change one, or give reweight=",
    ("look_at=car,cat",): "look_at=cat: neither the source nor the target has this word",
    ("square=100,50,90",): "square=100,50,90: give x0,y0,side of a square inside the 150 x 110 photograph",
    ("steps=0",): "steps=0: give a whole number from 1 to 999",
    ("guidance=abc",): "guidance=abc: give a number",
    ("words=[NOSUCH]",): "there is no learned word NOSUCH",
    (f"target={' '.join(['car'] * 15)}",): "has 15 tokens, the model reads 14: shorten it",
    ("output=p.png",): "p.png (File exists): choose another folder",
    ("reweight={cat: 2}",): "reweight.cat: the target 'a red car on snow' has no such word",
    ("reweight={car: much}",): "reweight={car: much}: give a word and a factor, reweight={snowy: 3}",
    ("square=",): "square=: give text",
    ("target=null",): "target=null: say what the photograph should show",
    (f"target={SOURCE}", "reweight={red: 2}", "local=true"): "a local edit needs words to look at",
}


@pytest.mark.parametrize("words", MISTAKES, ids=" ".join)
def test_mistakes_end_in_one_line(desk, command, words):
    """Guards bad input: exit code 2, one line that names the mistake, and no folder of a run."""
    code, _, err = command(*words)
    assert code == 2 and len(err) == 1 and MISTAKES[words] in err[0], err
    assert not (desk / "runs").exists()


@pytest.fixture(scope="module")
def settings():
    return compose("edit", ["image=p.png", "target=x"])


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("square", [0, 21, 90], "inside the 150 x 110 photograph"),
        ("square", [61, 0, 90], "inside the 150 x 110 photograph"),
        ("square", [-1, 0, 90], "inside the 150 x 110 photograph"),
        ("square", [0, 0, 0], "inside the 150 x 110 photograph"),
        ("square", [0, 0], "inside the 150 x 110 photograph"),
        ("square", [0, 0, "abc"], "square="),
        ("square", [0, 0, 50.5], "square="),
    ],
)
def test_a_square_lies_inside_the_photograph(desk, settings, key, value, said):
    """Guards bad input before any model is read: a square outside the photograph; one inside is taken as it is."""
    assert edit_inputs.read_edit(OmegaConf.merge(settings, {"square": [60, 20, 90]})).crop == Crop(60, 20, 90)
    with pytest.raises(UserError, match=said):
        edit_inputs.read_edit(OmegaConf.merge(settings, {key: value}))


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ('target=a cat, on "grass" (it\'s [big])', 'a cat, on "grass" (it\'s [big])'),
        ("source=a <toy>", "a <toy>"),
        ("image=a, b.png", "a, b.png"),
        ("look_at=<toy>", "<toy>"),
        ("square=null", None),
        ("steps=20", 20),
    ],
)
def test_what_is_typed_is_what_is_meant(word, value):
    """Guards the command line: prompts, paths, words and lists are text as they stand."""
    (given,) = edit.overrides([word])
    assert OverridesParser.create().parse_override(given).value() == value


def test_lists_and_factors():
    """Guards what is read from text or, from Python, from lists and mappings."""
    assert (
        edit_inputs.split_list("a,b")
        == edit_inputs.split_list("[a, b]")
        == edit_inputs.split_list(["a", "b"])
        == ["a", "b"]
    )
    assert (
        edit_inputs.split_list(None) is None
        and edit_inputs.split_list("a (1)") == ["a (1)"]
        and edit_inputs.split_list([1, 2, 3]) == ["1", "2", "3"]
    )
    wanted = {"snowy": 3.0, "<toy>": 0.5}
    assert (
        edit_inputs.read_factors("{snowy: 3, <toy>: 0.5}") == edit_inputs.read_factors("snowy:3,'<toy>':0.5") == wanted
    )
    assert (
        edit_inputs.read_factors(OmegaConf.create({"snowy": 3})) == {"snowy": 3.0}
        and edit_inputs.read_factors(None) == {}
    )
