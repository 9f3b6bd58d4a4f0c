"""``python -m harmony.harmonize`` as a person types it: real files in, pictures out, mistakes in one line."""

import base64
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from PIL import Image

from harmony import harmonize
from harmony.methods import inputs, runs
from harmony.models.backbone import Backbone
from harmony.models.controlnet import export_controlnet
from harmony.models.paint_by_example import build_encoder, build_painting_unet, export_painter
from harmony.pixels.composites import place
from harmony.pixels.images import read_image, write_image
from harmony.pixels.masks import bounding_box

ROOT = Path(__file__).resolve().parents[1]
FILES = ("harmonized", "raw", "composite", "hole", "sheet")


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A folder with pictures, the current one."""
    rng = np.random.default_rng(0)
    background, foreground = (rng.integers(0, 256, (48, 70, 3), dtype=np.uint8) for _ in range(2))
    mask = np.zeros((48, 70), bool)
    mask[15:35, 20:45] = True
    write_image(tmp_path / "b.png", background)
    write_image(tmp_path / "f.png", foreground)
    write_image(tmp_path / "m.png", mask)
    write_image(tmp_path / "none.png", np.zeros_like(mask))
    write_image(tmp_path / "large.png", np.ones((50, 70), bool))
    write_image(tmp_path / "small, (1).png", foreground[10:40, 15:50])
    cut = np.dstack([foreground, mask * np.uint8(255)])[10:40, 15:50]
    Image.fromarray(cut).save(tmp_path / "cut.png")
    Image.fromarray(np.full((48, 70), np.nan, np.float32)).save(tmp_path / "nan.tiff")
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "half.jpg").write_bytes(b"")
    write_image(tmp_path / "half.jpg", background)
    (tmp_path / "half.jpg").write_bytes((tmp_path / "half.jpg").read_bytes()[:900])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def command(random_backbone, monkeypatch, capsys):
    """Runs the entry point in this process: exit code, lines of output, lines of errors."""

    def run(*words):
        fixed = [f"model.path={random_backbone}", "steps=2", "controlnet=null", *words]
        keys = {word.split("=")[0]: word for word in fixed}  # the last of each key counts
        monkeypatch.setattr(sys, "argv", ["harmony-harmonize", *keys.values()])
        code = 0
        try:
            harmonize.main()
        except SystemExit as leave:
            code = leave.code
        out, err = capsys.readouterr()
        return code, out.splitlines(), err.splitlines()

    return run


def pictures(lines: list[str]) -> dict[str, np.ndarray]:
    paths = [Path(line) for line in lines[-5:]]
    assert [path.stem for path in paths] == list(FILES) and all(path.is_absolute() for path in paths)
    return {path.stem: read_image(path) for path in paths}


def outside_is_untouched(made: dict[str, np.ndarray], background: np.ndarray) -> bool:
    hole = made["hole"][..., 0] > 0
    return hole.any() and not hole.all() and np.array_equal(made["harmonized"][~hole], background[~hole])


def test_three_files(desk, command):
    code, out, err = command("background=b.png", "foreground=f.png", "mask=m.png", "prompt=a red mushroom, on snow")
    assert code == 0, err
    made = pictures(out)
    b, f, mask = (read_image(desk / name) for name in ("b.png", "f.png", "m.png"))
    assert outside_is_untouched(made, b)
    assert np.array_equal(made["composite"], np.where(mask > 0, f, b))
    assert made["hole"][mask > 0].all() and (made["harmonized"] != b)[mask > 0].mean() > 0.5
    assert made["raw"].shape == (32, 32, 3)
    assert Path(out[-1]).parents[2] == desk / "runs"
    assert any("'a red mushroom, on snow'" in line for line in out)
    again = pictures(command("background=b.png", "foreground=f.png", "mask=m.png", "prompt=a red mushroom, on snow")[1])
    assert all(np.array_equal(made[name], again[name]) for name in FILES)
    assert len(list((desk / "runs" / "harmonize").iterdir())) == 2


def test_composite_alone(desk, command):
    code, out, err = command("composite=b.png", "mask=m.png", "prompt=''", f"output={desk / 'here, [1]'}")
    assert code == 0, err
    made, b = pictures(out), read_image(desk / "b.png")
    assert outside_is_untouched(made, b) and np.array_equal(made["composite"], b)
    assert Path(out[-1]).parent == desk / "here, [1]"


def test_cut_out_in_a_box(desk, command):
    code, out, err = command("background=b.png", "foreground=cut.png", "box=30,5,66,40", "prompt=x")
    assert code == 0, err
    made, b = pictures(out), read_image(desk / "b.png")
    cut = np.asarray(Image.open(desk / "cut.png"))
    canvas, mask = place(cut[..., :3], cut[..., 3] > 0, (30, 5, 66, 40), 70, 48)
    assert np.array_equal(made["composite"], np.where(mask[..., None], canvas, b))
    assert outside_is_untouched(made, b)


@pytest.fixture(scope="module")
def painter(random_backbone, tmp_path_factory):
    """A Paint by Example that has learned nothing."""
    torch.manual_seed(0)
    backbone, folder = Backbone(str(random_backbone)), tmp_path_factory.mktemp("painter")
    encoder = build_encoder(backbone.image_encoder, backbone.unet.config.cross_attention_dim)
    return export_painter(build_painting_unet(backbone.unet), encoder, folder, backbone)


def test_by_example(desk, command, painter):
    """Guards the second method: a reference of any size goes where the mask is, which is the hole itself; the rest
    stays; an object that is in the picture already is its own exemplar.
    """
    words = ["method=paint_by_example", f"painter={painter}", "background=b.png", "mask=m.png"]
    code, out, err = command(*words, "reference=small, (1).png")
    assert code == 0, err
    made, b, mask = pictures(out), read_image(desk / "b.png"), read_image(desk / "m.png")
    assert outside_is_untouched(made, b) and np.array_equal(made["hole"], mask)
    assert (made["harmonized"] != b)[mask > 0].mean() > 0.5 and any("guidance 3" in line for line in out)
    other = pictures(command(*words, "reference=f.png")[1])
    stronger = pictures(command(*words, "reference=f.png", "guidance=7")[1])
    assert not np.array_equal(other["raw"], made["raw"]) and not np.array_equal(other["raw"], stronger["raw"])
    code, out, err = command("method=paint_by_example", f"painter={painter}", "composite=b.png", "mask=m.png")
    assert code == 0 and outside_is_untouched(pictures(out), b), err


@pytest.mark.parametrize(
    "words, said",
    [
        (["reference=f.png", "background=b.png", "mask=m.png"], "goes with method=paint_by_example"),
        (["method=paint_by_example", "reference=f.png", "background=b.png"], "needs background=PATH and mask=PATH"),
        (["method=paint_by_example", "reference=f.png", "composite=b.png", "mask=m.png"], "needs background=PATH"),
        (
            ["method=paint_by_example", "composite=b.png", "mask=m.png", "painter=nowhere"],
            "there is no Paint by Example",
        ),
        (
            ["method=copy", "composite=b.png", "mask=m.png"],
            "unknown method=copy. There are: controlnet, copy_paste",
        ),
    ],
)
def test_mistakes_by_example_end_in_one_line(desk, command, words, said):
    code, out, err = command(*words)
    assert code == 2 and len(err) == 1 and said in err[0]
    assert not (desk / "runs").exists()


ZERO_SHOT = ["method=zero_shot", "composite=b.png", "mask=m.png", "evaluator=statistic", "steps=1", "rounds=2"]


def test_zero_shot(desk, command):
    """Guards the third method: outside the mask itself nothing changes; every round is kept, told and drawn; the best
    is the result; words from a file are those of the line.
    """
    code, out, err = command(*ZERO_SHOT, "prompts=a cat: warm -> cold; a cat: warm -> blue")
    assert code == 0, err
    made, b, mask = pictures(out[:-2]), read_image(desk / "b.png"), read_image(desk / "m.png")
    assert np.array_equal(made["hole"], mask) and outside_is_untouched(made, b)
    assert (made["harmonized"] != b)[mask > 0].any() and any("guidance 2.5" in line for line in out)
    folder = Path(out[-1]).parent
    told = json.loads((folder / "rounds.json").read_text())
    assert [(r["number"], r["prompt"]) for r in told][:3] == [(0, None), (1, 0), (1, 1)]
    assert told[-1]["decision"] == "conclude"
    best = max(told, key=lambda r: r["score"])
    assert best["number"] > 0, "on this scene a round is better than the composite"
    chosen = read_image(folder / "rounds" / f"{best['number']:02d}_{best['prompt']}.png")
    assert np.array_equal(made["raw"], chosen) and (folder / "film.png").stat().st_size > 1000
    assert sum(line.startswith(("round ", "the composite")) for line in out) == len(told)
    assert len(list((folder / "rounds").iterdir())) == len(told) - 1
    lights = [{"object": "a cat", "foreground": "warm", "background": words} for words in ("cold", "blue")]
    (desk / "words.json").write_text(json.dumps({"b": lights}))
    again = pictures(command(*ZERO_SHOT, "prompts=words.json")[1][:-2])
    assert np.array_equal(again["harmonized"], made["harmonized"])


@pytest.mark.parametrize(
    "words, said",
    [
        (["prompts=a cat"], "write OBJECT: its own light -> the light around it"),
        (["prompts=words.json"], "cannot be read"),
        (["prompts=a: b -> c", "region=m.png"], "region= goes with methods that paint anew"),
        (["prompts=a: b -> c", "solver=unipc"], "this method does not sample by a schedule: leave out solver="),
        (["prompts=a: b -> c", "rounds=0"], "rounds=0: give a whole number of 1 or more"),
        (["prompts=a: b -> c", "evaluator=nowhere"], "there is no judge nowhere"),
        (["prompts=a: b -> c", "zero_shot.refine=abc"], "refine=abc: give a whole number of 0 or more"),
        (["prompts=a: b -> c", "zero_shot.edges=-1"], "edges=-1: give a number of 0 or more"),
        (["describer=nowhere"], "describer=nowhere: no vision-language model"),
        (["describer=given"], "describer=given needs the words for both lights: give prompts="),
    ],
)
def test_mistakes_in_zero_shot_end_in_one_line(desk, command, words, said):
    code, out, err = command(*ZERO_SHOT, *words)
    assert code == 2 and len(err) == 1 and said in err[0]
    assert not (desk / "runs").exists()


def test_words_longer_than_a_file_name_are_no_file(desk, command):
    code, out, err = command(*ZERO_SHOT, f"prompts={'car ' * 100}: warm -> cold")
    assert code == 2 and len(err) == 1 and err[0].endswith("shorten it")


def test_raw_keeps_the_models_whole_square(desk, command):
    code, out, err = command("composite=b.png", "mask=m.png", "prompt=x", "raw=true")
    assert code == 0, err
    made, b = pictures(out), read_image(desk / "b.png")
    assert (made["harmonized"] != b)[made["hole"] == 0].mean() > 0.2


def test_no_prompt_and_no_captioner(desk, command):
    code, out, err = command("composite=b.png", "mask=m.png")
    assert code == 0, err
    assert any("prompt is empty" in line and "captioner" in line for line in out)


def test_the_backbones_captioner_is_asked(desk, command, monkeypatch):
    def caption(picture, captioner, processor, device):
        assert np.array_equal(picture, read_image(desk / "b.png"))  # it sees the naive composite
        return f"{captioner}, {processor}"

    monkeypatch.setattr(runs, "caption_picture", caption)
    monkeypatch.setattr(Backbone, "captioner", "a blue car")
    monkeypatch.setattr(Backbone, "processor", "on grass")
    code, out, err = command("composite=b.png", "mask=m.png")
    assert code == 0, err
    assert any("'a blue car, on grass'" in line for line in out)


def test_two_controlnets_and_their_weights(desk, command, random_backbone, awake):
    backbone = Backbone(str(random_backbone))
    export_controlnet(awake(backbone, 1), desk / "colour", "color", {"blur": 1.25, "normalize": True}, backbone)
    export_controlnet(awake(backbone, 2), desk / "edges", "structure", {}, backbone)

    def raw(*words):
        code, out, err = command("composite=b.png", "mask=m.png", "prompt=x", *words)
        assert code == 0, err
        return pictures(out)["raw"]

    both = ("controlnet=colour", "structure=edges")
    assert np.array_equal(raw(*both, "lambda_l=0", "lambda_h=0"), raw())
    assert np.array_equal(raw(*both, "lambda_h=0"), raw("controlnet=colour"))
    assert np.array_equal(raw(*both, "lambda_l=0"), raw("controlnet=edges"))  # a weight belongs to what a net sees
    assert not np.array_equal(raw(*both), raw("controlnet=colour"))
    code, _, err = command("composite=b.png", "mask=m.png", "prompt=x", "controlnet=edges", "structure=edges")
    assert code == 2 and "one ControlNet of each branch" in err[0]


def test_a_cut_out_of_another_size_is_placed(desk, command):
    """Guards the first try: no box= needed, and the box that is printed gives the same picture."""
    words = ("background=b.png", "foreground=cut.png", "prompt=x")
    code, out, err = command(*words)
    assert code == 0, err
    (box,) = [line.split()[-1] for line in out if "box=" in line]
    hole = pictures(out)["hole"]
    assert box == "box=18,22,52,46"  # of 70 x 48
    code, again, err = command(*words, box)
    assert code == 0 and np.array_equal(hole, pictures(again)["hole"]), err


MISTAKES = {
    "background=b.png foreground=f.png mask=none.png": "none.png is empty",
    "background=b.png foreground=f.png mask=large.png": "large.png is 70 x 50 but its image is 70 x 48",
    "background=b.png foreground=f.png mask=nowhere.png": "nowhere.png does not exist",
    "background=nowhere.jpg foreground=f.png mask=m.png": "nowhere.jpg does not exist",
    "background=text.png foreground=f.png mask=m.png": "text.png cannot be decoded",
    "background=half.jpg foreground=f.png mask=m.png": "half.jpg cannot be decoded",
    "background=b.png foreground=nan.tiff mask=m.png": "nan.tiff holds floating-point pixels",
    "background=b.png foreground=f.png": "f.png has no transparent background",
    "background=b.png mask=m.png": "give background=PATH and foreground=PATH",
    "background=b.png composite=b.png mask=m.png": "give background=PATH and foreground=PATH",
    "mask=m.png": "give background=PATH and foreground=PATH",
    "composite=b.png mask=m.png box=1,2,3,4": "box= goes with foreground=",
    "background=b.png foreground=cut.png box=1,2,3": "give a list [a, b, ...] of 4",
    "background=b.png foreground=cut.png box=a,b,c,d": "give a list [a, b, ...] of 4",
    "background=b.png foreground=cut.png box=60,40,20,10": "has no area",
    "background=b.png foreground=cut.png box=100,10,120,30": "shows nothing of the object",
    "composite=b.png mask=m.png steps=many": "steps=many: give a whole number",
    "composite=b.png mask=m.png steps=0": "steps=0: give a whole number from 1 to 999",
    "composite=b.png mask=m.png lambda_l=x": "lambda_l=x: give a number",
    "composite=b.png mask=m.png solver=euler": "solver=euler: give one of ddim",
    "composite=b.png mask=m.png encoder_every=half": "encoder_every=half: give a whole number of 1 or more",
    "composite=b.png mask=m.png controlnet=nowhere": "there is no ControlNet nowhere",
    "composite=b.png mask=m.png controlnet=runs/nowhere": "cannot fetch weights of runs/nowhere",
    "composite=b.png mask=m.png controlnet=.": "holds no ControlNet",
    "composite=b.png mask=m.png output=b.png": "b.png (File exists): choose another folder",
    "composite=b.png mask=m.png model.path=./nowhere": "no backbone in ./nowhere",
    "composite=b.png mask=m.png promt=x": "did you mean prompt?",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes_end_in_one_line(desk, command, words):
    code, out, err = command("prompt=x", *words.split())
    assert code == 2
    assert len(err) == 1 and MISTAKES[words] in err[0]


def test_a_name_with_commas_and_brackets(desk, command):
    code, _, err = command("background=b.png", "foreground=small, (1).png", "prompt=x")
    assert code == 2 and "small, (1).png has no transparent background" in err[0]


def test_a_mistake_in_a_process_of_its_own(desk, random_backbone):
    files = {"background": "text.png", "foreground": "f.png", "mask": "m.png"}
    words = [f"model.path={random_backbone}", *(f"{key}={desk / name}" for key, name in files.items())]
    done = subprocess.run([sys.executable, "-m", "harmony.harmonize", *words], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


@pytest.mark.parametrize("text", ['it\'s a dog, on "grass"', "back\\slash\\", "\\'", "a=b (c) [d] {e}: $5 %", ""])
def test_free_text_reaches_the_model_as_it_was_typed(text):
    (word,) = harmonize.overrides([f"prompt={text}"])
    assert OverridesParser.create().parse_override(word).value() == text


def test_a_folder_of_composites(desk, command):
    """Guards ``dir=``: every row by its own rule, one folder each, one sheet, what cannot be done is counted."""
    head = "id,composite,mask,background,foreground,foreground_mask,bbox"
    rows = [
        "one,b.png,m.png,,,,",
        "two,,,b.png,f.png,m.png,5 5 40 40",
        "three,,,b.png,f.png,,",
        "four,gone.png,m.png,,,,",
    ]
    (desk / "index.csv").write_text("\n".join([head, *rows]) + "\n")
    code, lines, errors = command("dir=.", "prompt=a car", "output=out")
    assert code == 0 and not errors
    assert any("1 left out, the row of index.csv names neither" in line and "three" in line for line in lines)
    assert json.loads((desk / "out" / "metrics.json").read_text()) == {"composites": 2, "left_out": 2}
    assert any(line.startswith("four left out") for line in lines) and any("3/3" in line for line in lines)
    assert Path(lines[-1]) == desk / "out" / "sheet.png" and read_image(lines[-1]).shape[0] > 2 * 150
    assert lines[-2] == str(desk / "out" / "report.html")
    (told,) = (line for line in lines if "UNet " in line and " %, " in line and "the rest" in line)
    assert " s for 2 composites: " in told, "one batch"
    tiles = read_image(lines[-1])[24:, -150:]
    assert (tiles[40:150, 20:130] == 128).all() and tiles[240:].std() > 10, "no Poisson where nothing is known of it"
    for name in ("one", "two"):
        background, made = read_image(desk / "b.png"), read_image(desk / "out" / name / "harmonized.png")
        hole = read_image(desk / "out" / name / "hole.png")[..., 0] > 0
        assert np.array_equal(made[~hole], background[~hole]) and not np.array_equal(made[hole], background[hole])


@pytest.mark.parametrize("detail", ["full", "none"])
def test_a_model_sees_srgb(desk, command, swapped_profile, detail):
    """Guards against a photograph of another space being taken as sRGB: what is displayed is the same in both."""
    pixels = {name: read_image(desk / f"{name}.png") // 2 + 64 for name in "bf"}  # colors that both spaces hold
    shipped = ["model.path=tiny", "controlnet=color_relight", f"detail={detail}"]
    made = {}
    for name, profile in (("srgb", None), ("swapped", swapped_profile)):
        for file, picture in pixels.items():
            picture = picture if profile is None else np.ascontiguousarray(picture[..., ::-1])
            Image.fromarray(picture).save(desk / f"{file}.png", icc_profile=profile)
        words = ["background=b.png", "foreground=f.png", "mask=m.png", f"output={name}", *shipped]
        assert command(*words)[0] == 0
        made[name] = read_image(desk / name / "harmonized.png").astype(int)
    hole = read_image(desk / "srgb" / "hole.png")[..., 0] > 0
    plain, swapped = made["srgb"][hole], made["swapped"][hole][:, ::-1]
    assert np.abs(plain - swapped).mean() < 1.5 < np.abs(plain - pixels["b"][hole]).mean()


def test_the_photographs_exif_is_kept(desk, command):
    """Guards camera, time and place of a photograph: in the result, whose pixels are upright, and nowhere else."""
    exif = Image.Exif()
    exif[0x0110], exif[0x0112] = "a camera", 6  # the model; lies on its side
    image = Image.open(desk / "b.png").transpose(Image.Transpose.ROTATE_90)
    image.save(desk / "b.webp", exif=exif, lossless=True)
    upright = read_image(desk / "b.png")
    code, lines, _ = command("background=b.webp", "foreground=f.png", "mask=m.png", "prompt=a car")
    files = {Path(line).stem: line for line in lines if line.endswith(".png")}
    assert code == 0 and dict(Image.open(files["harmonized"]).getexif()) == {0x0110: "a camera"}
    assert not Image.open(files["composite"]).getexif() and not Image.open(files["sheet"]).getexif()
    outside = read_image(files["hole"])[..., 0] == 0
    assert np.array_equal(read_image(files["harmonized"])[outside], upright[outside])


def test_pictures_keep_the_color_profile_of_the_photograph(desk, command, swapped_profile):
    """Guards colors: the background's profile is in all results, and a cut-out of another space is converted."""
    Image.open(desk / "b.png").save(desk / "b.png", icc_profile=swapped_profile)
    code, lines, _ = command("background=b.png", "foreground=f.png", "mask=m.png", "prompt=a car")
    files = {Path(line).stem: line for line in lines if line.endswith(".png")}
    assert code == 0 and any("f.png: colors converted from sRGB" in line for line in lines)
    for name in ("harmonized", "composite", "raw", "sheet"):
        assert Image.open(files[name]).info["icc_profile"] == swapped_profile, name
    assert "icc_profile" not in Image.open(files["hole"]).info
    made, mask, hole = (read_image(file) for file in (files["composite"], "m.png", files["hole"]))
    inside, outside = mask[..., 0] > 0, hole[..., 0] == 0
    assert np.array_equal(read_image(files["harmonized"])[outside], read_image("b.png")[outside])
    gray = np.ptp(read_image("f.png").astype(int), axis=2) < 20  # colors that both spaces hold
    swapped = read_image("f.png")[..., ::-1].astype(int)
    assert np.abs(made.astype(int) - swapped)[inside & gray].max() < 6


