"""Every forward pass at true size on a GPU that is not there: PyTorch's fake tensors have device, shape, type, layout
and no values, and an operation on tensors of two devices raises as it does on a GPU.

What a computation reads of its own values cannot be faked, so the mode below answers: every number is 0, every
condition false. Arrays for NumPy are zeros, and only what lies on the host in a type that NumPy has can become one.
Gradients ask for a CUDA context: ``backward`` does nothing here, and the optimizers that follow find nothing to do.
Not faked: what needs the number of true entries (solvers other than DDIM look their step up that way), beam search,
CUDA graphs and streams, files.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily

from harmony.benchmarks.train import make_batch
from harmony.cli.compose import compose
from harmony.data.descriptions import Description, WordScorer
from harmony.data.latent_cache import Example, Recipe, encode
from harmony.methods.inpainting import Branch, Inpainting
from harmony.methods.method import Composite
from harmony.methods.paint_by_example import PaintByExample
from harmony.methods.prompt_editing import MODES, edit_picture, invert_pictures, plan_edit, reconstruct
from harmony.methods.zero_shot import Parts, harmonize_once
from harmony.metrics.frechet import extract
from harmony.metrics.similarity import embeddings
from harmony.models.backbone import Backbone, move_module
from harmony.models.clip import clip_of
from harmony.models.controlnet import from_unet
from harmony.models.features import BackboneFeatures
from harmony.models.judge import Judge
from harmony.pixels.masks import dilate
from harmony.sampling.guidance import Settings
from harmony.training.control import ControlTask, JointTask
from harmony.training.judge import JudgeTask
from harmony.training.muon import Muon
from harmony.training.paint_by_example import ExemplarTask
from harmony.training.pipeline import PARTS, HarmonyPipeline
from harmony.training.textual_inversion import TextualInversionTask

GPU = torch.device("cuda", 0)
SEEDS = [(0, 0), (0, 1)]
VALUE = torch.ops.aten._local_scalar_dense.default


class FakeGPU(FakeTensorMode):
    """The mode, with an answer for who asks for a value."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is VALUE:
            kind = args[0].dtype
            return False if kind == torch.bool else 0.0 if kind.is_floating_point else 0
        return super().__torch_dispatch__(func, types, args, kwargs)


def convert(module: torch.nn.Module, function, recurse: bool = True) -> torch.nn.Module:
    """``Module._apply`` with new parameters in the place of the old: fake ones cannot be changed in place."""
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                part._parameters[name] = torch.nn.Parameter(function(p.detach()), p.requires_grad)
        part._buffers.update({name: function(b) for name, b in part._buffers.items() if b is not None})
    return module


def array(x: torch.Tensor) -> np.ndarray:
    """``Tensor.numpy`` of zeros, as strict as the real one."""
    assert x.device.type == "cpu", f"NumPy cannot read what lies on {x.device}"
    return np.zeros(tuple(x.shape), str(x.dtype).removeprefix("torch."))


@pytest.fixture(scope="module")
def mode():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "_apply", convert)
        patch.setattr(FakeTensor, "numpy", array, raising=False)
        patch.setattr(torch.Tensor, "backward", lambda self: None)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        yield FakeGPU(allow_non_fake_inputs=True)  # pictures and constants begin as real ones, on the CPU


@pytest.fixture(autouse=True)
def fake(mode):
    with mode:
        yield


def fake_backbone(geometry: str, mode: FakeGPU) -> Backbone:
    with mode:
        backbone = Backbone("owner/name", "random", "bfloat16", GPU, geometry)
        for part in ("vae", "unet", "text_encoder", "image_encoder", "text_tower"):
            getattr(backbone, part)
    return backbone


@pytest.fixture(scope="module")
def sd2(mode) -> Backbone:
    return fake_backbone("sd2", mode)


@pytest.fixture(scope="module")
def sd1(mode) -> Backbone:
    return fake_backbone("sd1", mode)


