"""Damaged weights of every network: one line that names the file and the tensor, whoever loads them."""

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from harmony.core.errors import UserError
from harmony.data.captions import load_captioner
from harmony.models.backbone import Backbone, load_part
from harmony.models.controlnet import load_controlnet
from harmony.models.judge import load_judge
from harmony.models.paint_by_example import load_painter, load_tower
from harmony.models.shipped import ASSETS
from harmony.models.textual_inversion import read_word
from harmony.models.weights import check_tensors

LOADERS = {  # the folder of the weights below what the loader is given -> how it loads them
    **{part: ("tiny", part, lambda f, p=part: load_part(f, p)) for part in ("vae", "unet", "image_encoder")},
    "text_encoder": ("tiny", "text_encoder", lambda f: load_part(f, "text_encoder")),
    "text_tower": ("tiny", "text_encoder", lambda f: load_part(f, "text_tower")),
    "captioner": ("tiny", "captioner", lambda f: load_part(f, "captioner")),
    "own captioner": ("tiny", "captioner", lambda f: load_captioner(f"{f}/captioner")),
    "ControlNet": ("color/controlnet", "", load_controlnet),
    "painter's UNet": ("paint_by_example/paint_by_example", "unet", lambda f: load_painter(f, Backbone("tiny"))),
    "painter's encoder": (
        "paint_by_example/paint_by_example",
        "image_encoder",
        lambda f: load_painter(f, Backbone("tiny")),
    ),
    "tower": ("tiny/image_encoder", "", load_tower),
    "judge": ("judge", "", load_judge),
}
HARMS = {
    "int8": lambda state, name: state | {name: state[name].to(torch.int8)},
    "NaN": lambda state, name: state | {name: torch.full_like(state[name], torch.nan)},
    "lacks": lambda state, name: {n: x for n, x in state.items() if n != name},
    "fit": lambda state, name: state | {name: torch.zeros(3, 5)},
}


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("loader", LOADERS)
def test_damaged_weights(loader, harm, tmp_path, capfd):
    """Guards every loader against weights of another kind, NaN, tensors that are missing, and other shapes."""
    asset, part, load = LOADERS[loader]
    folder = shutil.copytree(ASSETS / asset, tmp_path / "copy")
    load(str(folder))
    (file,) = (folder / part).glob("*.safetensors")
    state = load_file(file)
    name = next(n for n in state if n.endswith("norm1.weight") or n.endswith("conv_in.weight") or n == "conv1.weight")
    save_file(HARMS[harm]({n: x.clone() for n, x in state.items()}, name), file, {"format": "pt"})
    capfd.readouterr()
    with pytest.raises(UserError) as error:
        load(str(folder))
    line, short = str(error.value), re.sub("^((text_|vision_)?model[.])+", "", name)
    said = {"int8": "is int8, give", "NaN": "holds NaN", "lacks": "lacks the|is none, exp", "fit": "is 3x5, expected"}
    assert file.name in line and short in line and "\n" not in line and re.search(said[harm], line)
    assert capfd.readouterr().err == "", "the line is all that is said"


@pytest.mark.parametrize("vectors", [torch.ones(1, 8, dtype=torch.int8), torch.full((1, 8), torch.inf)])
def test_damaged_words(vectors, tmp_path):
    """Guards learned words, which have no architecture that they could be compared with."""
    save_file({"<mug>": vectors}, tmp_path / "learned_embeds.safetensors")
    with pytest.raises(UserError, match="learned_embeds.safetensors: tensor <mug> (is int8|holds NaN or infinite)"):
        read_word(tmp_path / "learned_embeds.safetensors")


def test_what_networks_may_hold():
    """Guards against false alarms: counters, half precision whose sum would overflow, nothing at all."""
    fine = {"norm.num_batches_tracked": torch.tensor(3), "a": torch.full((9999,), 6e4).half(), "b": torch.zeros(0, 3)}
    check_tensors(fine, "file")


@pytest.mark.parametrize(
    "facts", [{"temperature": 0}, {"temperature": float("nan")}, {"temperature": "1"}, {"side": 0}, {"side": 1.5},
              {"arch": 5}, {"arch": None}, {"options": 3}, {"options": {"depths": 3}}],
)  # fmt: skip
def test_facts_of_no_judge(facts, tmp_path):
    """Guards judge.json: a temperature of 0 would divide by it, a side of 0 leaves no picture."""
    folder = shutil.copytree(ASSETS / "judge", tmp_path / "judge")
    content = json.loads((folder / "judge.json").read_text())
    (folder / "judge.json").write_text(json.dumps(content | facts))
    with pytest.raises(UserError, match="judge.json|arch=") as error:
        load_judge(folder)
    assert "\n" not in str(error.value)


def test_threads_load_one_after_the_other():
    """Guards transformers' tied weights: what loads in two threads at once takes them from all later networks."""
    tie_weights = PreTrainedModel.tie_weights
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda _: load_part(str(ASSETS / "tiny"), "captioner"), range(8)))
    assert len(parts) == 8 and PreTrainedModel.tie_weights is tie_weights
