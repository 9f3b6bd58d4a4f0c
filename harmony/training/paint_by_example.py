"""Trains Paint by Example (Yang 2022) on a backbone: the whole UNet and the exemplar encoder."""

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

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
from harmony.training.objective import add_noise, compute_target
from harmony.training.schedule import make_adamw, place_moments, set_memory_format, warm_up_from
from harmony.training.task import Task, refuse_other_weights

Batch = dict[str, torch.Tensor]


class ExemplarTask(Task):
    """Trains to paint the object back into its photograph from an exemplar that passes a bottleneck of one token.

    Trained in float32: UNet (from the backbone's inpainting UNet), mapper, final layer norm, projection, and the
    vector of no exemplar. Frozen and absent from checkpoints: VAE and CLIP's tower. The loss is the mean squared error
    over the whole latent. Defaults are those of the released code (AdamW, lr 1e-5, warm-up 10,000).

    ``dropout``: share of samples, or with ``dropout_by="batch"`` (the released code) of batches, without exemplar.
    ``encoder_lr``: learning rate of the untrained layers; None: ``lr``. ``decay``: linear decay to 0.
    ``all_tokens``: the ablation that keeps the patch tokens. ``tower``: folder or hub id of the CLIP vision tower that
    sees the exemplars; None: the backbone's own (Stable Diffusion has none). ``offload``: AdamW's moments and update in
    host memory.
    """

    fixed_baseline = False  # the output without an exemplar changes with training

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

    def configure_model(self) -> None:
        if self.unet is None:
            self.unet = set_memory_format(build_painting_unet(self.backbone.load_precise("unet")))
            width = self.unet.config.cross_attention_dim
            self.encoder = build_encoder(self.tower, width, self.all_tokens).float()
            self.backbone = self.backbone.with_unet(self.unet)  # frees the original UNet
            del self.tower
            vars(self.backbone).pop("image_encoder", None)

    @cached_property
    def tower(self) -> torch.nn.Module:
        """The CLIP tower that the encoder starts from; no submodule."""
        return load_tower(self.tower_path) if self.tower_path else self.backbone.image_encoder

    def check(self, data: LatentData) -> None:
        """UserError unless the exemplars of the data have the resolution of the tower."""
        size, side = data.recipes["train"].hints.get("exemplar", {}).get("size"), self.tower.config.image_size
        if size != side:
            raise UserError(f"data.hints.exemplar.size={size}, but the CLIP tower takes {side} px: set it to {side}")

    @property
    def painter(self) -> Painter:
        return Painter(self.backbone, self.encoder)

    def baseline(self, settings: Settings) -> PaintByExample:
        """Painting without an exemplar: guidance 0."""
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
    def frozen_hashes(self) -> dict[str, str]:
        """sha256 of the VAE and of the tower's weights."""
        return {"vae": self.backbone.hash("vae"), "tower": weights_hash(self.encoder.model)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: v for name, v in state.items() if not name.startswith("encoder.model.")}
        checkpoint["backbone"] = self.frozen_hashes

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        refuse_other_weights(checkpoint, self.frozen_hashes, f"backbone {self.backbone.name} or of its CLIP tower")
        tower = {f"encoder.model.{name}": v for name, v in self.encoder.model.state_dict().items()}
        checkpoint["state_dict"] |= tower

    def on_fit_start(self) -> None:
        self.backbone.to(self.device)

    on_validation_start = on_fit_start

    def on_train_start(self) -> None:
        place_moments(self.optimizers())

    def configure_optimizers(self) -> dict[str, Any]:
        groups = [
            {"params": list(self.unet.parameters()), "lr": self.lr},
            {"params": list(self.encoder.trainable_parameters()), "lr": self.encoder_lr or self.lr},
        ]
        rule = warm_up_from
        return make_adamw(groups, self.trainer, self.lr, self.weight_decay, self.warmup, self.decay, rule, self.offload)

    def encode_exemplars(self, batch: Batch) -> torch.Tensor:
        """The exemplars' tokens B x T x D; dropped samples have the learned vector instead."""
        context = self.encoder(batch["hint_exemplar"])
        draw = batch["drop"] if self.dropout_by == "sample" else batch["drop"][:1].expand_as(batch["drop"])
        is_dropped = (draw < self.dropout)[:, None, None]
        return torch.where(is_dropped, self.encoder.uncond_vector, context)

    def compute_loss(self, batch: Batch, context: torch.Tensor) -> torch.Tensor:
        backbone = self.backbone
        z, condition, t = add_noise(batch, backbone.vae.config.scaling_factor, backbone.alphas_cumprod)
        hole, masked = condition[:, :1], condition[:, 1:]
        target = compute_target(backbone.prediction_type, z, batch["noise"], backbone.alphas_cumprod[t])
        u = torch.cat([z, join_condition(hole, masked)], 1)
        return F.mse_loss(self.unet(u, t, context, return_dict=False)[0].float(), target)

    def training_step(self, batch: Batch, index: int) -> torch.Tensor:
        if self.global_step == 0:
            check_hint(batch["hint_exemplar"])
        loss = self.compute_loss(batch, self.encode_exemplars(batch))
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["noise"]))
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:
            self.log("train/lr", self.optimizers().param_groups[0]["lr"])

    def validation_step(self, batch: Batch, index: int) -> None:
        """Log the loss with each sample's exemplar and with none, at fixed noise and timesteps."""
        context = self.encoder(batch["hint_exemplar"])
        empty_context = self.encoder.uncond_vector.expand_as(context)
        for name, c in (("validation/loss", context), ("validation/loss_no_exemplar", empty_context)):
            self.log(name, self.compute_loss(batch, c), batch_size=len(context), sync_dist=True)
