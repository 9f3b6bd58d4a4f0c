"""The four trainings of a backbone, in small: what they write loads, the averaged weights are what is written, runs go
on.
"""

import lightning
import pytest
import torch

from harmony.cli.compose import compose
from harmony.data.captions import knows_photographs
from harmony.data.latent_data import LatentData
from harmony.data.pixel_data import PixelData
from harmony.models.backbone import Backbone, load_part, ship
from harmony.training.backbone import (
    CaptionerTask,
    CLIPTask,
    InpaintTask,
    VAETask,
    parse_kind_and_color,
    psnr,
    train_tokenizer,
    train_wordpiece,
)
from harmony.training.callbacks import AtomicCheckpoints

SIZE = 16
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "projection_dim": 16,
}
CLIP = {"projection_dim": 16, "text_config": TOWER, "vision_config": TOWER | {"image_size": SIZE, "patch_size": 8}}
BLIP = {
    "projection_dim": 16, "text_config": TOWER | {"encoder_hidden_size": 16},
    "vision_config": TOWER | {"image_size": SIZE, "patch_size": 8}, "photographs": False,
}  # fmt: skip
VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [8, 8], "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 1,
    "mid_block_add_attention": False, "sample_size": SIZE,
}  # fmt: skip
UNET = {
    "sample_size": SIZE // 2, "in_channels": 9, "out_channels": 4, "block_out_channels": [8, 16], "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "norm_num_groups": 4, "attention_head_dim": 2,
}  # fmt: skip


def fit(folder, task, data, steps, resume=None):
    torch.manual_seed(0)
    run = lightning.Trainer(
        accelerator="cpu", max_steps=steps, logger=False, default_root_dir=str(folder), plugins=[AtomicCheckpoints()],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
        num_sanity_val_steps=0, val_check_interval=1,
    )  # fmt: skip
    run.fit(task, data, ckpt_path=resume)
    task.export(folder / "export")
    return run


@pytest.fixture(scope="module")
def manifest(small_manifest, tmp_path_factory):
    return small_manifest(tmp_path_factory.mktemp("manifest"))


def pixels(manifest, **options):
    return PixelData(str(manifest), SIZE, batch_size=4, photos=0.0, share=(0.8, 1.0), **options)


@pytest.fixture(scope="module")
def backbone_folder(manifest, tmp_path_factory):
    """A backbone made by two steps of each training, in the order of the experiments."""
    folder = tmp_path_factory.mktemp("made") / "backbone"
    run = folder.parent / "run"
    measured = {}
    for task in (
        VAETask(str(folder), VAE, warmup=1),
        CLIPTask(str(folder), CLIP, vocabulary=400, length=16, warmup=1),
        CaptionerTask(str(folder), BLIP, vocabulary=200, length=16, warmup=1),
    ):
        measured |= fit(run, task, pixels(manifest), 2).callback_metrics
    data = LatentData(
        str(manifest), Backbone(str(folder)), str(folder.parent / "cache"), 4, None, hole="backbone", variants=2
    )
    data.prepare(say=lambda line: None)
    fit(run, InpaintTask(str(folder), UNET, warmup=1), data, 2)
    return folder, {name: float(value) for name, value in measured.items()}


def test_the_parts_make_a_backbone(backbone_folder):
    """Guards the hand-over from training to a backbone folder: every part loads, and the whole fills a hole."""
    from diffusers import StableDiffusionInpaintPipeline

    from harmony.sampling.guidance import Schedule, inpaint

    folder, _ = backbone_folder
    backbone = Backbone(str(folder))
    assert (backbone.factor, backbone.channels, backbone.resolution, backbone.prediction_type) == (
        2,
        4,
        SIZE,
        "v_prediction",
    )
    assert not list(folder.glob(".*.partial"))
    moments = backbone.moments(torch.zeros(1, 3, SIZE, SIZE))
    noise, text = torch.randn(1, 4, 8, 8), backbone.prompt(["a red mushroom"])
    z = inpaint(
        backbone, noise, torch.ones(1, 1, 8, 8), backbone.latent(moments), text, backbone.prompt([""]), Schedule(2, 2.0)
    )
    assert backbone.decode(z).shape == (1, 3, SIZE, SIZE) and torch.isfinite(z).all()
    assert backbone.text(backbone.tokens(["a"])).shape[-1] == 16 and backbone.image_encoder.config.image_size == SIZE
    assert backbone.captioner.generate(torch.zeros(1, 3, SIZE, SIZE), max_length=8).shape[0] == 1
    StableDiffusionInpaintPipeline.from_pretrained(str(folder), safety_checker=None, feature_extractor=None)


def test_a_captioner_says_whether_it_knows_photographs(backbone_folder, tmp_path):
    """Guards the shipped captioner's ``photographs: false``: the experiments train it, and it lasts to the export."""
    for name in ("backbone_captioner", "backbone_small_captioner"):
        assert compose("fit", [f"experiment={name}"]).module.config.photographs is False
    ship(backbone_folder[0], tmp_path)
    assert not knows_photographs(backbone_folder[0] / "captioner") and not knows_photographs(tmp_path / "captioner")


