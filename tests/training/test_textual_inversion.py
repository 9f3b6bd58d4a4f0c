"""What textual inversion (Gal 2022) trains, what stays, what it leaves, and going on."""

import json
import shutil
from types import SimpleNamespace

import lightning
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback

from harmony.core.errors import UserError
from harmony.data.picture_data import PicturesData
from harmony.models.backbone import Backbone
from harmony.models.textual_inversion import learn, read_word
from harmony.pixels.images import write_image
from harmony.training.textual_inversion import TEMPLATES, TextualInversionTask

FROZEN = ("text_encoder", "unet", "vae", "text_tower", "image_encoder")
PLAIN = ["a red mushroom on snow", "a blue car on grass, warm sunset light", ""]  # prompts without the word


@pytest.fixture
def backbone(random_backbone):
    """One of its own for each test: its tokenizer learns the word."""
    return Backbone(str(random_backbone))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Three pictures, one of which has a caption."""
    folder, rng = tmp_path_factory.mktemp("concept"), np.random.default_rng(0)
    for n in range(3):
        write_image(folder / f"{n}.png", rng.integers(0, 255, (32, 40, 3), np.uint8))
    (folder / "captions.json").write_text(json.dumps({"1": "a {} on snow"}))
    return folder


def data_of(folder, backbone: Backbone, **options) -> PicturesData:
    return PicturesData(str(folder), backbone, **{"batch_size": 2, "previews": 2} | options)


def fresh(backbone: Backbone, **options) -> TextualInversionTask:
    return TextualInversionTask(backbone, **{"token": "<mug>", "init": "mushroom", "lr": 1e-2, "steps": 2} | options)


def trainer(folder, steps: int, **options) -> lightning.Trainer:
    return lightning.Trainer(
        accelerator="cpu", max_steps=steps, logger=False, default_root_dir=str(folder), enable_progress_bar=False,
        enable_model_summary=False, log_every_n_steps=1, use_distributed_sampler=False, num_sanity_val_steps=0,
        **{"enable_checkpointing": False, "limit_val_batches": 0} | options,
    )  # fmt: skip


def frozen(backbone: Backbone) -> dict[str, bytes]:
    """Every tensor of the backbone's networks."""
    parts = {part: getattr(backbone, part).state_dict() for part in FROZEN}
    return {f"{part}.{name}": v.numpy().tobytes() for part, state in parts.items() for name, v in state.items()}


class Watch(Callback):
    """The vectors have a gradient, every one, and no frozen parameter ever has."""

    def on_after_backward(self, trainer, module):
        assert module.vectors.grad.abs().sum(1).min() > 0
        assert all(p.grad is None for part in FROZEN for p in getattr(module.backbone, part).parameters())


def test_only_the_vectors_change(backbone, pictures, tmp_path):
    """Guards what is trained: after k steps, with weight decay too, every other tensor is byte-equal, and checkpoints
    hold the vectors alone.
    """
    before, task = frozen(backbone), fresh(backbone, weight_decay=0.5, vectors=2)
    start = task.vectors.detach().clone()
    options = {"limit_val_batches": 1, "val_check_interval": 3, "check_val_every_n_epoch": None}
    run = trainer(tmp_path, 3, callbacks=[Watch()], **options)
    run.fit(task, data_of(pictures, backbone))
    assert run.global_step == 3 and frozen(backbone) == before
    assert (task.vectors - start).abs().amax(1).min() > 1e-3
    assert not any(module.training for part in FROZEN for module in getattr(backbone, part).modules())
    rows = backbone.text_encoder.get_input_embeddings().weight
    assert len(rows) == task.first_token, "the table has no row of the word"
    run.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == {"vectors"} and torch.equal(saved["state_dict"]["vectors"], task.vectors)
    assert [len(group["params"]) for group in saved["optimizer_states"][0]["param_groups"]] == [1]


