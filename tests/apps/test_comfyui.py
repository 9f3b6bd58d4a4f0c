"""The nodes for ComfyUI give what the library gives, on its tensors; the example workflow fits them and ComfyUI's own.

ComfyUI is on no index: its ``comfy_api`` is a stand-in after its source, and the types of its nodes are copied facts.
"""

import ast
import asyncio
import configparser
import importlib.util
import json
import math
import re
import subprocess
import sys
import tomllib
import types
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from harmony.cli.compose import CONFIGS, load_yaml
from harmony.core.errors import UserError
from harmony.methods.inputs import read_inputs
from harmony.methods.insert import FULL, cut, find_shadow_region, insert
from harmony.methods.method import Method
from harmony.models.controlnet import RANGES
from harmony.pixels.composites import copy_paste, reinhard
from harmony.pixels.hints import HINTS, hint
from harmony.pixels.images import read_image

ROOT = Path(__file__).resolve().parents[2]
PACK = ROOT / "harmony" / "apps" / "comfyui"
EXAMPLE = ROOT / "harmony" / "assets" / "example"
WORKFLOW = PACK / "example_workflows" / "insert_object.json"
SAFE = ("PIL", "cv2", "harmony", "comfy_api", "numpy", "safetensors", "scipy", "torch")


# --- ComfyUI


@dataclass
class Socket:
    """An input or output, with the options of its widget; other keywords are errors, as in ComfyUI."""

    id: str
    io_type: str
    optional: bool = False
    advanced: bool = False
    tooltip: str | None = None
    options: list | None = None
    default: object = None
    min: float | None = None
    max: float | None = None
    step: float | None = None


@dataclass
class Schema:
    node_id: str
    display_name: str
    category: str
    description: str
    search_aliases: list[str]
    inputs: list[Socket]
    outputs: list[Socket]


class NodeOutput:
    def __init__(self, *args):
        self.args = args


def make_type(io_type: str) -> types.SimpleNamespace:
    def make(id, **options):
        return Socket(id, io_type, **options)

    return types.SimpleNamespace(Input=make, Output=make)


def make_comfy_api() -> dict[str, types.ModuleType]:
    """A stand-in for the modules that the nodes import, by name."""
    names = {name: make_type(name.upper()) for name in ("Image", "Mask", "Int", "Float", "Boolean", "Combo")}
    io = types.SimpleNamespace(
        **names, Custom=make_type, Schema=Schema, NodeOutput=NodeOutput, ComfyNode=type("ComfyNode", (), {})
    )
    version = types.ModuleType("comfy_api.v0_0_2")
    version.io, version.ComfyExtension = io, type("ComfyExtension", (), {})
    return {"comfy_api": types.ModuleType("comfy_api"), "comfy_api.v0_0_2": version}


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    """The nodes by id, loaded from a link in ``custom_nodes`` as ComfyUI loads them."""
    link = tmp_path_factory.mktemp("custom_nodes") / "harmony"
    link.symlink_to(PACK)
    spec = importlib.util.spec_from_file_location(str(link), link / "__init__.py")
    pack = importlib.util.module_from_spec(spec)
    before = dict(sys.modules)
    sys.modules |= make_comfy_api()
    try:
        spec.loader.exec_module(pack)
        classes = asyncio.run(asyncio.run(pack.comfy_entrypoint()).get_node_list())
    finally:
        for name in ("comfy_api", "comfy_api.v0_0_2", "harmony.apps.comfyui.nodes"):
            sys.modules.pop(name, None)
        assert "comfy_api" not in before
    return {node.define_schema().node_id: node for node in classes}


@pytest.fixture(scope="module")
def run(nodes):
    """``run(node, **inputs)``: the outputs of a node; what is not given has the default of its widget."""

    def call(name, **inputs):
        widgets = {i.id: i.default for i in nodes[name].define_schema().inputs if i.default is not None}
        return nodes[name].execute(**widgets | inputs).args

    return call


def to_image(*pictures: np.ndarray) -> torch.Tensor:
    """As Load Image reads them."""
    return torch.from_numpy(np.stack(pictures).astype(np.float32) / 255.0)


def to_mask(*masks: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.stack(masks)).float()


def save(image: torch.Tensor) -> np.ndarray:
    """As Save Image writes them: it cuts off what is behind the point."""
    return np.clip(255.0 * image.cpu().numpy(), 0, 255).astype(np.uint8)


# --- the nodes against the library


