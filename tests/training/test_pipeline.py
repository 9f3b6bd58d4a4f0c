"""``HarmonyPipeline``: an export in one call of diffusers gives the picture of ``harmonize``, and needs no harmony.

Bit for bit where the photograph keeps its detail, and as a rule where the networks paint: there the DDIM steps of
diffusers round otherwise than ours, which in float32 moves a few values of a picture by one level.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import ExifTags, Image

from harmony import harmonize
from harmony.core.errors import UserError
from harmony.methods.inpainting import Branch, Inpainting
from harmony.methods.insert import cut, insert
from harmony.models.backbone import Backbone
from harmony.models.controlnet import export_controlnet, read_hint
from harmony.models.shipped import ASSETS
from harmony.pixels.images import read_image, write_image
from harmony.sampling.guidance import Settings
from harmony.training.export import write_controlnet, write_pipeline
from harmony.training.pipeline import read_object, read_pixels, read_profile
from harmony.training.run_folder import find_run

SHIPPED = ("color", "color_relight")


def is_same(ours: np.ndarray, theirs, painted: bool) -> bool:
    """Whether two pictures are equal, or, where they were painted, as good as equal."""
    difference = np.abs(ours.astype(int) - np.asarray(theirs))
    return difference.max() <= painted and (difference > 0).mean() < 1e-3


def load(folder: Path, backbone: Path | str, **options):
    """An export as diffusers loads it."""
    options |= {"backbone": str(backbone), "torch_dtype": torch.float32}
    pipeline = DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(folder), trust_remote_code=True, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """``shipped(name)``: the shipped ControlNet as an export, and its pipeline."""
    made = {}

    def make(name: str):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            write_controlnet(find_run(ASSETS / name), ASSETS / name, folder, None, False, None)
            made[name] = folder, load(folder, ASSETS / "tiny")
        return made[name]

    return make


@pytest.fixture(scope="module")
def photograph() -> tuple[np.ndarray, np.ndarray]:
    """A photograph of 160 x 120 with an object at its rim, so that its square is moved, and the object's mask."""
    image = Image.open(ASSETS / "example" / "harmonized.webp").convert("RGB").resize((160, 120))
    mask = np.zeros((120, 160), bool)
    mask[50:120, 100:150] = True
    return np.array(image), mask


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize(
    "words",
    [
        {"detail": "auto"},  # the photograph's own detail
        {"detail": "full", "guidance": 2.0, "feather": 3},
        {"detail": "none", "steps": 4, "seed": 7},
        {"detail": "none", "steps": 3, "guidance": 3.0, "lambda_l": 0.5},
    ],
    ids=["auto", "full", "painted", "guided"],
)
def test_the_picture_of_harmonize(shipped, photograph, tmp_path, monkeypatch, name, words):
    picture, mask = photograph
    write_image(tmp_path / "c.png", picture)
    write_image(tmp_path / "m.png", mask)
    options = [f"{key}={value}" for key, value in words.items()]
    monkeypatch.chdir(tmp_path)
    inputs = ["composite=c.png", "mask=m.png", "prompt=a rocket", f"controlnet={name}", "output=out"]
    monkeypatch.setattr(sys, "argv", ["harmony-harmonize", *inputs, *options])
    harmonize.main()
    ours = read_image("out/harmonized.png")

    names = {
        "steps": "num_inference_steps",
        "guidance": "guidance_scale",
        "lambda_l": "controlnet_conditioning_scale",
    }
    arguments = {names.get(key, key): value for key, value in words.items()}
    theirs = shipped(name)[1]("a rocket", Image.open("c.png"), Image.open("m.png"), **arguments).images[0]
    assert is_same(ours, theirs, words["detail"] == "none")
    hole = read_image("out/hole.png")[..., 0] > 0
    assert np.array_equal(ours[~hole], picture[~hole]) and (ours != picture)[hole].mean() > 0.5


@pytest.fixture(scope="module")
def both(random_backbone, awake, tmp_path_factory):
    """A backbone with the folders of two exports for it, and its method with both ControlNets."""
    backbone, folder, branches = Backbone(str(random_backbone)), tmp_path_factory.mktemp("both"), []
    for seed, (name, parameters) in enumerate({"color": {"blur": 1.0}, "structure": {"low": 50.0}}.items()):
        net = awake(backbone, seed)
        export_controlnet(net, folder / name, name, parameters, backbone)
        write_pipeline(folder / name, read_hint(folder / name))
        branches.append(Branch(name, net, (0.7, 0.3)[seed], parameters))
    return backbone, folder, Inpainting(backbone, branches, Settings(3, 2.0))


@pytest.mark.parametrize("detail", ["full", "none"])
def test_both_controlnets(both, photograph, detail):
    backbone, folder, method = both
    picture, mask = photograph
    pipeline = load(folder / "color", backbone.path, structure=str(folder / "structure"))
    insertion = cut(method.resolution, picture, picture, mask, caption="a red mushroom")
    ours = insert(method, [insertion], detail=detail)[0].image
    settings = {"num_inference_steps": 3, "guidance_scale": 2.0, "detail": detail, "output_type": "np"}

    def run(pipeline, *scales):
        return pipeline("a red mushroom", picture, mask, controlnet_conditioning_scale=scales, **settings).images[0]

    assert is_same(ours, run(pipeline, 0.7, 0.3), detail == "none")
    assert not is_same(ours, run(pipeline, 0.7, 0), True), "the second one matters"