def test_masks_are_found_by_their_whole_name(desk, command):
    """Guards names that are patterns, names that begin alike, and suffixes of any kind; what has no mask is counted."""
    mask = read_image(desk / "m.png")[..., 0] > 0
    names = {"shot[1].png": 0, "shot1.png": 9, "scene.png": 18, "scene.v2.PNG": -9, "a b*.JPG": -18}
    for name, shift in names.items():
        (desk / "many" / "composite").mkdir(parents=True, exist_ok=True)
        (desk / "many" / "composite" / name).write_bytes((desk / "b.png").read_bytes())
        write_image(desk / "many" / "mask" / f"{Path(name).stem}.png", np.roll(mask, shift, axis=1))
    for name in ("no_mask.png", "twice.png", "twice.jpg", "two_masks.png", "notes.txt", ".hidden"):
        (desk / "many" / "composite" / name).write_bytes((desk / "b.png").read_bytes())
    for name in ("twice.png", "two_masks.png", "two_masks.jpg"):
        write_image(desk / "many" / "mask" / name, mask)
    code, lines, errors = command("dir=many", "prompt=a car", "output=out")
    assert code == 0 and not errors
    lonely = ["no_mask.png", "notes.txt", "twice.jpg", "twice.png", "two_masks.png"]
    assert any(line.startswith("5 left out") and line.endswith(str(lonely)) for line in lines)
    metrics = json.loads((desk / "out" / "metrics.json").read_text())
    assert metrics == {"composites": 5, "left_out": 5}
    for name, shift in names.items():
        hole = read_image(desk / "out" / Path(name).stem / "hole.png")[..., 0] > 0
        assert hole[np.roll(mask, shift, axis=1)].all() and bounding_box(hole)[0] > bounding_box(mask)[0] + shift - 6