@pytest.fixture(scope="module")
def photograph():
    """(composite, mask): the example of the README, an astronaut pasted in front of a rocket."""
    options = {"background": EXAMPLE / "rocket.jpg", "foreground": EXAMPLE / "astronaut.webp"}
    inputs = read_inputs({name: str(path) for name, path in options.items()} | {"box": [20, 100, 328, 427]})
    return copy_paste(inputs.background, inputs.foreground, inputs.mask), inputs.mask


@pytest.fixture(scope="module")
def render(studio_rows):
    """(picture, mask) of a bundled render."""
    return read_image(ROOT / studio_rows[0].image), read_image(ROOT / studio_rows[0].mask)[..., 0] > 122


@pytest.mark.parametrize("size, rim, shadow", [(64, 16, False), (512, 16, False), (256, 0, True)])
def test_crop(run, photograph, render, size, rim, shadow):
    for picture, mask in (photograph, render):
        square, inside, hole, crop = run(
            "HarmonyCrop", image=to_image(picture), mask=to_mask(mask), size=size, rim=rim, shadow=shadow
        )
        region = find_shadow_region(mask) if shadow else None
        expected = cut(size, picture, picture, mask, region, rim).square
        assert square.shape == (1, size, size, 3) and square.dtype == torch.float32
        assert np.array_equal(save(square)[0], expected.instance)
        assert np.array_equal(inside[0] > 0, expected.mask) and np.array_equal(hole[0] > 0, expected.hole)
        assert set(hole.unique().tolist()) == {0, 1} and len(crop.insertions) == 1


OTHERS = {
    "color": {"blur": 2, "normalize": False},
    "structure": {"low": 50, "high": 90, "edge_source": "full_times_mask"},
}


@pytest.mark.parametrize("kind", HINTS)
def test_hint(run, photograph, render, kind):
    for picture, mask in (photograph, render):
        image, parameters = to_image(picture), OTHERS.get(kind, {})
        (shown,) = run("HarmonyHint", image=image, mask=to_mask(mask), kind=kind)
        assert np.array_equal(save(shown)[0], hint(kind, picture, mask)), "the defaults of training"
        (shown,) = run("HarmonyHint", image=image, mask=to_mask(mask), kind=kind, **parameters)
        assert np.array_equal(save(shown)[0], hint(kind, picture, mask, **parameters))
        hole = cut(None, picture, picture, mask).hole
        (shown,) = run("HarmonyHint", image=image, mask=to_mask(mask), kind=kind, hole=to_mask(hole))
        assert np.array_equal(save(shown)[0], hint(kind, picture, mask, picture, hole, surroundings=True))


def test_hint_takes_what_training_takes(nodes):
    """Guards networks that were trained otherwise: each of ``data.hints`` is an input, with default and whole range."""
    inputs = {i.id: i for i in nodes["HarmonyHint"].define_schema().inputs}
    for options in load_yaml(CONFIGS / "task" / "control.yaml").data.hints.values():
        for name, value in options.items():
            socket = inputs[{"surroundings": "hole"}.get(name, name)]
            assert socket.default == (value or None), name
            assert (socket.min, socket.max) == RANGES.get(name, (None, None))
    decimals = -math.floor(math.log10(inputs["blur"].step))  # to which ComfyUI rounds what is typed
    assert round(inputs["blur"].default, decimals) == inputs["blur"].default


def test_reinhard(run, photograph, render):
    for picture, mask in (photograph, render):
        image = to_image(picture)
        (result,) = run("HarmonyReinhard", image=image, mask=to_mask(mask))
        assert np.array_equal(save(result)[0], reinhard(picture, mask, picture))
        assert torch.equal(result[0][~mask], image[0][~mask])
        assert not torch.equal(result[0][mask], image[0][mask])


