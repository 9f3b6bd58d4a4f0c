"""Trains ControlNets on a frozen inpainting backbone (Liu 2025, eq. 6 and 8 to 11)."""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.nn.functional as F

from harmony.core.errors import UserError
from harmony.data.latent_data import LatentData
from harmony.methods.inpainting import Branch, Inpainting, load_branch
from harmony.models.backbone import Backbone, move_module, weights_hash
from harmony.models.controlnet import export_controlnet, from_unet, zero_convolutions
from harmony.models.unet_halves import Activations, Residuals, decode, encode
from harmony.pixels.hints import HINTS, check_hint
from harmony.sampling.guidance import Settings, add_residuals, compile_once, control_residuals, embed_hints
from harmony.training.objective import Objective, add_noise, compute_target
from harmony.training.schedule import make_adamw, place_moments, set_memory_format
from harmony.training.task import Task, refuse_other_weights

Run = Callable[[Callable], Callable]  # wraps a function of a network before it is called, to compile it or not
Batch = dict[str, torch.Tensor]
LEVELS = 4  # equal ranges of t for which the loss is also logged


def run_eagerly(function: Callable) -> Callable:
    """The ``Run`` that compiles nothing."""
    return function


def compute_residuals(
    net: torch.nn.Module, pixels: torch.Tensor, u: torch.Tensor, t: torch.Tensor, text: torch.Tensor
) -> Residuals:
    """The residuals of a ControlNet for its hint ``pixels``, hint encoder included."""
    return control_residuals(embed_hints([(net, pixels, 1.0)]), u, t, text)


class Controls(Task):
    """What the tasks of ControlNets have in common: ``controls`` on a ``backbone``, as a method and as files."""

    compiles = False
    hints: dict[str, dict] = {}  # branch -> parameters of its operator in the data

    @property
    def controls(self) -> dict[str, torch.nn.Module]:
        """Branch -> the ControlNet that this run trains."""
        raise NotImplementedError

    @property
    def home(self) -> torch.device:
        return self.backbone.device

    def configure_callbacks(self) -> list[lightning.Callback]:
        if not self.compiles:
            return []
        from harmony.training.compilation import Compilation  # inductor, whose import takes seconds

        return [Compilation()]

    def check(self, data: LatentData) -> None:
        """UserError unless each batch has the hints of all ControlNets."""
        self.hints = data.recipes["train"].hints
        for name in self.controls:
            if name not in data.branches or name not in self.hints:
                raise UserError(f"data.branch={data.branches} must have {name}, and data.hints its parameters")

    @property
    def branches(self) -> list[Branch]:
        return [Branch(name, net, 1.0, self.hints.get(name, {})) for name, net in self.controls.items()]

    def baseline(self, settings: Settings) -> Inpainting:
        """Inpainting by the caption alone, without hints."""
        return Inpainting(self.backbone, [], settings)

    def result(self, settings: Settings) -> Inpainting:
        return Inpainting(self.backbone, self.branches, settings)

    def export(self, folder: Path) -> None:
        """Write each ControlNet in diffusers layout: one into ``folder``, several into folders of their names."""
        for b in self.branches:
            output = folder if len(self.controls) == 1 else folder / b.name
            export_controlnet(b.net, output, b.name, b.parameters, self.backbone)