def test_a_folder_goes_on(desk, command):
    """Guards resumption: what is there stays, what is asked otherwise, changed, or never ended is made; the sheet is
    whole.
    """
    rows = ["id,composite,mask", "one,b.png,m.png", "two,f.png,m.png"]
    (desk / "index.csv").write_text("\n".join(rows) + "\n")
    command("dir=.", "output=out")
    sheet, when = read_image(desk / "out" / "sheet.png"), (desk / "out/one/harmonized.png").stat().st_mtime_ns

    def there(*more) -> int:
        said = [line for line in command("dir=.", "output=out", *more)[1] if "are there already" in line]
        return int(said[0].split()[0]) if said else 0

    (desk / "out" / "two" / "made_of.json").unlink()
    (desk / "out" / "sheet.png").unlink()
    (desk / "out" / "report.html").unlink()
    assert there() == 1 and there() == 2 and (desk / "out" / "report.html").exists()
    assert (desk / "out/one/harmonized.png").stat().st_mtime_ns == when
    assert np.array_equal(read_image(desk / "out" / "sheet.png"), sheet)
    assert there("seed=1") == 0 and there("seed=1", "prompt=a cup") == 0 and there("seed=1") == 0
    write_image(desk / "f.png", read_image(desk / "b.png")[:, ::-1])
    assert there("seed=1") == 1


