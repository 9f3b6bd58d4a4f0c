"""What Paint by Example (Yang 2022) trains, what stays frozen, how exemplars are dropped, and going on."""

import copy

import lightning
import numpy as np
import pytest
import torch
from hydra.utils import instantiate

from harmony.cli.compose import compose
from harmony.core.errors import UserError
from harmony.data.latent_cache import encode, example
from harmony.data.latent_data import LatentData
from harmony.data.manifest import read_manifest
from harmony.evaluation.eval_sets import load_reconstruct, paste_outputs
from harmony.methods.paint_by_example import PaintByExample
from harmony.models.backbone import Backbone
from harmony.models.paint_by_example import Painter, join_condition
from harmony.sampling.guidance import Settings
from harmony.training.paint_by_example import ExemplarTask


@pytest.fixture
def backbone(random_backbone):
    return Backbone(str(random_backbone))


@pytest.fixture
def data(latent_data):
    recipe = {"branch": "exemplar", "hints": {"exemplar": {"size": 32}}, "crop": "extended", "hole": "shape"}
    return latent_data(batch_size=4, variants=1, augment=True, **recipe)


def fresh(backbone: Backbone, **options) -> ExemplarTask:
    torch.manual_seed(0)
    task = ExemplarTask(backbone, **{"lr": 1e-3, "warmup": 0} | options)
    task.configure_model()
    task.on_fit_start()
    return task


def batch_of(data, first: int = 0, count: int = 4) -> dict:
    data.setup()
    return torch.utils.data.default_collate([data.sets["train"][first + i, i] for i in range(count)])


def trainer(folder, steps: int, **options) -> lightning.Trainer:
    return lightning.Trainer(
        accelerator="cpu", max_steps=steps, logger=False, default_root_dir=str(folder), enable_progress_bar=False,
        enable_model_summary=False, log_every_n_steps=1, use_distributed_sampler=False, num_sanity_val_steps=0,
        limit_val_batches=0, **{"enable_checkpointing": False} | options,
    )  # fmt: skip


def grads(task: ExemplarTask, batch: dict) -> dict[str, torch.Tensor]:
    task.zero_grad()
    task.compute_loss(batch, task.encode_exemplars(batch)).backward()
    return {name: p.grad for name, p in task.named_parameters() if p.grad is not None and p.grad.any()}


def test_gradients_reach_what_is_trained_and_nothing_else(backbone, data):
    """Guards the gradients: all nine slices of conv_in, the mapper's v, final norm, projection; never tower or VAE."""
    task = fresh(backbone, dropout=0.5)
    batch = batch_of(data)
    batch["drop"] = torch.tensor([0.1, 0.9, 0.2, 0.8])
    found = grads(task, batch)
    assert found["unet.conv_in.weight"].abs().sum((0, 2, 3)).min() > 0
    wanted = ("final_layer_norm.weight", "proj_out.weight", "uncond_vector", "mapper.blocks.0.attn1.to_v.weight")
    assert all(f"encoder.{name}" in found for name in wanted)
    assert not any(name.startswith("encoder.model.") for name in found)
    assert not any(
        p.grad is not None for part in ("vae", "image_encoder", "unet") for p in getattr(backbone, part).parameters()
    )


def test_frozen_parts_do_not_move(backbone, data, tmp_path):
    """Guards real steps: tower, VAE and the backbone's own UNet stay bit for bit, the rest learns."""
    task = fresh(backbone)
    before = copy.deepcopy(task.state_dict())
    frozen = {part: copy.deepcopy(getattr(backbone, part).state_dict()) for part in ("vae", "unet", "image_encoder")}
    trainer(tmp_path, 3).fit(task, data)
    after = task.state_dict()
    tower = {name for name in after if name.startswith("encoder.model.")}
    assert tower and all(torch.equal(after[n], before[n]) for n in tower)
    assert all(torch.equal(v, frozen[p][n]) for p in frozen for n, v in getattr(backbone, p).state_dict().items())
    moved = {n for n in after if not torch.equal(after[n], before[n])}
    assert {"unet.conv_in.weight", "unet.conv_out.weight", "encoder.proj_out.weight"} <= moved


def test_dropout(backbone, data):
    """Guards the rate: never, always, and the share in between, a sample each or a batch at once."""
    batch = batch_of(data)
    found = grads(fresh(backbone, dropout=0.0), batch)
    assert "encoder.uncond_vector" not in found and "encoder.proj_out.weight" in found
    found = grads(fresh(backbone, dropout=1.0), batch)
    assert "encoder.uncond_vector" in found and not any(n.startswith("encoder.mapper") for n in found)
    data.setup()
    draws = torch.tensor([float(data.sets["train"][i, 0]["drop"]) for i in range(1000)])
    assert 160 < (draws < 0.2).sum() < 240
    batch["drop"] = torch.tensor([0.1, 0.9, 0.9, 0.9])
    for by, count in (("sample", 1), ("batch", 4)):
        task = fresh(backbone, dropout_by=by)
        same = (task.encode_exemplars(batch) == task.encoder.uncond_vector).all((1, 2))
        assert int(same.sum()) == count
    with pytest.raises(UserError, match="choose sample or batch"):
        ExemplarTask(backbone, dropout_by="epoch")


