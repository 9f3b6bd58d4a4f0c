"""What is shipped: it belongs together, is small enough, and does on few bundled pictures what its cards say."""

import json
from pathlib import Path

import pytest
import torch

from harmony.data.latents import Recipe, example
from harmony.data.pool import rows_of
from harmony.images import from_model, to_model
from harmony.metrics.fidelity import aggregate
from harmony.models.kit import ASSETS, Kit
from harmony.sampling.benchmark import Bench, by_hints, pasted, scores
from harmony.sampling.harmonize import Settings, load_branch

ROOT = Path(__file__).resolve().parents[1]
CONTROLNETS = ("color",)


@pytest.fixture(scope="module")
def kit() -> Kit:
    return Kit("tiny")


@pytest.fixture(scope="module")
def bench(kit) -> Bench:
    """Sixteen held-out renders, spread over the test split."""
    rows = rows_of(ROOT / "datasets" / "studio" / "test", "test", ROOT)
    rows = [row for row in rows if Path(row.image).parent.name == "data"]
    rows = rows[:: len(rows) // 16][:16]
    return Bench("test", [example(row, ROOT, Recipe(), kit.resolution) for row in rows], [row.caption for row in rows])


def megabytes(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


def test_it_is_small():
    """Guards every clone: weights stay in the history for ever."""
    assert megabytes(ASSETS / "tiny") < 25 and megabytes(ASSETS) < 45
    assert all(megabytes(ASSETS / name) < 6 for name in CONTROLNETS)


@pytest.mark.parametrize("name", CONTROLNETS)
def test_a_controlnet_is_of_this_kit(name, kit):
    """Guards against a kit that is replaced while the ControlNets stay: they were trained on the very same weights."""
    facts = json.loads((ASSETS / name / "controlnet" / "hint.json").read_text())
    assert facts["branch"] == name
    assert {part: facts[part] for part in ("vae", "unet")} == {part: kit.hash(part) for part in ("vae", "unet")}


def test_the_vae_keeps_renders(kit, bench):
    """The card says 33 dB on 192 renders."""
    x = torch.stack([to_model(image) for image in bench.truths()])
    with torch.no_grad():
        y = kit.decode(kit.latent(kit.moments(x)))
    decoded = [from_model(v) for v in y.float()]
    assert aggregate(scores(bench, decoded))["psnr"] > 31.5


def test_the_colour_controlnet_does_its_work(kit, bench):
    """The card says 55 % less colour difference on 96 renders; and nothing changes outside the holes."""
    found = {}
    for name, branches in {"off": [], "on": [load_branch("color", kit, {"color": 1.0})]}.items():
        made = by_hints(kit, branches, Settings(steps=20, guidance=1.0))(bench)
        found[name] = aggregate(scores(bench, pasted(bench, made)))
        assert found[name]["bg_drift"] == 0
    assert found["on"]["color_de"] < 0.6 * found["off"]["color_de"]
    assert found["on"]["fpsnr"] > found["off"]["fpsnr"] + 4