def test_the_word_begins_as_init_and_moves_no_other(backbone, random_backbone, pictures, tmp_path):
    """Guards beginning and end: before training it means what ``init`` means; after it, the export gives another
    backbone the text states of the training, and prompts without the word are as they were.
    """
    rows = backbone.text_encoder.get_input_embeddings().weight
    plain, as_init = backbone.prompt(PLAIN), backbone.prompt(["a red mushroom on snow"])
    task = fresh(backbone)
    assert torch.equal(task.vectors.detach(), rows[backbone.encode("mushroom")])
    assert torch.equal(task.encode_prompts(["a red {} on snow"]).detach(), as_init)
    assert torch.equal(backbone.prompt(PLAIN), plain)
    trainer(tmp_path, 3).fit(task, data_of(pictures, backbone))
    trained = task.encode_prompts(["a red {} on snow"]).detach()
    assert not torch.allclose(trained, as_init, atol=1e-3) and torch.equal(backbone.prompt(PLAIN), plain)
    task.export(tmp_path / "export")
    other = learn(Backbone(str(random_backbone)), read_word(tmp_path))
    assert torch.equal(other.prompt(["a red <mug> on snow"]), trained) and torch.equal(other.prompt(PLAIN), plain)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_is_that_of_gal_2022(backbone, random_backbone, pictures, monkeypatch, tmp_path, prediction):
    """Guards eq. 2: squared error over the whole latent, all being hole, with a caption or a template that holds the
    word, drawn with the step.
    """
    backbone.scheduler.register_to_config(prediction_type=prediction)
    task, data = fresh(backbone, vectors=2), data_of(pictures, backbone)
    data.setup()
    task.trainer = SimpleNamespace(datamodule=data)
    monkeypatch.setattr(task, "log", lambda *args, **options: None)
    task.on_fit_start()
    with torch.no_grad():
        task.vectors += torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    task.export(tmp_path)
    batch = torch.utils.data.default_collate([data.views[7 + n, n] for n in range(3)])
    batch["template"] = torch.tensor([0.999, 0.5, 0.0])
    loss = task.training_step(batch, 0)
    last = task.prompts[0][-1].format("<mug>")  # of those that are short enough for this backbone
    prompts = [last, "a <mug> on snow", TEMPLATES["object"][0].format("<mug>")]
    ours = learn(Backbone(str(random_backbone)), read_word(tmp_path))
    t = (batch["time"] * 1000).long()
    a = backbone.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    clean = ours.latent(batch["moments"], batch["encode"])
    grey = ours.latent(ours.moments(torch.zeros(1, 3, 32, 32))).expand(3, -1, -1, -1)
    z = torch.cat([a.sqrt() * clean + (1 - a).sqrt() * batch["noise"], torch.ones(3, 1, 8, 8), grey], 1)
    wanted = batch["noise"] if prediction == "epsilon" else a.sqrt() * batch["noise"] - (1 - a).sqrt() * clean
    with torch.no_grad():
        found = ours.unet(z, t, ours.prompt(prompts)).sample
    torch.testing.assert_close(loss.detach(), F.mse_loss(found, wanted))


def test_stopped_it_goes_on_exactly(random_backbone, pictures, tmp_path):
    """Guards resume: two steps, then two more from the checkpoint, are four; never with other pictures."""

    def trained(name: str, steps: int, folder=pictures, **options):
        backbone = Backbone(str(random_backbone))
        task, run = fresh(backbone), trainer(tmp_path / name, steps, accumulate_grad_batches=2)
        run.fit(task, data_of(folder, backbone), **options)
        return task.vectors.detach(), run

    whole, _ = trained("whole", 4)
    half, run = trained("half", 2)
    file = str(tmp_path / "last.ckpt")
    run.save_checkpoint(file)
    again, run = trained("again", 4, ckpt_path=file)
    assert run.global_step == 4 and torch.equal(again, whole) and not torch.allclose(half, whole, atol=1e-3)
    other = tmp_path / "other"
    other.mkdir()
    for path in pictures.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    write_image(other / "2.png", np.zeros((32, 32, 3), np.uint8))
    with pytest.raises(UserError, match="began with other pictures"):
        trained("changed", 4, folder=other, ckpt_path=file)
    (other / "2.png").unlink()
    with pytest.raises(UserError, match="began with other pictures"):
        trained("fewer", 4, folder=other, ckpt_path=file)