def attached(task, monkeypatch: pytest.MonkeyPatch, **more):
    """A task on the GPU in its second step, as its trainer would have it."""
    monkeypatch.setattr(task, "log", lambda name, value, **options: value)
    task._trainer = SimpleNamespace(global_step=1, log_every_n_steps=1, is_global_zero=False, loggers=[], **more)
    return task.to(GPU)


def on_gpu(batch: dict) -> dict:
    return {name: value.to(GPU) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


@pytest.fixture
def composites(sd2):
    """Two pictures and two instances with their masks and holes, at the backbone's resolution."""
    rng, side = np.random.default_rng(0), sd2.resolution
    pictures, instances = (list(rng.integers(0, 256, (2, side, side, 3), dtype=np.uint8)) for _ in range(2))
    masks = [np.zeros((side, side), bool) for _ in range(2)]
    for mask in masks:
        mask[100:300, 150:400] = True
    return pictures, instances, masks, [dilate(mask, 16) for mask in masks]


def checked(pictures: list[np.ndarray], side: int) -> bool:
    return all(picture.shape == (side, side, 3) and picture.dtype == np.uint8 for picture in pictures)


# --- this file itself


def test_devices_do_not_mix(sd2):
    """Guards this file: a tensor that was left on the CPU is an error, and so is an array from the GPU."""
    with pytest.raises(RuntimeError, match="device"):
        sd2.latent(sd2.moments(torch.zeros(1, 3, 64, 64)))
    with pytest.raises(AssertionError, match="NumPy cannot read"):
        torch.zeros(2, device=GPU).numpy()
    with pytest.raises(TypeError):
        torch.zeros(2, dtype=torch.bfloat16).numpy()
    weight = sd2.unet.conv_in.weight
    assert weight.device.type == "cuda" and weight.dtype == torch.bfloat16
    assert weight.is_contiguous(memory_format=torch.channels_last)


# --- training


def test_one_controlnet_trains(sd2, monkeypatch):
    """Guards the step with a companion, the validation and the gradient checkpoints of true size."""
    task = ControlTask(sd2, "color")
    task.configure_model()
    task.companion = Branch("structure", move_module(from_unet(sd2.unet, sd2.factor).requires_grad_(False), GPU))
    attached(task, monkeypatch)
    task.on_fit_start()
    batch = on_gpu(make_batch(sd2, 2, ("color", "structure")))
    loss = task.training_step(batch, 0)
    assert loss.device.type == "cuda" and loss.dtype == torch.float32 and loss.requires_grad
    with torch.no_grad():
        task.validation_step(batch, 0)


def test_two_controlnets_train(sd2, monkeypatch):
    task = JointTask(sd2, ("color", "structure"), objective={"weighting": "x0", "inside": 1.0})
    task.configure_model()
    attached(task, monkeypatch)
    task.on_fit_start()
    batch = on_gpu(make_batch(sd2, 2, task.names))
    assert task.training_step(batch, 0).requires_grad
    with torch.no_grad():
        task.validation_step(batch, 0)


def test_paint_by_example_trains_and_paints(sd1, composites, monkeypatch):
    """Guards the step on the true architecture, and filling with and without guidance by what was trained."""
    backbone = sd1.with_unet(sd1.unet)
    task = ExemplarTask(backbone)
    task.configure_model()
    attached(task, monkeypatch)
    task.on_fit_start()
    batch = make_batch(backbone, 2, ()) | {"hint_exemplar": torch.rand(2, 3, 224, 224)}
    assert task.training_step(on_gpu(batch), 0).requires_grad
    with torch.no_grad():
        task.validation_step(on_gpu(batch), 0)
    task.eval().requires_grad_(False)
    shown = np.zeros((224, 224, 3), np.uint8)
    squares = [Composite(*item, exemplar=shown) for item in zip(*composites, strict=True)]
    for guidance in (1.0, 3.0):
        method = PaintByExample(task.painter, Settings(1, guidance))
        assert checked(method.fill(squares, SEEDS), backbone.resolution)


def test_a_word_is_learnt(sd2, monkeypatch):
    """Guards the step and the previews. Which pictures a batch has is read of it: here always the first."""
    task = TextualInversionTask(sd2, "<mug>", "car", vectors=2, steps=2)
    data = SimpleNamespace(captions=["a {} on snow", None], pictures=[np.zeros((512, 512, 3), np.uint8)] * 2)
    attached(task, monkeypatch, datamodule=data)
    monkeypatch.setattr(task, "is_read", lambda prompt: True)  # looks for a token among those of the prompt
    monkeypatch.setattr(task, "log_dict", lambda figures, **options: None)
    task.on_fit_start()
    batch = {
        name: value for name, value in make_batch(sd2, 2).items() if name in ("moments", "noise", "encode", "time")
    }
    batch |= {"picture": torch.tensor([0, 1]), "template": torch.rand(2)}
    assert task.training_step(on_gpu(batch), 0).requires_grad
    with torch.no_grad():
        task.validation_step(torch.arange(2, device=GPU), 0)


def test_the_judge_trains_and_judges(monkeypatch):
    task = attached(JudgeTask("resnet50"), monkeypatch)
    batch = {
        "image": torch.rand(2, 2, 3, 224, 224),
        "mask": torch.rand(2, 2, 1, 224, 224),
        "label": torch.ones(2, 2).long(),
    }
    assert task.training_step(on_gpu(batch), 0).requires_grad
    task.on_validation_epoch_start()
    task.validation_step(on_gpu(batch), 0)
    picture, mask = np.zeros((300, 300, 3), np.uint8), np.ones((300, 300), bool)
    assert Judge(task.net.requires_grad_(False), 224).score([picture], [mask]) == [0.0]


@pytest.mark.parametrize("part", ["vae", "clip", "captioner", "inpaint"])
def test_a_backbone_trains(part, sd2, tmp_path, monkeypatch):
    """Guards the steps of the four parts of model=small: forward, the averaged weights, and Muon's own update."""
    cfg = compose("fit", [f"experiment=backbone_small_{part}", f"module.backbone={tmp_path}"])
    (tmp_path / "unet").mkdir()  # any folder is a backbone's until its parts are asked for
    module = instantiate(cfg.module, _convert_="all")
    said = ["a red mushroom on snow", "a blue car on grass"] * 4
    module._trainer = SimpleNamespace(datamodule=SimpleNamespace(captions=lambda: said))
    if part == "inpaint":
        module.backbone = sd2
    module.setup()
    monkeypatch.setattr(module, "log_dict", lambda figures, **options: None)
    attached(module, monkeypatch)
    module.on_fit_start()
    batch = make_batch(sd2, 2, ()) if part == "inpaint" else {"image": torch.rand(2, 3, 256, 256), "caption": said[:2]}
    seeds = {"noise_seed": torch.tensor([0, 1])}  # a seed's value is read, which a tensor without values has not
    assert module.training_step(on_gpu(batch) | seeds, 0).requires_grad
    for p in module.net.parameters():
        p.grad = torch.empty_like(p)
    optimizer = module.optimizer_class
    if optimizer is Muon:
        optimizer([p for p in module.net.parameters() if p.ndim >= 2]).step()
    module.average.step(module.net.parameters())


# --- methods


def test_controlnets_fill(sd2, composites):
    """Guards two nets, with guidance and without; DDIM alone: the other solvers look for their step by its value."""
    nets = [move_module(from_unet(sd2.unet, sd2.factor).requires_grad_(False).to(sd2.dtype), GPU) for _ in range(2)]
    branches = [Branch("color", nets[0], 1.0, {"blur": 1.25}), Branch("structure", nets[1], 0.5, {})]
    squares = [Composite(*item) for item in zip(*composites, ["a mushroom", "a car"], strict=True)]
    for settings in (Settings(1, 1.0), Settings(3, 7.5, encoder_every=2, guided=0.5)):
        assert checked(Inpainting(sd2, branches, settings).fill(squares, SEEDS), sd2.resolution)


@pytest.mark.parametrize("detail", ["full", "none"])
def test_the_pipeline_of_an_export_fills(sd2, composites, detail):
    """Guards what diffusers runs, in mixed precision, with guidance."""
    nets = [move_module(from_unet(sd2.unet, sd2.factor).requires_grad_(False).to(sd2.dtype), GPU) for _ in range(2)]
    parts = {name: getattr(sd2, name) for name in PARTS}
    hints = {
        "controlnet": {"branch": "color", "parameters": {}},
        "structure": {"branch": "structure", "parameters": {}},
    }
    pipeline = HarmonyPipeline(*nets, **parts, hints=hints)
    pictures, _, masks, _ = composites
    settings = {"num_inference_steps": 2, "guidance_scale": 7.5, "detail": detail, "output_type": "np"}
    picture = pipeline("a mushroom", pictures[0], masks[0], controlnet_conditioning_scale=(1.0, 0.5), **settings)
    assert checked(picture.images, sd2.resolution)


@pytest.mark.parametrize(
    "parts", [Parts(steps=1, refine=1), Parts(steps=1, refine=0, edges=0.0, self_attention=False, detail=False)]
)
def test_a_prior_harmonizes(parts, sd2, composites):
    """Guards inversion, the words' refinement, null texts with edges, and copied attention."""
    pictures, _, masks, _ = composites
    words = [Description("a mushroom", "warm sunset light", "blue dusk light")] * 2
    assert checked(harmonize_once(sd2, pictures, masks, words, parts), sd2.resolution)


@pytest.mark.parametrize("target", ["a blue car on snow", "a very red car on snow"])
def test_prompts_edit(target, sd2, composites):
    """Guards inversion with a null text, both kinds of edit, their masks, and the maps that are drawn."""
    source = "a red car on snow"
    (inversion,) = invert_pictures(sd2, composites[0][:1], [source], steps=1, inner=1)
    assert checked(reconstruct(sd2, [inversion], [source], 7.5), sd2.resolution)
    mode = MODES["insert" if "very" in target else "replace"]
    with unset_fake_temporarily():  # what is done with the words reads its own values, on the CPU
        planned = plan_edit(sd2, source, target, mode)
    edited = edit_picture(sd2, inversion, planned, 7.5)
    assert checked(edited.pictures, sd2.resolution) and len(edited.masks) == len(edited.maps) == 2


# --- data and figures


def test_the_cache_leaves_the_gpu(sd2, composites):
    pictures, _, masks, holes = composites
    examples = [Example(*item, None) for item in zip(pictures, masks, holes, strict=True)]
    tensors = encode(examples, sd2, Recipe(hints={"color": {}, "structure": {}}))
    assert {x.device.type for x in tensors.values()} == {"cpu"} and tensors["moments"].dtype == torch.float16


def test_pictures_and_words_are_measured(sd1, composites):
    """Guards CLIP's towers: features, embeddings, and the words that are found for a composite."""
    pictures, _, masks, _ = composites
    features = extract(pictures, BackboneFeatures(sd1.image_encoder), 224)
    clip = clip_of(sd1)
    images = embeddings(pictures, clip)
    assert features.device.type == images.device.type == "cpu" and clip.texts(["a car"]).shape[1] == images.shape[1]
    scorer = WordScorer(clip, lambda composite, caption: "a car")
    assert len(scorer(pictures[0], masks[0])) == 2


def test_the_captioner_sees_and_speaks(sd2):
    """Guards the forward pass of BLIP large; its beams are chosen by their values."""
    from transformers import BlipConfig, BlipForConditionalGeneration

    vision = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    config = BlipConfig(vision_config=vision | {"image_size": 384}, text_config={"encoder_hidden_size": 1024})
    captioner = BlipForConditionalGeneration(config).eval().to(GPU)
    tokens = torch.ones(2, 5, dtype=torch.long, device=GPU)
    pixels = torch.rand(2, 3, 384, 384, device=GPU)
    with torch.no_grad():
        out = captioner(pixels, tokens, attention_mask=torch.ones_like(tokens))
    assert out.logits.device.type == "cuda" and out.logits.shape[:2] == (2, 5)