def test_stopped_it_goes_on_exactly(backbone, data, tmp_path):
    """Guards resume: two steps, then two more from the checkpoint, are four; the tower is not in the file."""
    options = {"enable_checkpointing": True}
    whole = fresh(backbone)
    trainer(tmp_path / "whole", 4).fit(whole, data)
    first = trainer(tmp_path / "first", 2, **options)
    first.fit(fresh(backbone), data)
    file = tmp_path / "last.ckpt"
    first.save_checkpoint(file)
    saved = torch.load(file, weights_only=True)
    assert saved["state_dict"] and not any("encoder.model." in name for name in saved["state_dict"])
    assert not any("vae" in name for name in saved["state_dict"])
    again = fresh(backbone)
    trainer(tmp_path / "second", 4, **options).fit(again, data, ckpt_path=str(file))
    assert all(torch.equal(v, whole.state_dict()[n]) for n, v in again.state_dict().items())
    saved["backbone"]["tower"] = "another"
    torch.save(saved, file)
    with pytest.raises(UserError, match="another state of backbone"):
        trainer(tmp_path / "third", 4, **options).fit(fresh(backbone), data, ckpt_path=str(file))


def test_exemplars_must_have_the_towers_side(backbone, latent_data):
    """Guards the run: refused before hours of caching, by the option to set."""
    task = ExemplarTask(backbone)
    task.check(latent_data(hints={"exemplar": {"size": backbone.image_encoder.config.image_size}}, branch="exemplar"))
    with pytest.raises(UserError, match="data.hints.exemplar.size=16, but the CLIP tower takes 32 px"):
        task.check(latent_data(hints={"exemplar": {"size": 16}}, branch="exemplar"))
    with pytest.raises(UserError, match="module.tower=nowhere/at-all"):
        ExemplarTask(backbone, tower="nowhere/at-all").tower  # noqa: B018


def test_a_tower_of_its_own(backbone, tmp_path):
    """Guards backbones without one: any CLIP vision tower in a folder sees the exemplars, and none is kept twice."""
    backbone.image_encoder.save_pretrained(tmp_path)
    own, theirs = fresh(backbone, tower=str(tmp_path)), fresh(backbone)
    same = own.encoder.model.state_dict()
    assert all(torch.equal(v, same[n]) for n, v in theirs.encoder.model.state_dict().items())
    assert "tower" not in vars(own) and not any(name.startswith("tower") for name in own.state_dict())


def test_exemplars_are_augmented_in_training_alone(data):
    """Guards the augmentation: at another position an item looks different; not in validation or with augment=False."""
    data.setup()
    train = data.sets["train"]
    views = torch.stack([train[position, 0]["hint_exemplar"] for position in range(12)])
    assert (views != views[0]).flatten(1).any(1).sum() >= 6 and views.min() >= 0 and views.max() <= 1
    assert torch.equal(train[3, 0]["hint_exemplar"], views[3]), "a position always gives the same view"
    still = data.sets["validation"]
    assert torch.equal(still[0, 0]["hint_exemplar"], still[9, 0]["hint_exemplar"])


@pytest.mark.slow
def test_it_runs_at_true_size(small_manifest, tmp_path):
    """Guards the paths at the size of Stable Diffusion 1.4 and CLIP ViT-L/14, with random weights: a gradient for every
    trained part, two steps of sampling, no pixel changed outside the hole. About 12 GB and some minutes on a CPU.
    """
    backbone = instantiate(compose("fit", ["experiment=paint_by_example", "model=sd1", "model.weights=random"]).model)
    data = LatentData(
        str(small_manifest(tmp_path)), backbone, str(tmp_path / "cache"), 1, "exemplar", {"exemplar": {"size": 224}},
        crop="extended", hole="shape", variants=1, augment=True,
    )  # fmt: skip
    task = ExemplarTask(backbone, dropout=0.0)
    task.check(data)
    task.configure_model()
    rows = read_manifest(data.manifest, "train")[1][:1]
    item = encode([example(rows[0], data.manifest.parent, data.recipes["train"], 512)], backbone, data.recipes["train"])
    z, masked = (item[name].float().chunk(2, 1)[0] for name in ("moments", "masked_moments"))
    context = task.encoder(item["hint_exemplar"] / 255)
    hole = item["hole"].float()
    u = torch.cat([torch.randn_like(z), join_condition(hole, masked)], 1)
    made = task.unet(u, torch.tensor([500]), context, return_dict=False)[0]
    made.square().mean().backward()
    assert made.shape == (1, 4, 64, 64) and context.shape == (1, 1, 768)
    trained = [*task.unet.parameters(), *task.encoder.trainable_parameters()]
    assert sum(p.numel() for p in trained) == 923_306_500
    assert task.unet.conv_in.weight.grad is not None and task.encoder.proj_out.weight.grad.any()
    assert all(p.grad is None for p in task.encoder.model.parameters())
    task.zero_grad(set_to_none=True)
    items = load_reconstruct(data.manifest, "test", 512, 1)
    painter = Painter(backbone.with_unet(task.unet), task.encoder)
    raw = PaintByExample(painter, Settings(2, 5.0)).fill(items.composites, [(0, 0)])
    (kept,) = paste_outputs(items, raw)
    hole = items.composites[0].hole
    assert np.array_equal(kept[~hole], items.truths[0][~hole]) and raw[0].shape == (512, 512, 3)