def test_the_learning_rate_grows_with_what_a_step_sees(backbone, pictures, tmp_path):
    """Guards the rate: lr times batch, accumulation, processes; the decay that was asked for, on the vectors alone."""
    task = fresh(backbone, lr=1e-3, weight_decay=0.25)
    run = trainer(tmp_path, 1, accumulate_grad_batches=2)
    run.fit(task, data_of(pictures, backbone, batch_size=3))
    (group,) = run.optimizers[0].param_groups
    assert isinstance(run.optimizers[0], torch.optim.AdamW)
    assert group["lr"] == pytest.approx(6e-3) and group["weight_decay"] == 0.25
    assert [id(p) for p in group["params"]] == [id(task.vectors)]
    task.trainer = SimpleNamespace(datamodule=run.datamodule, accumulate_grad_batches=2, world_size=4)
    assert task.configure_optimizers().param_groups[0]["lr"] == pytest.approx(24e-3)


def test_previews_compare_the_word_with_init(backbone, pictures, tmp_path):
    """Guards the figures: untrained they are those of ``init``, from the same noise; afterwards the baseline stays."""
    task, data, run = fresh(backbone), data_of(pictures, backbone), trainer(tmp_path, 3, limit_val_batches=1)
    first = run.validate(task, data, verbose=False)[0]
    for name in ("concept/clip_i", "concept/clip_t"):
        assert first[name] == pytest.approx(first[f"baseline/{name}"], abs=1e-4) and -100 <= first[name] <= 100
    with torch.no_grad():
        task.vectors.normal_(0, 3)
    second = run.validate(task, data, verbose=False)[0]
    for name in ("concept/clip_i", "concept/clip_t"):
        assert second[f"baseline/{name}"] == first[f"baseline/{name}"] and second[name] != first[name]
    assert [path.name for path in (tmp_path / "grids").iterdir()] == ["samples_000000.png"]


def test_a_backbone_without_clip_draws_previews_alone(backbone, pictures, monkeypatch, tmp_path, capsys):
    """Guards backbones without an image tower: nothing is measured, the pictures are there."""
    monkeypatch.setattr("harmony.training.textual_inversion.clip_of", lambda backbone: None)
    assert trainer(tmp_path, 1, limit_val_batches=1).validate(
        fresh(backbone), data_of(pictures, backbone), verbose=False
    ) == [{}]
    assert (tmp_path / "grids" / "samples_000000.png").exists() and "previews drawn" in capsys.readouterr().out


def test_templates_have_one_place_for_the_word():
    """Guards the prompts: neutral phrases of both kinds, each once."""
    for property, least in (("object", 27), ("style", 19)):
        phrases = TEMPLATES[property]
        assert len(set(phrases)) == len(phrases) >= least and all(text.count("{}") == 1 for text in phrases)
    assert all("style of {}" in text for text in TEMPLATES["style"])


def test_a_word_that_is_cut_off_is_refused(backbone, pictures, tmp_path):
    """Guards against a picture that teaches nothing: its caption ends, for this backbone, before the word."""
    folder = shutil.copytree(pictures, tmp_path / "pictures")
    (folder / "captions.json").write_text('{"0": "a red mushroom on snow, a red mushroom on snow, and a {}"}')
    with pytest.raises(UserError, match="captions.json: 'a red.*is cut off before the word"):
        fresh(backbone).check(data_of(folder, backbone))


def test_what_cannot_be_learnt_is_refused(backbone):
    """Guards bad input, before anything is encoded."""
    for wrong, message in (
        ({"property": "mood"}, "property=mood: choose one of object, style"),
        ({"vectors": 0}, "vectors=0"),
        ({"init": "red mushroom"}, "init='red mushroom' is 2 tokens"),
        ({"token": "car"}, "token=car: give one word in angle brackets"),
        ({"token": "<|endoftext|>"}, "knows this word already"),
    ):
        with pytest.raises(UserError, match=message):
            fresh(backbone, **wrong)