class Darker(Method):
    """Paints the object at half its brightness."""

    resolution, relights = 64, True

    def fill(self, composites, seeds):
        return [c.instance // 2 for c in composites]

    def relight(self, composites, seeds):
        return [(c.instance, c.instance // 2) for c in composites]


@pytest.mark.parametrize("feather, detail", [(0, "none"), (3, "none"), (0, FULL)])
def test_paste_back_is_insert(run, photograph, feather, detail):
    """Crop, model and paste back are what ``harmonize`` does, also where the photograph keeps its detail."""
    picture, mask = photograph
    square, _, _, crop = run("HarmonyCrop", image=to_image(picture), mask=to_mask(mask), size=64)
    painted = to_image(save(square)[0] // 2)
    before = {"before": square} if detail == FULL else {}
    (result,) = run("HarmonyPasteBack", crop=crop, image=painted, feather=feather, **before)
    (expected,) = insert(Darker(), [cut(64, picture, picture, mask)], feather=feather, detail=detail)
    assert np.array_equal(save(result)[0], expected.image)
    assert np.array_equal(save(result)[0][~expected.hole], picture[~expected.hole])
    assert not np.array_equal(save(result)[0], picture)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_outside_the_hole_each_value_stays(run, photograph, channels):
    """Guards the promise for values between those of 8 bits, beyond white, of gray pictures and of transparency."""
    picture, mask = photograph
    noise = torch.rand(picture.shape[:2] + (4,), generator=torch.Generator().manual_seed(0)) * 0.01
    image = torch.cat([to_image(picture)[0], torch.rand(picture.shape[:2])[..., None]], dim=-1) + noise
    image = image[None, ..., :channels].contiguous()
    copy = image.clone()
    square, _, _, crop = run("HarmonyCrop", image=image, mask=to_mask(mask), size=64)
    assert square.shape[-1] == 3
    (result,) = run("HarmonyPasteBack", crop=crop, image=1 - square)
    hole = crop.insertions[0].hole
    assert result.shape[-1] == max(channels, 3) and torch.equal(image, copy)
    assert torch.equal(result[0][~hole], image[0][~hole].expand(-1, result.shape[-1]))
    assert torch.equal(result[..., 3:], image[..., 3:]), "alpha"
    assert not torch.equal(result[0][hole][:, :3], image[0][hole][:, :3].expand(-1, 3))


def test_batches(run, photograph):
    """Several photographs with a mask each or one for all, and several paintings of one photograph."""
    picture, mask = photograph
    pictures, other = (picture, picture[:, ::-1], 255 - picture), np.roll(mask, 40, axis=1)
    for masks in ((mask,), (mask, other, mask)):
        square, inside, hole, crop = run("HarmonyCrop", image=to_image(*pictures), mask=to_mask(*masks), size=64)
        assert len(square) == len(inside) == len(hole) == 3
        squares = {"HarmonyReinhard": (to_image(*pictures), to_mask(*masks)), "HarmonyHint": (square, inside)}
        for name, (images, places) in squares.items():
            (results,) = run(name, image=images, mask=places)
            for i, result in enumerate(results):
                one = places[min(i, len(places) - 1)][None]
                assert torch.equal(result, run(name, image=images[i : i + 1], mask=one)[0][0])
        (results,) = run("HarmonyPasteBack", crop=crop, image=1 - square)
        for i, result in enumerate(results):
            outside = ~crop.insertions[i].hole
            assert np.array_equal(save(result)[outside], pictures[i][outside])
    square, _, _, crop = run("HarmonyCrop", image=to_image(picture), mask=to_mask(mask), size=64)
    painted = torch.cat([square, 1 - square])
    (results,) = run("HarmonyPasteBack", crop=crop, image=painted, before=square)
    assert len(results) == 2
    assert torch.equal(results[1], run("HarmonyPasteBack", crop=crop, image=1 - square, before=square)[0][0])
    (larger,) = run("HarmonyPasteBack", crop=crop, image=to_image(np.zeros((96, 96, 3), np.uint8)))
    assert not larger[0][crop.insertions[0].hole].any(), "a model may paint at another size"


def test_masks_of_other_forms(run, photograph):
    """A mask without its batch, or with a channel, as other nodes give them, and a soft one."""
    picture, mask = photograph
    (expected,) = run("HarmonyReinhard", image=to_image(picture), mask=to_mask(mask))
    for other in (to_mask(mask)[0], to_mask(mask)[:, None], to_mask(mask) * 0.4 + 0.3):
        assert torch.equal(run("HarmonyReinhard", image=to_image(picture), mask=other)[0], expected)


def test_mistakes(run, photograph):
    """One line that says what does not fit."""
    picture, mask = photograph
    image, masks = to_image(picture), to_mask(mask)
    square, _, _, crop = run("HarmonyCrop", image=image, mask=masks, size=64)
    whole = {"image": image, "mask": masks}
    broken = image.clone()
    broken[0, 0, 0, 0] = torch.nan
    for name, inputs, message in (
        ("HarmonyCrop", whole | {"mask": torch.zeros(1, 64, 64)}, "mask is 64 x 64 but the image is 640 x 427"),
        ("HarmonyCrop", whole | {"mask": torch.zeros(1, 427, 640)}, "mask 1 of 1 is empty"),
        ("HarmonyHint", whole | {"mask": torch.cat([masks, 0 * masks])}, "mask 2 of 2 is empty"),
        ("HarmonyReinhard", whole | {"mask": masks.repeat(2, 1, 1)}, "2 masks for 1 images"),
        ("HarmonyReinhard", whole | {"image": image[..., :2]}, "this is 1 x 427 x 640 x 2"),
        ("HarmonyCrop", whole | {"image": broken}, "NaN"),
        ("HarmonyCrop", whole | {"image": image[:0]}, "0 x 427 x 640 x 3, an empty batch"),
        ("HarmonyReinhard", whole | {"mask": masks[:0]}, "0 x 427 x 640, an empty batch"),
        ("HarmonyPasteBack", {"crop": crop, "image": square[:0]}, "an empty batch"),
        ("HarmonyPasteBack", {"crop": crop, "image": image}, "the image is 640 x 427: connect what the model made"),
        ("HarmonyPasteBack", {"crop": crop, "image": square, "before": square[:, :32, :32]}, "the image is 32 x 32"),
        ("HarmonyPasteBack", {"crop": crop, "image": square, "before": square.repeat(3, 1, 1, 1)}, "3 squares before"),
    ):
        with pytest.raises(UserError) as caught:
            run(name, **inputs)
        assert message in str(caught.value) and "\n" not in str(caught.value), (name, caught.value)


# --- the pack


def test_schemas(nodes):
    """Inputs are what ``execute`` takes, ids are unique, and everything says what it is."""
    for name, node in nodes.items():
        schema = node.define_schema()
        ids = [socket.id for socket in (*schema.inputs, *schema.outputs) if socket.io_type != "HARMONY_CROP"]
        assert schema.node_id == name and len(set(ids)) == len(ids) and schema.category == "harmony"
        code = node.execute.__func__.__code__
        names = list(code.co_varnames[1 : code.co_argcount])
        defaults = dict(zip(names[::-1], (node.execute.__func__.__defaults__ or ())[::-1], strict=False))
        assert [i.id for i in schema.inputs] == names
        assert {i.id: i.default for i in schema.inputs if i.optional} == defaults, "of workflows without them"
        assert all(i.tooltip for i in schema.inputs) and schema.description
        assert all(i.min <= i.default <= i.max for i in schema.inputs if i.io_type in ("INT", "FLOAT"))


def test_the_pack_runs_nothing():
    """Guards the standards of the registry: no eval, no exec, no other programs."""
    forbidden = {"eval", "exec", "compile", "__import__", "subprocess", "os", "pip", "system", "shutil", "socket"}
    for path in PACK.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = {getattr(node, name, None) for name in ("id", "attr", "module")}
            names |= {alias.name for alias in getattr(node, "names", []) if isinstance(alias, ast.alias)}
            assert not names & forbidden, (path, names)


def test_the_pack_needs_little():
    """Guards the Python of ComfyUI: all nodes run with nothing that it lacks but OpenCV, and start no GPU."""
    code = f"""
import importlib.abc, sys, types
class Others(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        top = name.split(".")[0]
        if top not in sys.stdlib_module_names and not top.startswith("_") and top not in {SAFE}:
            raise ModuleNotFoundError(name, name=name)
import torch, scipy.ndimage, scipy.sparse.linalg  # what they need is theirs
sys.meta_path.insert(0, Others())
sys.path.insert(0, {str(ROOT)!r})
api = types.ModuleType("comfy_api.v0_0_2")
api.ComfyExtension = object
api.io = types.SimpleNamespace(ComfyNode=object, Custom=str, Schema=None, NodeOutput=lambda *args: args)
sys.modules |= {{"comfy_api": types.ModuleType("comfy_api"), "comfy_api.v0_0_2": api}}
from harmony.apps.comfyui import nodes
image, mask = torch.rand(1, 96, 80, 3), torch.zeros(1, 96, 80)
mask[:, 30:60, 20:50] = 1
square, inside, hole, crop = nodes.HarmonyCrop.execute(image, mask, 64, 16, True)
for kind in nodes.HINTS:
    nodes.HarmonyHint.execute(square, inside, kind, 1, 100, 200, hole=hole)
nodes.HarmonyPasteBack.execute(crop, 1 - square, 3, square)
nodes.HarmonyReinhard.execute(image, mask)
assert not torch.cuda.is_initialized() and "skimage" not in sys.modules and "diffusers" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_its_description():
    """Guards the registry's rules, and the version, which is harmony's."""
    facts = tomllib.loads((PACK / "pyproject.toml").read_text())
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    assert facts["project"]["version"] == settings["metadata"]["version"]
    assert "comfyui" not in facts["project"]["name"].lower() and facts["project"]["dependencies"] == []
    assert facts["project"]["license"] == {"text": settings["metadata"]["license"]}
    assert facts["tool"]["comfy"]["DisplayName"] == "Harmony"


# --- the workflow

CORE = """
LoadImage: image=COMBO -> IMAGE MASK
PrimitiveInt: value=INT -> INT
InvertMask: mask=MASK -> MASK
ThresholdMask: mask=MASK value=FLOAT -> MASK
GetImageSize: image=IMAGE -> INT INT INT
SolidMask: value=FLOAT width=INT height=INT -> MASK
ImageCompositeMasked: destination=IMAGE source=IMAGE x=INT y=INT resize_source=BOOLEAN mask=MASK -> IMAGE
MaskComposite: destination=MASK source=MASK x=INT y=INT operation=COMBO -> MASK
CheckpointLoaderSimple: ckpt_name=COMBO -> MODEL CLIP VAE
CLIPTextEncode: text=STRING clip=CLIP -> CONDITIONING
ControlNetLoader: control_net_name=COMBO -> CONTROL_NET
ControlNetApplyAdvanced: positive=CONDITIONING negative=CONDITIONING control_net=CONTROL_NET image=IMAGE \
strength=FLOAT start_percent=FLOAT end_percent=FLOAT vae=VAE -> CONDITIONING CONDITIONING
InpaintModelConditioning: positive=CONDITIONING negative=CONDITIONING vae=VAE pixels=IMAGE mask=MASK \
noise_mask=BOOLEAN -> CONDITIONING CONDITIONING LATENT
KSampler: model=MODEL seed=INT steps=INT cfg=FLOAT sampler_name=COMBO scheduler=COMBO positive=CONDITIONING \
negative=CONDITIONING latent_image=LATENT denoise=FLOAT -> LATENT
VAEDecode: samples=LATENT vae=VAE -> IMAGE
SaveImage: images=IMAGE filename_prefix=STRING ->
MarkdownNote: text=STRING ->
"""  # inputs, those with a widget in the order of their values, and outputs: from ComfyUI's source
OPTIONAL = {("ControlNetApplyAdvanced", "vae"), ("HarmonyHint", "hole"), ("HarmonyPasteBack", "before")}
WIDGETS = ("INT", "FLOAT", "BOOLEAN", "COMBO", "STRING")
AFTER = (("LoadImage", "image"), ("PrimitiveInt", "value"), ("KSampler", "seed"))  # the interface adds a value


@pytest.fixture(scope="module")
def workflow():
    return json.loads(WORKFLOW.read_text())


@pytest.fixture(scope="module")
def types_of(nodes):
    """Node type -> its inputs by name and the types of its outputs."""
    known = {}
    for line in CORE.strip().splitlines():
        name, inputs, outputs = re.fullmatch(r"(\w+): (.*) ->(.*)", line).groups()
        known[name] = dict(pair.split("=") for pair in inputs.split()), outputs.split()
    for name, node in nodes.items():
        schema = node.define_schema()
        known[name] = {i.id: i.io_type for i in schema.inputs}, [o.io_type for o in schema.outputs]
    return known


def read_widgets(node: dict, inputs: dict[str, str]) -> dict[str, object]:
    """The values of a node's widgets by name."""
    values, widgets = iter(node.get("widgets_values", [])), {}
    for name, kind in inputs.items():
        if kind in WIDGETS:
            widgets[name] = next(values)
            if (node["type"], name) in AFTER:
                next(values)
    assert not list(values), node["type"]
    return widgets


def test_links_and_types(workflow, types_of):
    """Each link joins an output and an input of its type, each input is linked or a widget, and all is known."""
    by_id = {node["id"]: node for node in workflow["nodes"]}
    links = {link[0]: link for link in workflow["links"]}
    assert len(by_id) == len(workflow["nodes"]) == workflow["last_node_id"]
    assert len(links) == len(workflow["links"]) == workflow["last_link_id"]
    for number, source, slot, target, place, kind in workflow["links"]:
        output, entry = by_id[source]["outputs"][slot], by_id[target]["inputs"][place]
        assert number in output.get("links", ()) and entry["link"] == number
        assert output["type"] == entry["type"] == kind
    for node in workflow["nodes"]:
        inputs, outputs = types_of[node["type"]]
        assert [output["type"] for output in node["outputs"]] == outputs
        for entry in node["inputs"]:
            assert inputs[entry["name"]] == entry["type"], (node["type"], entry)
            assert ("widget" in entry) == (entry["type"] in WIDGETS)
        linked = {entry["name"] for entry in node["inputs"] if entry["link"] in links}
        assert all(
            kind in WIDGETS or name in linked or (node["type"], name) in OPTIONAL for name, kind in inputs.items()
        )


def test_its_widgets_are_in_range(workflow, nodes):
    """Guards values that ComfyUI would refuse: our nodes' own ranges and choices, and the names of exported files."""
    for node in workflow["nodes"]:
        if node["type"] in nodes:
            schema = nodes[node["type"]].define_schema()
            values = read_widgets(node, {i.id: i.io_type for i in schema.inputs})
            for socket in schema.inputs:
                if socket.id in values and socket.io_type in ("INT", "FLOAT"):
                    assert socket.min <= values[socket.id] <= socket.max
                elif socket.io_type == "COMBO":
                    assert values[socket.id] in socket.options
    names = {node["widgets_values"][0] for node in workflow["nodes"] if node["type"] == "ControlNetLoader"}
    assert names == {"harmony-color.safetensors", "harmony-structure.safetensors"}
    assert min(Image.open(WORKFLOW.with_suffix(".jpg")).size) >= 128, "ComfyUI shows the picture of the same name"


def load_image(image):
    """Load Image: colors, and one minus alpha."""
    picture = Image.open(EXAMPLE / image)
    alpha = np.asarray(picture.convert("RGBA"))[..., 3]
    mask = 1 - torch.from_numpy(alpha.astype(np.float32) / 255) if "A" in picture.getbands() else torch.zeros(64, 64)
    return to_image(np.asarray(picture.convert("RGB"))), mask[None]


def place(destination, source, x, y, mask=None, **options):
    """Image Composite Masked and Mask Composite (add)."""
    result = destination.clone()
    part = result[:, y : y + source.shape[1], x : x + source.shape[2]]
    weight = 1 if mask is None else mask[..., None]
    part[:] = weight * source + (1 - weight) * part
    return (result,)


def test_it_inserts_the_object(workflow, types_of, run, photograph):
    """The graph itself on the example's pictures, with a sampler that paints the square in gray.

    The composite, the hints and what is outside the hole are those of ``harmonize``.
    """
    links, results = {link[0]: link for link in workflow["links"]}, {}
    core = {
        "LoadImage": load_image,
        "PrimitiveInt": lambda value: (value,),
        "InvertMask": lambda mask: (1 - mask,),
        "ThresholdMask": lambda mask, value: ((mask > value).float(),),
        "GetImageSize": lambda image: (image.shape[2], image.shape[1], image.shape[0]),
        "SolidMask": lambda value, width, height: (torch.full((1, height, width), value),),
        "ImageCompositeMasked": place,
        "MaskComposite": place,
        "VAEDecode": lambda samples, vae: (torch.full((1, 512, 512, 3), 0.5),),
    }
    for node in sorted(workflow["nodes"], key=lambda node: node["order"]):
        inputs = read_widgets(node, types_of[node["type"]][0])
        for entry in node["inputs"]:
            if entry["link"] is not None:
                _, source, slot, *_ = links[entry["link"]]
                inputs[entry["name"]] = results[source][slot]
        if node["type"].startswith("Harmony"):
            results[node["id"]] = run(node["type"], **inputs)
        else:
            known = core.get(node["type"])
            results[node["id"]] = known(**inputs) if known else (None,) * len(node["outputs"])
    outputs = {node["type"]: results[node["id"]] for node in workflow["nodes"]}
    picture, mask = photograph
    assert np.array_equal(save(outputs["ImageCompositeMasked"][0])[0], picture)
    assert np.array_equal(outputs["MaskComposite"][0][0] == 1, mask)
    square = cut(512, picture, picture, mask)
    assert np.array_equal(save(outputs["HarmonyCrop"][0])[0], square.square.instance)
    edges = hint("structure", square.square.instance, square.square.mask)
    assert np.array_equal(save(outputs["HarmonyHint"][0])[0], edges)
    (result,) = outputs["HarmonyPasteBack"][0]
    background = load_image("rocket.jpg")[0][0]
    assert torch.equal(result[~square.hole], background[~square.hole])
    assert (save(result)[square.hole] == 128).all()
