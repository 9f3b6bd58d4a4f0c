"""The judge of composites: what it sees, what its files hold, and evaluators without a network."""

import json

import numpy as np
import pytest
import torch

from harmony.core.errors import UserError
from harmony.models.judge import Judge, judge_hash, judge_net, load_evaluator, load_judge, save_judge, statistic

OPTIONS = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "stem_width": 8}


@pytest.fixture
def judge():
    torch.manual_seed(0)
    return Judge(judge_net("resnet18", OPTIONS).eval(), 32, 1.5)


@pytest.fixture
def picture():
    rng, mask = np.random.default_rng(0), np.zeros((40, 40), bool)
    mask[10:30, 12:28] = True
    return rng.integers(0, 255, (40, 40, 3), np.uint8), mask


def test_scores(judge, picture):
    """Guards the score: a probability, of picture and mask both, tempered, the same alone and in a batch."""
    image, mask = picture
    (score,) = judge.score([image], [mask])
    others = judge.score([image, 255 - image, image], [mask, mask, ~mask])
    assert 0 < score < 1 and others[0] == pytest.approx(score, abs=1e-5)
    assert abs(others[1] - score) > 1e-4 and abs(others[2] - score) > 1e-4
    cold = Judge(judge.net, 32, 1e-3).score([image], [mask])[0]
    assert min(cold, 1 - cold) < 1e-3 and (cold > 0.5) == (score > 0.5)


def test_files_bring_the_judge_back(judge, picture, tmp_path):
    """Guards the round trip: half precision on disk, the same scores, and its hash changes with its weights."""
    save_judge(judge, tmp_path / "run" / "export", arch="resnet18", options=OPTIONS)
    read = load_judge(tmp_path / "run")
    assert read.side == 32 and read.temperature == 1.5 and not any(p.requires_grad for p in read.net.parameters())
    image, mask = picture
    assert read.score([image], [mask]) == pytest.approx(judge.score([image], [mask]), abs=5e-3)
    assert load_evaluator(str(tmp_path / "run"))(image, mask) == read.score([image], [mask])[0]
    before = judge_hash(tmp_path / "run")
    with torch.no_grad():
        judge.net.fc.bias += 1
    save_judge(judge, tmp_path / "run" / "export", arch="resnet18", options=OPTIONS)
    assert judge_hash(tmp_path / "run") != before
    assert [file.name for file in sorted((tmp_path / "run" / "export").iterdir())] == [
        "judge.json",
        "judge.safetensors",
    ]


def test_what_is_refused(judge, tmp_path):
    """Guards foreign files: no judge, a damaged one, one of another shape, an architecture that nobody knows."""
    with pytest.raises(UserError, match="there is no judge .*nowhere: give a run of experiment=judge"):
        load_judge(tmp_path / "nowhere")
    with pytest.raises(UserError, match="arch=resnet_of_dreams: timm has no such model"):
        judge_net("resnet_of_dreams")
    folder = save_judge(judge, tmp_path / "judge", arch="resnet18", options=OPTIONS)
    facts = json.loads((folder / "judge.json").read_text())
    (folder / "judge.json").write_text(json.dumps(facts | {"options": {}}))
    with pytest.raises(UserError, match="judge.safetensors does not fit its configuration"):
        load_judge(folder)
    (folder / "judge.json").write_text(json.dumps(facts))
    (folder / "judge.safetensors").write_bytes((folder / "judge.safetensors").read_bytes()[:500])
    with pytest.raises(UserError, match="judge.safetensors cannot be read"):
        load_judge(folder)


def test_the_statistic(picture):
    """Guards the judge without a network: 1 for equal colors, a half at a distance of 20, less the further away."""
    _, mask = picture
    grey = np.full((40, 40, 3), 119, np.uint8)  # L = 50
    assert statistic(grey, mask) == pytest.approx(1, abs=1e-3)
    brighter = np.where(mask[..., None], np.uint8(171), grey)  # L = 70
    assert statistic(brighter, mask) == pytest.approx(0.5, abs=0.01)
    assert statistic(np.where(mask[..., None], np.uint8(255), grey), mask) < 0.4
    assert load_evaluator("statistic").score is statistic and load_evaluator(None) is None
    assert judge_hash(None) == "None" and judge_hash("statistic") == "statistic"