def test_a_folder_leaves_a_page_to_look_at(desk, command, swapped_profile):
    """Guards report.html: composite and result of each in sRGB, whatever its name; what was left out; options."""
    Image.open(desk / "b.png").save(desk / "swapped.png", icc_profile=swapped_profile)
    rows = ["id,composite,mask", "<b>,b.png,m.png", "swapped,swapped.png,m.png", "x,gone.png,m.png"]
    (desk / "index.csv").write_text("\n".join(rows) + "\n")
    assert command("dir=.", "output=out", "prompt=</script>")[0] == 0
    text = (desk / "out" / "report.html").read_text()
    content = json.loads(text.partition('type="application/json">')[2].partition("</script>")[0])
    assert content["title"] == "harmonize out" and content["blocks"][0] == "2 composites, 1 left out"
    assert "prompt: </script>" in content["config"] and content["count"] == 2
    for row, name, step in zip(content["rows"], ("<b>", "swapped"), (1, -1), strict=True):
        assert row["name"] == name
        for picture, title in zip(row["pictures"], ("composite", "harmonized"), strict=True):
            pixels = Image.open(io.BytesIO(base64.b64decode(picture["source"].partition(",")[2])))
            written = read_image(desk / "out" / name / f"{title}.png")[..., ::step].astype(int)
            assert picture["title"] == title and np.abs(np.asarray(pixels, int) - written).max() <= 2


