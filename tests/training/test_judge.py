"""Training the judge: pairs that differ in the light alone, figures with known answers, and what a run leaves."""

import math

import lightning
import numpy as np
import pytest
import torch

from harmony.core.errors import UserError
from harmony.data.judge_data import MIN_DIFFERENCE, Composites, JudgeData, change_light_visibly
from harmony.evaluation.judges import JudgeStudy
from harmony.evaluation.study import StudyRun
from harmony.metrics.classification import calibration_error, classification_metrics
from harmony.models.backbone import Backbone
from harmony.models.judge import load_judge
from harmony.training.judge import JudgeTask, calibrate

OPTIONS = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "stem_width": 8}


@pytest.fixture(scope="module")
def manifest(small_manifest, tmp_path_factory):
    return small_manifest(tmp_path_factory.mktemp("judge"))


def test_a_pair_differs_in_the_light_of_its_object_alone(manifest):
    """Guards the labels: outside the mask both are one picture, inside they differ; the same again by its position."""
    composites = Composites(manifest, "train", 32, "jitter", seed=0)
    for position in range(24):
        item = composites[position, position % len(composites)]
        relit, taken = item["image"]
        inside = item["mask"][0, 0] > 0
        assert item["image"].shape == (2, 3, 32, 32) and item["label"].tolist() == [0, 1]
        assert torch.equal(relit[:, ~inside], taken[:, ~inside]) and not torch.equal(relit, taken)
        again = composites[position, position % len(composites)]
        assert torch.equal(item["image"], again["image"])
    first, second = (composites[position, 0]["image"] for position in (0, 100))
    assert not torch.equal(first, second)


def test_another_light_can_be_seen():
    """Guards the labels again: a light that changes nothing is no negative."""
    rng, image = np.random.default_rng(0), np.full((16, 16, 3), 120, np.uint8)
    mask = np.zeros((16, 16), bool)
    mask[4:12, 4:12] = True
    for _ in range(50):
        lit = change_light_visibly(image, mask, rng)
        assert np.abs(lit[mask].astype(float) - image[mask]).mean() >= MIN_DIFFERENCE


def test_photographs_are_repeated_to_their_share(manifest):
    """Guards ``photos``: by repetition the pictures without a second light reach it, and none is lost."""
    composites = Composites(manifest, "train", 16, "center", seed=0)
    assert composites.order == list(range(12))
    few = Composites.__new__(Composites)
    few.has_relit = [True] * 9 + [False] * 3
    few.order = few.repeat(0.5)
    shares = [few.has_relit[i] for i in few.order]
    assert shares.count(True) == 9 == shares.count(False) and set(few.order) == set(range(12))
    with pytest.raises(UserError, match="data.photos=1: give a share"):
        few.repeat(1)


def test_figures_with_known_answers():
    """Guards auc, accuracy, ece and temperature: by hand, and on logits that are too sure by a factor of 3."""
    natural, labels = np.array([0.9, 0.8, 0.3, 0.1]), np.array([1.0, 0, 1, 0])
    found = classification_metrics(natural, labels)
    assert found["auc"] == pytest.approx(0.75) and found["accuracy"] == pytest.approx(0.5)
    assert calibration_error(np.full(4, 0.75), np.array([1, 1, 1, 0])) == pytest.approx(0)
    assert calibration_error(np.full(4, 0.95), np.array([1, 1, 0, 0])) == pytest.approx(0.45)
    assert calibration_error(np.array([0.1, 1.0]), np.array([1, 1])) == pytest.approx(0.45)
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(20_000, 2, generator=rng)
    drawn = torch.bernoulli(logits.softmax(1)[:, 1], generator=rng).long()
    assert calibrate(3 * logits, drawn) == pytest.approx(3, rel=0.05)


def test_it_learns_to_tell_and_leaves_a_calibrated_judge(manifest, tmp_path):
    """Guards the whole: the loss falls on pairs that are easy to tell, and the export scores as the network does."""
    torch.manual_seed(0)
    data = JudgeData(str(manifest), side=16, batch_size=4)
    task = JudgeTask("resnet18", OPTIONS, lr=3e-3, warmup=1, decay=True)
    trainer = lightning.Trainer(
        max_steps=12, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, val_check_interval=12, check_val_every_n_epoch=None, default_root_dir=str(tmp_path),
        use_distributed_sampler=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(task, data)
    figures = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert {"validation/auc", "test/auc", "test/ece", "test/accuracy"} <= set(figures)
    assert all(0 <= figures[f"test/{name}"] <= 1 for name in ("auc", "ece", "accuracy"))
    assert list((tmp_path / "grids").iterdir())
    task.eval()
    task.export(tmp_path / "export")
    judge = load_judge(tmp_path)
    assert judge.side == 16 and math.isfinite(judge.temperature) and judge.temperature > 0
    pair = data.sets["test"][0, 0]
    with torch.no_grad():
        expected = (task.compute_logits({k: v[None] for k, v in pair.items()}) / judge.temperature).softmax(1)[:, 1]
    image, mask = (np.rint((pair["image"].numpy() + 1) * 127.5).astype(np.uint8), pair["mask"][0, 0].numpy() > 0)
    scores = judge.score([x.transpose(1, 2, 0) for x in image], [mask, mask])
    assert scores == pytest.approx(expected.tolist(), abs=0.02)


def test_the_bench_of_judges(manifest, random_backbone, tmp_path):
    """Guards the table: one row an evaluator, each pair counted once; what is not given is said."""
    run = StudyRun("judge_bench", tmp_path, prepare=lambda: manifest, load=lambda: Backbone(str(random_backbone)))
    report = JudgeStudy(run, {"statistic": "statistic", "judge": None}).measure()
    assert report.facts["count"] == 5 and set(report.figures) == {
        f"statistic/test/{n}" for n in ("auc", "accuracy", "ece")
    }
    assert "n = 5 test pairs" in report.text and "judge: left out, give study.evaluators.judge=RUN" in report.text
    assert (tmp_path / "table.csv").read_text().startswith("method,test/auc") and report.pictures[0].exists()