class ControlTask(Controls):
    """Trains a ControlNet to fill the instance back into its photograph from its hint alone (Liu 2025, eq. 8).

    The loss covers the whole latent. The ControlNet is trained in float32. VAE, text encoder and UNet are frozen, in
    the backbone's dtype, and absent from checkpoints (the backbone is no submodule). The UNet is not under no_grad: the
    gradient must pass through its decoder to the residuals. Defaults are those of Liu 2025 (AdamW, lr 1e-6, warm-up
    10,000, lambda 1).

    ``zero_init_lr``: learning rate of the zero convolutions and of the hint encoder's last layer, which start at 0 and
    slow everything else down; None: ``lr``. ``decay``: linear decay to 0 at the end instead of a constant rate.
    ``prompt_dropout``: share of samples with the empty prompt.
    ``companion``: a trained ControlNet (see ``models.shipped``) that runs beside this one, frozen, in ``share`` of
    the samples; the batch needs its hint too. Liu 2025 trains each net alone, so that what both hints show (the outline
    of the object, for example) reaches the UNet twice: see ``experiments/structure_long.yaml``.
    ``compile``: compile both halves of the UNet and the ControlNet to one graph each. ``checkpointing``: recompute
    activations for the gradient instead of keeping them. ``offload``: AdamW's moments and update in host memory.
    """

    def __init__(
        self,
        backbone: Backbone,
        branch: str = "color",
        lr: float = 1e-6,
        zero_init_lr: float | None = None,
        warmup: int = 10_000,
        decay: bool = False,
        weight_decay: float = 0.01,
        prompt_dropout: float = 0.1,
        in_channels: int | None = 4,
        objective: dict | None = None,
        companion: str | None = None,
        share: float = 0.5,
        compile: bool = False,
        checkpointing: bool = False,
        offload: bool = False,
    ):
        super().__init__()
        self.compiles, self.checkpointing, self.offload = compile, checkpointing, offload
        if branch not in HINTS:
            raise UserError(f"module.branch={branch}: choose one of {', '.join(HINTS)}")
        self.backbone, self.branch = backbone, branch
        self.lr, self.zero_init_lr, self.warmup, self.decay = lr, zero_init_lr, warmup, decay
        self.weight_decay, self.prompt_dropout, self.in_channels = weight_decay, prompt_dropout, in_channels
        self.objective = Objective(**(objective or {}))
        self.companion = companion and load_branch(companion, backbone)  # no submodule
        self.share = share
        self.net: torch.nn.Module | None = None

    def configure_model(self) -> None:
        if self.net is None:
            self.net = set_memory_format(
                from_unet(self.backbone.load_precise("unet"), self.backbone.factor, self.in_channels)
            )
            for net in (self.net, self.backbone.unet) if self.checkpointing else ():
                net.enable_gradient_checkpointing()

    @property
    def controls(self) -> dict[str, torch.nn.Module]:
        return {self.branch: self.net}

    def check(self, data: LatentData) -> None:
        """UserError unless the batch has the companion's hints, with the parameters that it was trained on."""
        super().check(data)
        if self.companion is None:
            return
        name, parameters = self.companion.name, self.companion.parameters
        if name not in data.branches:
            raise UserError(f"the companion's hint is not in the batch: data.branch=[{self.branch},{name}]")
        data_parameters = data.recipes["train"].hints.get(name)
        if parameters is not None and data_parameters != parameters:
            raise UserError(
                f"the companion was trained on {name} hints {parameters}: "
                f"data.hints.{name}={data_parameters} must equal them"
            )

    @cached_property
    def frozen_hashes(self) -> dict[str, str]:
        """sha256 of each frozen part that the ControlNet is trained on."""
        hashes = {part: self.backbone.hash(part) for part in ("vae", "unet", "text_encoder")}
        return hashes | ({"companion": weights_hash(self.companion.net)} if self.companion else {})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["backbone"] = self.frozen_hashes

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        refuse_other_weights(checkpoint, self.frozen_hashes, f"backbone {self.backbone.name} or of its companion")

    def on_fit_start(self) -> None:
        self.backbone.to(self.device)
        self.empty_text = self.backbone.prompt([""])
        if self.companion:
            move_module(self.companion.net, self.device)

    on_validation_start = on_fit_start

    def on_train_start(self) -> None:
        place_moments(self.optimizers())

    @property
    def is_log_step(self) -> bool:
        """Whether the loggers record the figures of this step, every log_every_n_steps-th."""
        return (self.global_step + 1) % self.trainer.log_every_n_steps == 0

    def group_parameters(self) -> list[dict[str, Any]]:
        """Parameter groups: the trunk, and the layers that start at zero with their own learning rate."""
        zero_layers = [*zero_convolutions(self.net), *self.net.controlnet_cond_embedding.conv_out.parameters()]
        zero_ids = {id(p) for p in zero_layers}
        trunk = [p for p in self.net.parameters() if id(p) not in zero_ids]
        return [{"params": trunk, "lr": self.lr}, {"params": zero_layers, "lr": self.zero_init_lr or self.lr}]

    def make_optimizer(self, groups: list[dict[str, Any]], trainer: lightning.Trainer) -> dict[str, Any]:
        return make_adamw(groups, trainer, self.lr, self.weight_decay, self.warmup, self.decay, offload=self.offload)

    def configure_optimizers(self) -> dict[str, Any]:
        return self.make_optimizer(self.group_parameters(), self.trainer)

    def prepare_inputs(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(u, t, text, target) of a batch, with some prompts empty.

        ``u`` B x (2C + 1) x h x w: the UNet's input. ``t`` B: timesteps. ``text``: states of the prompts. ``target``
        B x C x h x w in float32, because v of a rounded latent would be wrong at high noise.
        """
        backbone = self.backbone
        text = backbone.text(batch["tokens"])
        text = torch.where((batch["drop"] < self.prompt_dropout)[:, None, None], self.empty_text, text)
        scale, abar = backbone.vae.config.scaling_factor, backbone.alphas_cumprod
        z, condition, t = add_noise(batch, scale, abar, self.objective.t_min, self.objective.noisiest)
        target = compute_target(backbone.prediction_type, z, batch["noise"], abar[t])
        return torch.cat([z, condition], 1).to(backbone.dtype), t, text.to(backbone.dtype), target

    def compute_second_half(
        self,
        batch: Batch,
        u: torch.Tensor,
        t: torch.Tensor,
        text: torch.Tensor,
        target: torch.Tensor,
        encoding: Activations,
        hint_off: bool = False,
        run: Run = run_eagerly,
    ) -> torch.Tensor:
        """Weighted squared error B x C x h x w, by the UNet's second half, from the output ``encoding`` of the first.

        ``hint_off``: without the ControlNet.
        """
        pixels = batch[f"hint_{self.branch}"].to(u.dtype)
        residuals = None if hint_off else run(compute_residuals)(self.net, pixels, u, t, text)
        if self.companion:
            others = self.compute_companion(batch, u, t, text, run)
            residuals = others if residuals is None else add_residuals(residuals, others)
        output = run(decode)(self.backbone.unet, encoding, text, residuals)
        kind, a = self.backbone.prediction_type, self.backbone.alphas_cumprod[t]
        weight = self.objective.compute_weight(a, batch["weight"], kind)
        return weight * F.mse_loss(output.float(), target, reduction="none")

    @torch.no_grad()
    def compute_companion(
        self, batch: Batch, u: torch.Tensor, t: torch.Tensor, text: torch.Tensor, run: Run
    ) -> Residuals:
        """The companion's residuals, zero for the samples in which it does not run."""
        pixels = batch[f"hint_{self.companion.name}"].to(u.dtype)
        down, middle = run(compute_residuals)(self.companion.net, pixels, u, t, text)
        is_on = (batch["beside"] < self.share).to(u.dtype)[:, None, None, None]
        return tuple(is_on * r for r in down), is_on * middle

    def compute_error(self, batch: Batch, *inputs: torch.Tensor, run: Run = run_eagerly) -> torch.Tensor:
        """Weighted squared error B x C x h x w of ``prepare_inputs``' results, through UNet and ControlNet."""
        encoding = run(encode)(self.backbone.unet, *inputs[:3])
        return self.compute_second_half(batch, *inputs, encoding, run=run)

    @property
    def run(self) -> Run:
        """The ``Run`` of a training step: compiled with ``compile``.

        The two halves of the UNet and the ControlNet are a graph each, instead of the whole step: the nets of a run
        share them, and the cost of compilation grows faster than the graph.
        """
        return compile_once if self.compiles else run_eagerly

    def compute_errors(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(weighted squared error B x C x h x w, timesteps B) of a batch."""
        inputs = self.prepare_inputs(batch)
        return self.compute_error(batch, *inputs, run=self.run), inputs[1]

    def training_step(self, batch: Batch, index: int) -> torch.Tensor:
        if self.global_step == 0:
            check_hint(batch[f"hint_{self.branch}"])
        error, t = self.compute_errors(batch)
        loss = error.mean()
        self.log("train/loss", loss, prog_bar=True, batch_size=len(t))
        if self.is_log_step:
            losses, levels = error.detach().mean((1, 2, 3)), t * LEVELS // 1000
            for n in range(LEVELS):
                mask = (levels == n).float()
                self.log(f"train/loss_t{n}", (losses * mask).sum() / mask.sum().clamp_min(1), batch_size=len(t))
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.is_log_step:
            squares = [p.grad.square().sum() for p in zero_convolutions(self.net) if p.grad is not None]
            self.log("train/zero_conv_grad", torch.stack(squares).sum().sqrt())
            self.log("train/lr", self.optimizers().param_groups[0]["lr"])

    def validation_step(self, batch: Batch, index: int) -> None:
        """Log the loss with the hint and, for comparison, without, at fixed noise and timesteps.

        A companion runs in both, in its share of the samples.
        """
        u, t, text, target = self.prepare_inputs(batch)
        encoding = encode(self.backbone.unet, u, t, text)
        for name, hint_off in (("validation/loss", False), ("validation/loss_hint_off", True)):
            error = self.compute_second_half(batch, u, t, text, target, encoding, hint_off)
            self.log(name, error.mean(), batch_size=len(t), sync_dist=True)


class JointTask(Controls):
    """Trains several ControlNets in one run, each by its own loss, with one pass of the UNet's frozen first half.

    ``branch`` lists them; the other options of ``ControlTask`` apply to all. AdamW updates every weight by its own
    gradient alone, so the nets are the same as after separate runs on the same noise.
    """

    def __init__(self, backbone: Backbone, branch: Sequence[str] = ("color", "structure"), **options):
        super().__init__()
        if isinstance(branch, str) or len(set(branch)) < len(branch):
            raise UserError(f"module.branch={branch}: list each branch once, as in [color, structure]")
        if options.get("companion"):
            raise UserError("module.companion goes with one ControlNet a run; here they are trained side by side")
        self.backbone, self.names = backbone, list(branch)
        self.tasks = torch.nn.ModuleDict({name: ControlTask(backbone, name, **options) for name in branch})
        self.compiles = self.lead.compiles

    @property
    def controls(self) -> dict[str, torch.nn.Module]:
        return {branch: task.net for branch, task in self.tasks.items()}

    @property
    def lead(self) -> ControlTask:
        """The first task, whose inputs all tasks share."""
        return self.tasks[self.names[0]]

    def configure_model(self) -> None:
        state = torch.get_rng_state()
        for task in self.tasks.values():
            torch.set_rng_state(state)  # each net starts as in a separate run
            task.configure_model()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.lead.on_save_checkpoint(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.lead.on_load_checkpoint(checkpoint)

    def on_fit_start(self) -> None:
        self.backbone.to(self.device)
        self.lead.empty_text = self.backbone.prompt([""])

    on_validation_start = on_fit_start

    def on_train_start(self) -> None:
        place_moments(self.optimizers())

    def configure_optimizers(self) -> dict[str, Any]:
        groups = [group for task in self.tasks.values() for group in task.group_parameters()]
        return self.lead.make_optimizer(groups, self.trainer)

    def compute_losses(
        self, batch: Batch, *inputs: torch.Tensor, hint_off: bool = False, run: Run = run_eagerly
    ) -> dict[str, torch.Tensor]:
        """Branch -> loss; ``inputs``: the results of ``ControlTask.prepare_inputs``."""
        encoding = run(encode)(self.backbone.unet, *inputs[:3])
        tasks = self.tasks.items()
        errors = {name: t.compute_second_half(batch, *inputs, encoding, hint_off, run) for name, t in tasks}
        return {name: error.mean() for name, error in errors.items()}

    def training_step(self, batch: Batch, index: int) -> torch.Tensor:
        if self.global_step == 0:
            for branch in self.names:
                check_hint(batch[f"hint_{branch}"])
        losses = self.compute_losses(batch, *self.lead.prepare_inputs(batch), run=self.lead.run)
        size = len(batch["noise"])
        for branch, loss in losses.items():
            self.log(f"train/loss_{branch}", loss, batch_size=size)
        loss = torch.stack(list(losses.values())).sum()
        self.log("train/loss", loss, prog_bar=True, batch_size=size)
        return loss

    def validation_step(self, batch: Batch, index: int) -> None:
        size = len(batch["noise"])
        inputs = self.lead.prepare_inputs(batch)
        for name, hint_off in (("loss", False), ("loss_hint_off", True)):
            losses = self.compute_losses(batch, *inputs, hint_off=hint_off)
            for branch, loss in losses.items():
                self.log(f"validation/{name}_{branch}", loss, batch_size=size, sync_dist=True)
            self.log(f"validation/{name}", torch.stack(list(losses.values())).sum(), batch_size=size, sync_dist=True)
