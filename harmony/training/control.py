"""F4. Training one ControlNet on a frozen inpainting kit (system A of the method sheet, sections 2.3 to 2.7)."""

from functools import cached_property

import lightning
import torch
import torch.nn.functional as F

from harmony.conditions import check_hint
from harmony.errors import UserError
from harmony.models.controlnet import BRANCHES, from_unet, zero_convolutions
from harmony.models.kit import Kit
from harmony.sampling.inpaint import predict
from harmony.training.objective import Objective, noised
from harmony.training.schedule import constant, linear_decay, total_steps

LEVELS = 4  # equal ranges of t over which the loss is also reported


class ControlTask(lightning.LightningModule):
    """Fill the instance back into its own photograph, seeing only its hint: eq. 8 over the whole latent.

    Trained: the ControlNet, in float32. Frozen, in the kit's own dtype, and absent from checkpoints: VAE, text encoder
    and UNet (the kit is no submodule). The UNet is not under no_grad: the gradient must pass through its decoder to the
    residuals. Defaults are the paper's setting (AdamW, lr 1e-6, warm-up 10,000, lambda 1).

    ``zero_lr``: learning rate of the zero convolutions and of the hint encoder's last layer, which start at 0 and hold
    everything else back; None = ``lr``. ``decay``: linear to 0 at the end instead of constant.
    ``prompt_dropout``: share of samples trained with the empty prompt.
    """

    def __init__(
        self,
        kit: Kit,
        branch: str = "color",
        lr: float = 1e-6,
        zero_lr: float | None = None,
        warmup: int = 10_000,
        decay: bool = False,
        weight_decay: float = 0.01,
        prompt_dropout: float = 0.1,
        in_channels: int | None = 4,
        objective: dict | None = None,
    ):
        super().__init__()
        if branch not in BRANCHES:
            raise UserError(f"module.branch={branch}: choose one of {', '.join(BRANCHES)}")
        self.kit, self.branch, self.lr, self.zero_lr, self.warmup, self.decay = kit, branch, lr, zero_lr, warmup, decay
        self.weight_decay, self.prompt_dropout, self.in_channels = weight_decay, prompt_dropout, in_channels
        self.objective = Objective(**(objective or {}))
        self.net: torch.nn.Module | None = None

    def configure_model(self):
        if self.net is None:
            self.net = from_unet(self.kit.unet, self.kit.factor, self.in_channels)

    @cached_property
    def frozen(self) -> dict[str, str]:
        """sha256 of each frozen part: what the ControlNet was trained on."""
        return {part: self.kit.hash(part) for part in ("vae", "unet", "text_encoder")}

    def on_save_checkpoint(self, checkpoint):
        checkpoint["kit"] = self.frozen

    def on_load_checkpoint(self, checkpoint):
        if checkpoint["kit"] != self.frozen:
            raise UserError(
                f"this run was trained on another state of kit {self.kit.name}: put that kit back, or begin anew"
                " with resume=false"
            )

    def on_fit_start(self):
        self.kit.to(self.device)
        self.empty = self.kit.prompt([""])

    on_validation_start = on_fit_start

    @property
    def reports(self) -> bool:
        """Whether the loggers look at this step's figures: they do after every log_every_n_steps-th step."""
        return (self.global_step + 1) % self.trainer.log_every_n_steps == 0

    def configure_optimizers(self):
        fast = [*zero_convolutions(self.net), *self.net.controlnet_cond_embedding.conv_out.parameters()]
        chosen = {id(p) for p in fast}
        slow = [p for p in self.net.parameters() if id(p) not in chosen]
        groups = [{"params": slow, "lr": self.lr}, {"params": fast, "lr": self.zero_lr or self.lr}]
        fused = self.device.type == "cuda"
        optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, weight_decay=self.weight_decay, fused=fused)
        factor = linear_decay(total_steps(self.trainer), self.warmup) if self.decay else constant(self.warmup)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def errors(self, batch: dict, weight: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        """(weighted squared error B x C x h x w, timesteps B) with the ControlNet at ``weight``."""
        kit = self.kit
        text = kit.text(batch["tokens"])
        text = torch.where((batch["drop"] < self.prompt_dropout)[:, None, None], self.empty, text)
        z, known, t = noised(batch, kit.vae.config.scaling_factor, kit.alphas_cumprod, self.objective.t_min)
        dtype = kit.dtype
        controls = [(self.net, batch["hint"].to(dtype), weight)]
        e = predict(kit.unet, z.to(dtype), known.to(dtype), t, text.to(dtype), controls)
        error = F.mse_loss(e.float(), batch["noise"], reduction="none")
        return self.objective.weight(kit.alphas_cumprod[t], batch["weight"]) * error, t

    def training_step(self, batch: dict, index: int) -> torch.Tensor:
        if self.global_step == 0:
            check_hint(batch["hint"])
        error, t = self.errors(batch)
        loss = error.mean()
        self.log("train/loss", loss, prog_bar=True, batch_size=len(t))
        if self.reports:
            each, level = error.detach().mean((1, 2, 3)), t * LEVELS // 1000
            for n in range(LEVELS):
                share = (level == n).float()
                self.log(f"train/loss_t{n}", (each * share).sum() / share.sum().clamp_min(1), batch_size=len(t))
        return loss

    def on_before_optimizer_step(self, optimizer):
        if self.reports:
            squares = [p.grad.square().sum() for p in zero_convolutions(self.net) if p.grad is not None]
            self.log("train/zero_conv_grad", torch.stack(squares).sum().sqrt())
            self.log("train/lr", self.optimizers().param_groups[0]["lr"])

    def validation_step(self, batch: dict, index: int) -> None:
        """Fixed noise and timesteps: the loss with the hint and, for comparison, without (weight 0)."""
        for name, weight in (("validation/loss", 1.0), ("validation/loss_hint_off", 0.0)):
            error, t = self.errors(batch, weight)
            self.log(name, error.mean(), batch_size=len(t), sync_dist=True)