def test_the_pipeline_is_saved_and_loaded_whole(both, photograph, tmp_path):
    """Guards ``save_pretrained``: the copy has the backbone's parts and both hints, and needs no other folder."""
    backbone, folder, _ = both
    pipeline = load(folder / "color", backbone.path, structure=str(folder / "structure"))
    pipeline.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(
        tmp_path, custom_pipeline=str(folder / "color"), trust_remote_code=True, torch_dtype=torch.float32
    )
    pictures = [p("x", *photograph, num_inference_steps=2, detail="none").images[0] for p in (pipeline, again)]
    assert np.array_equal(*pictures)


def test_the_picture_keeps_its_color_profile(both, photograph, swapped_profile):
    """Guards photographs in another space, and on their side: networks see sRGB, upright; the values are kept."""
    backbone, folder, method = both
    pixels, mask = photograph
    image = Image.fromarray(np.ascontiguousarray(np.rot90(pixels)))
    image.getexif()[ExifTags.Base.Orientation] = 6  # to be turned right
    image.info["icc_profile"] = swapped_profile
    pipeline = load(folder / "color", backbone.path)
    picture = pipeline("x", image, Image.fromarray(mask), num_inference_steps=2, detail="none").images[0]
    alone = Inpainting(backbone, [Branch("color", method.branches[0].net, 1.0, {"blur": 1.0})], Settings(2, 1.0))
    insertion = cut(alone.resolution, pixels, pixels, mask, profile=swapped_profile, caption="x")
    assert is_same(insert(alone, [insertion], detail="none")[0].image, picture, True)
    assert picture.info["icc_profile"] == swapped_profile


def test_pictures_of_all_kinds(tmp_path):
    """Guards the pipeline's own reader: what harmonize takes is taken, whatever form a mask has; the rest is said."""
    deep = (np.arange(12, dtype=np.uint16).reshape(3, 4) * 5000).clip(0, 60000)
    assert np.abs(read_pixels(Image.fromarray(deep))[..., 0] - deep / 257).max() <= 0.5
    mask = np.zeros((3, 4), bool)
    mask[1:, 1:] = True
    forms = (mask, mask.astype(np.uint8), mask * np.uint8(255), mask.astype(np.float32), mask[..., None])
    assert all(np.array_equal(read_object(form), mask) for form in (*forms, Image.fromarray(mask)))
    for wrong in (np.zeros((3, 4, 4), np.uint8), np.zeros((3, 4, 3), np.float32), mask):
        with pytest.raises(UserError, match="give uint8, height x width x 3"):
            read_pixels(wrong)
    image = Image.new("RGB", (4, 3))
    image.info["icc_profile"] = b"damaged" * 40
    assert read_profile(image) is None and read_profile(np.zeros((3, 4, 3), np.uint8)) is None


def test_what_is_missing_is_said(both, photograph):
    backbone, folder, _ = both
    with pytest.raises(Exception, match="there is no backbone nowhere: give backbone="):
        load(folder / "color", "nowhere")
    pipeline = load(folder / "color", backbone.path)
    with pytest.raises(Exception, match="detail=some: give auto, full or none"):
        pipeline("x", *photograph, detail="some")
    with pytest.raises(Exception, match="the mask is empty"):
        pipeline("x", photograph[0], np.zeros_like(photograph[1]))
    with pytest.raises(Exception, match="mask is 160 x 119 but the background is 160 x 120"):
        pipeline("x", photograph[0], photograph[1][1:])
    with pytest.raises(Exception, match="give a weight for 1 networks"):
        pipeline("x", *photograph, controlnet_conditioning_scale=[1.0, 0.5])
    unknown = load(folder / "color", backbone.path, hints={})
    with pytest.raises(Exception, match="does not know what controlnet sees"):
        unknown("x", *photograph)


def test_no_harmony_is_needed(shipped, photograph, tmp_path):
    """The pipeline of an export where harmony and what only harmony needs are not installed."""
    folder, pipeline = shipped("color_relight")
    write_image(tmp_path / "c.png", photograph[0])
    write_image(tmp_path / "m.png", photograph[1])
    code = f"""
import sys
sys.modules.update(dict.fromkeys(("harmony", "hydra", "omegaconf", "lightning", "fiftyone", "skimage", "wandb")))
import torch
from diffusers import DiffusionPipeline
from PIL import Image
pipeline = DiffusionPipeline.from_pretrained(
    {str(folder)!r}, trust_remote_code=True, torch_dtype=torch.float32, backbone={str(ASSETS / "tiny")!r}
)
pipeline("a rocket", Image.open("c.png"), Image.open("m.png")).images[0].save("h.png")
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, timeout=300)
    expected = pipeline("a rocket", *photograph, output_type="np").images[0]
    assert np.array_equal(read_image(tmp_path / "h.png"), expected)


def test_an_export_without_a_known_hint_has_no_pipeline(tmp_path):
    """Guards what a former export left: nothing in the folder promises what cannot be."""
    write_pipeline(tmp_path, {"branch": "color", "parameters": {}, "backbone": "tiny"})
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["hints"] == {"controlnet": {"branch": "color", "parameters": {}}} and index["backbone"] == "tiny"
    write_pipeline(tmp_path, {})
    assert not list(tmp_path.iterdir())