def test_a_folder_goes_on_without_being_named(desk, command, monkeypatch):
    """Guards the plain command: killed between two batches it goes on in its folder; ended, it begins a new one."""
    (desk / "index.csv").write_text("id,composite,mask\none,b.png,m.png\ntwo,f.png,m.png\n")
    whole = runs.Inserter.run_batch
    monkeypatch.setattr(runs.Inserter, "run_batch", lambda self, some: whole(self, some) if "one" in some else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        command("dir=.", "batch=1")
    monkeypatch.undo()
    monkeypatch.chdir(desk)
    lines = command("dir=.", "batch=1")[1]
    assert any("1 of 2 composites are there already" in line for line in lines)
    assert len(list((desk / "runs" / "harmonize").iterdir())) == 1
    assert not any("already" in line for line in command("dir=.", "batch=1")[1])


def test_a_batch_changes_no_composite(desk, command):
    """Guards ``batch``: composites of other sizes side by side become what each becomes alone, up to rounding; one that
    fails on the way leaves the others to go on.
    """
    write_image(desk / "wide.png", read_image(desk / "b.png").repeat(2, axis=1))
    write_image(desk / "wide_mask.png", (read_image(desk / "m.png")[..., 0] > 0).repeat(2, axis=1))
    rows = ["id,composite,mask", "one,b.png,m.png", "two,f.png,m.png", "three,wide.png,wide_mask.png"]
    (desk / "index.csv").write_text("\n".join(rows) + "\n")
    for batch in (1, 8):
        assert command("dir=.", "prompt=a car", f"batch={batch}", f"output=by_{batch}")[0] == 0
    for name in ("one", "two", "three"):
        alone, beside = (read_image(desk / f"by_{b}" / name / "harmonized.png").astype(int) for b in (1, 8))
        assert np.abs(alone - beside).max() <= 1, name
    assert not np.array_equal(read_image(desk / "by_8/one/raw.png"), read_image(desk / "by_8/two/raw.png"))
    assert "there already" in "".join(command("dir=.", "prompt=a car", "batch=2", "output=by_8")[1]), (
        "the same pictures"
    )
    words = {name: [{"object": "a cat", "foreground": "warm", "background": "cold"}] for name in ("b", "wide")}
    (desk / "words.json").write_text(json.dumps(words))
    zero_shot = ("method=zero_shot", "prompts=words.json", "evaluator=null", "rounds=1", "steps=1")
    code, lines, _ = command("dir=.", *zero_shot, "output=words")
    assert code == 0 and [line.split(" left out")[0] for line in lines if "left out" in line] == ["two"]
    assert all((desk / "words" / name / "harmonized.png").exists() for name in ("one", "three"))


@pytest.mark.parametrize(
    "word", ["structure=nowhere", "method=paint_by_example painter=nowhere", "method=zero_shot evaluator=nowhere"]
)
def test_a_path_that_is_missing_is_said_before_models_load(desk, command, monkeypatch, word):
    monkeypatch.setattr("harmony.models.backbone.load_part", lambda *given, **more: pytest.fail("loaded"))
    monkeypatch.setattr("harmony.methods.inpainting.load_controlnet", lambda *given: pytest.fail("loaded"))
    code, _, errors = command("composite=b.png", "mask=m.png", "prompt=x", "controlnet=color", *word.split())
    assert code == 2 and "nowhere" in errors[0], errors


@pytest.mark.parametrize("name", ["../two", "..", "one"])
def test_an_id_must_be_a_name_of_its_own(desk, command, name):
    """Guards what lies there: no row writes into another's folder, or outside; the other rows are harmonized."""
    (desk / "index.csv").write_text(f"id,composite,mask\none,b.png,m.png\n{name},f.png,m.png\n")
    before = {path.name for path in desk.parent.iterdir()}
    code, lines, errors = command("dir=.", "output=out", "prompt=x")
    assert code == 0, errors
    assert f"1 left out, the id is no file name, of an earlier row, or of a file of ours: ['{name}']" in lines
    assert {path.name for path in (desk / "out").iterdir() if path.is_dir()} == {"one"}
    assert np.array_equal(read_image(desk / "out" / "one" / "composite.png"), read_image(desk / "b.png"))
    assert {path.name for path in desk.parent.iterdir()} == before
    assert json.loads((desk / "out" / "metrics.json").read_text()) == {"composites": 1, "left_out": 1}


def test_an_index_without_a_usable_row_is_refused_before_models_load(desk, command):
    (desk / "index.csv").write_text("id,composite,mask\n../one,b.png,m.png\ntwo,,\n")
    code, _, errors = command("dir=.", "output=out", "model.path=nowhere/at/all")
    assert code == 2 and "index.csv has no row that can be harmonized" in errors[0] and not (desk / "out").exists()


def test_a_transparent_reference_lies_on_white(desk):
    """Guards the exemplar: what is hidden behind the alpha is not shown to the encoder."""
    shown, cut = inputs.put_on_white(read_image("cut.png"), "cut.png"), np.asarray(Image.open(desk / "cut.png"))
    opaque = cut[..., 3] > 0
    assert (shown[~opaque] == 255).all() and np.array_equal(shown[opaque], cut[..., :3][opaque])


def test_pairs_without_an_index(desk, command):
    """Guards the plain layout: composite/NAME with mask/NAME; and the lines for a folder that holds nothing."""
    (desk / "set" / "composite").mkdir(parents=True)
    (desk / "set" / "mask").mkdir()
    (desk / "b.png").rename(desk / "set" / "composite" / "x.png")
    (desk / "m.png").rename(desk / "set" / "mask" / "x.png")
    code, lines, _ = command("dir=set", "prompt=a car", "output=out")
    assert code == 0 and (desk / "out" / "x" / "harmonized.png").exists()
    for words, says in (
        (["dir=nowhere"], "no such folder"),
        (["dir=out"], "neither index.csv"),
        (["dir=set", "composite=f.png"], "pictures of its own"),
    ):
        code, _, errors = command(*words)
        assert code == 2 and says in errors[-1]
