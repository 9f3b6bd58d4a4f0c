"""Training Paint by Example (Yang 2022) on a backbone: the whole UNet and the exemplar encoder."""

from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F

from harmony.core.errors import UserError
from harmony.data.latent_data import LatentData
from harmony.methods.paint_by_example import PaintByExample
from harmony.models.backbone import Backbone, weights_hash
from harmony.models.paint_by_example import (
    ExemplarEncoder,
    Painter,
    build_encoder,
    build_painting_unet,
    export_painter,
    join_condition,
    load_tower,
)
from harmony.pixels.hints import check_hint
from harmony.sampling.guidance import Settings
from harmony.training.objective import noised, target
from harmony.training.schedule import adamw, lay_out, place_moments, warm_up
from harmony.training.task import Task, refuse_other_weights


class ExemplarTask(Task):
    """Paint the object back into its own photograph, seeing it through the bottleneck of one token.

    Trained in float32: UNet (from the backbone's inpainting UNet), mapper, final layer norm, projection, and the vector
    that stands for no exemplar. Frozen and absent from checkpoints: VAE and CLIP's tower. Loss: mean
    squared error of the whole latent. Defaults are those of the released code (AdamW, lr 1e-5, warm-up 10,000).

    ``dropout``: share of samples, or with ``dropout_by="batch"`` (the released code) of batches, without exemplar.
    ``encoder_lr``: learning rate of what is untrained at the beginning; None = ``lr``. ``decay``: linear to 0.
    ``all_tokens``: the ablation that keeps the patch tokens. ``tower``: folder or hub id of the CLIP vision tower that
    sees the exemplars, where it is not the backbone's own (Stable Diffusion brings none). ``offload``: AdamW's moments
    and the update in host memory.
    """

    fixed_baseline = False  # what is painted without an exemplar changes with training

    def __init__(
        self,
        backbone: Backbone,
        lr: float = 1e-5,
        encoder_lr: float | None = None,
        warmup: int = 10_000,
        decay: bool = False,
        weight_decay: float = 0.01,
        dropout: float = 0.2,
        dropout_by: str = "sample",
        all_tokens: bool = False,
        tower: str | None = None,
        offload: bool = False,
    ):
        super().__init__()
        if dropout_by not in ("sample", "batch"):
            raise UserError(f"module.dropout_by={dropout_by}: choose sample or batch")
        self.backbone, self.lr, self.encoder_lr, self.warmup, self.decay = backbone, lr, encoder_lr, warmup, decay
        self.weight_decay, self.dropout, self.dropout_by = weight_decay, dropout, dropout_by
        self.all_tokens, self.tower_path, self.offload = all_tokens, tower, offload
        self.unet: torch.nn.Module | None = None
        self.encoder: ExemplarEncoder | None = None

    def configure_model(self):
        if self.unet is None:
            self.unet = lay_out(build_painting_unet(self.backbone.load_precise("unet")))
            width = self.unet.config.cross_attention_dim
            self.encoder = build_encoder(self.tower, width, self.all_tokens).float()
            self.backbone = self.backbone.with_unet(self.unet)  # and what was copied takes no more room
            del self.tower
            vars(self.backbone).pop("image_encoder", None)

    @cached_property
    def tower(self) -> torch.nn.Module:
        """What sees the exemplars at first; no submodule."""
        return load_tower(self.tower_path) if self.tower_path else self.backbone.image_encoder

    def check(self, data: LatentData) -> None:
        """UserError unless the cache is to hold exemplars of the tower's side."""
        stored, side = data.recipes["train"].hints.get("exemplar", {}).get("size"), self.tower.config.image_size
        if stored != side:
            raise UserError(f"data.hints.exemplar.size={stored}, but the CLIP tower takes {side} px: set it to {side}")

    @property
    def painter(self) -> Painter:
        return Painter(self.backbone, self.encoder)

    def baseline(self, settings: Settings) -> PaintByExample:
        """Without an exemplar: guidance 0."""
        return PaintByExample(self.painter, replace(settings, guidance=0.0))

    def result(self, settings: Settings) -> PaintByExample:
        return PaintByExample(self.painter, settings)

    def export(self, folder: Path) -> None:
        """Write ``folder/paint_by_example`` in diffusers layout."""
        export_painter(self.unet, self.encoder, folder, self.backbone)

    @property
    def home(self) -> torch.device:
        return self.backbone.device

    @cached_property
    def frozen(self) -> dict[str, str]:
        """What it was trained on: the VAE's sha256, and one of the tower's weights."""
        return {"vae": self.backbone.hash("vae"), "tower": weights_hash(self.encoder.model)}

    def on_save_checkpoint(self, checkpoint):
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: v for name, v in state.items() if not name.startswith("encoder.model.")}
        checkpoint["backbone"] = self.frozen

    def on_load_checkpoint(self, checkpoint):
        refuse_other_weights(checkpoint, self.frozen, f"backbone {self.backbone.name} or of its CLIP tower")
        tower = {f"encoder.model.{name}": v for name, v in self.encoder.model.state_dict().items()}
        checkpoint["state_dict"] |= tower

    def on_fit_start(self):
        self.backbone.to(self.device)

    on_validation_start = on_fit_start

    def on_train_start(self):
        place_moments(self.optimizers())

    def configure_optimizers(self):
        groups = [
            {"params": list(self.unet.parameters()), "lr": self.lr},
            {"params": list(self.encoder.trainable_parameters()), "lr": self.encoder_lr or self.lr},
        ]
        return adamw(groups, self.trainer, self.lr, self.weight_decay, self.warmup, self.decay, warm_up, self.offload)

    def context(self, batch: dict) -> torch.Tensor:
        """B x T x D: the exemplars' tokens, dropped samples having the learnt vector instead."""
        context = self.encoder(batch["hint_exemplar"])
        draw = batch["drop"] if self.dropout_by == "sample" else batch["drop"][:1].expand_as(batch["drop"])
        dropped = (draw < self.dropout)[:, None, None]
        return torch.where(dropped, self.encoder.uncond_vector, context)

    def loss(self, batch: dict, context: torch.Tensor) -> torch.Tensor:
        backbone = self.backbone
        z, known, t = noised(batch, backbone.vae.config.scaling_factor, backbone.alphas_cumprod)
        hole, masked = known[:, :1], known[:, 1:]
        wanted = target(backbone.prediction_type, z, batch["noise"], backbone.alphas_cumprod[t])
        u = torch.cat([z, join_condition(hole, masked)], 1)
        return F.mse_loss(self.unet(u, t, context, return_dict=False)[0].float(), wanted)

    def training_step(self, batch: dict, index: int) -> torch.Tensor:
        if self.global_step == 0:
            check_hint(batch["hint_exemplar"])
        loss = self.loss(batch, self.context(batch))
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["noise"]))
        return loss

    def on_before_optimizer_step(self, optimizer):
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:
            self.log("train/lr", self.optimizers().param_groups[0]["lr"])

    def validation_step(self, batch: dict, index: int) -> None:
        """Fixed noise and timesteps: the loss with each sample's exemplar, and with none."""
        context = self.encoder(batch["hint_exemplar"])
        nothing = self.encoder.uncond_vector.expand_as(context)
        for name, seen in (("validation/loss", context), ("validation/loss_no_exemplar", nothing)):
            self.log(name, self.loss(batch, seen), batch_size=len(context), sync_dist=True)