def test_figures_and_grids_are_there(backbone_folder):
    """Guards the measurements of each training on held-out pictures."""
    folder, measured = backbone_folder
    assert {"validation/psnr_renders", "validation/retrieval", "validation/kind_and_colour"} <= set(measured)
    assert 0 <= measured["validation/retrieval"] <= 1 and measured["validation/psnr_renders"] > 3
    grids = {path.name for path in (folder.parent / "run" / "grids").iterdir()}
    assert {"vae_000002.png", "clip_000002.png", "captions_000002.txt", "inpaint_000002.png"} <= grids


def test_the_scale_makes_latents_of_unit_deviation(backbone_folder, manifest):
    """Guards the VAE's scaling factor: it is that of the training pictures."""
    backbone, data = Backbone(str(backbone_folder[0])), pixels(manifest)
    data.setup()
    z = backbone.latent(backbone.moments(data.sample(200)))
    assert float(z.std()) == pytest.approx(1, abs=0.05)


def test_the_average_is_what_is_written(manifest, tmp_path):
    """Guards the EMA: measured and written are the averaged weights, trained on are the others."""
    task = VAETask(str(tmp_path / "backbone"), VAE, lr=1e-2, warmup=0, ema=0.9)
    seen = {}

    class Last(lightning.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            seen["trained"] = module.net.encoder.conv_in.weight.detach().clone()

    run = lightning.Trainer(
        accelerator="cpu", max_steps=3, logger=False, default_root_dir=str(tmp_path), callbacks=[Last()],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    run.fit(task, pixels(manifest))
    task.export(tmp_path / "export")
    written = load_part(str(tmp_path / "backbone"), "vae")
    shadow = dict(zip((n for n, _ in task.net.named_parameters()), task.average.shadow_params, strict=True))
    assert all(torch.equal(shadow[name], p) for name, p in written.named_parameters())
    assert not torch.equal(written.encoder.conv_in.weight, seen["trained"])


def test_a_stopped_training_goes_on(manifest, tmp_path):
    """Guards resumption: step, weights, optimizer and average come back; nothing is written before the end."""

    class Stop(lightning.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            if trainer.global_step == 2:
                trainer.save_checkpoint(tmp_path / "two.ckpt")
                raise InterruptedError

    first = VAETask(str(tmp_path / "backbone"), VAE, warmup=1)
    run = lightning.Trainer(
        accelerator="cpu", max_steps=4, logger=False, default_root_dir=str(tmp_path), callbacks=[Stop()],
        plugins=[AtomicCheckpoints()], enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    with pytest.raises(InterruptedError):
        run.fit(first, pixels(manifest))
    assert not (tmp_path / "backbone" / "vae").exists()
    second = VAETask(str(tmp_path / "backbone"), VAE, warmup=1)
    begun = []

    class Begin(lightning.Callback):
        def on_train_start(self, trainer, module):
            same = zip(module.net.parameters(), first.net.parameters(), strict=True)
            average = zip(module.average.shadow_params, first.average.shadow_params, strict=True)
            begun.append((trainer.global_step, all(torch.equal(a, b) for a, b in (*same, *average))))
            begun.append(len(trainer.optimizers[0].state))

    run = lightning.Trainer(
        accelerator="cpu", max_steps=4, logger=False, default_root_dir=str(tmp_path), callbacks=[Begin()],
        plugins=[AtomicCheckpoints()], enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    run.fit(second, pixels(manifest), ckpt_path=tmp_path / "two.ckpt")
    assert begun[0] == (2, True) and begun[1] > 0 and run.global_step == 4
    second.export(tmp_path / "export")
    assert (tmp_path / "backbone" / "vae" / "config.json").exists()


def test_small_helpers():
    """Guards psnr (rounded 0..255 values), the caption's words, and prompts of fixed length with the special tokens."""
    a, b = torch.full((2, 3, 4, 4), -1.0), torch.full((2, 3, 4, 4), -1 + 16 / 127.5)
    assert psnr(a, b).tolist() == pytest.approx([24.048] * 2, abs=1e-3)  # MSE 256, table 7.3
    assert parse_kind_and_color("a red mushroom on snow, warm sunset light") == ("red", "mushroom")
    tokenizer = train_tokenizer(["a red mushroom on snow"] * 4, 400, 12)
    ids = tokenizer(["a red mushroom", ""], padding="max_length", truncation=True).input_ids
    assert {len(i) for i in ids} == {12} and ids[0][0] == ids[1][0] == tokenizer.bos_token_id
    assert (
        ids[1][1] == tokenizer.eos_token_id
        and tokenizer.decode(ids[0], skip_special_tokens=True).strip() == "a red mushroom"
    )


def test_tokenizers_are_the_same_each_time():
    """Guards exact resume: a run that goes on trains its tokenizer anew; pairs that are equally frequent are no lot."""
    words = ["red", "blue", "mushroom", "car", "snow", "sand", "light", "warm", "pink", "neon", "tree"]
    texts = [f"a {a} {b} on {c}" for a, b, c in zip(words, words[3:] + words, words[5:] + words, strict=False)]
    for train in (lambda: train_tokenizer(texts, 330, 16), lambda: train_wordpiece(texts, 60)):
        tokens = [train()(texts).input_ids for _ in range(4)]
        assert all(ids == tokens[0] for ids in tokens[1:])
        assert len({i for ids in tokens[0] for i in ids}) > len(words), "whole words and letters"
