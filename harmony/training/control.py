"""Training one ControlNet on a frozen inpainting backbone (Liu 2025, eq. 6 and 8 to 11)."""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import lightning
import torch
import torch.nn.functional as F

from harmony.core.errors import UserError
from harmony.data.latent_data import LatentData
from harmony.methods.inpainting import Branch, Inpainting, load_branch
from harmony.models.backbone import Backbone, move_module, weights_hash
from harmony.models.controlnet import BRANCHES, export_controlnet, from_unet, zero_convolutions
from harmony.models.unet_halves import Activations, Residuals, decode, encode
from harmony.pixels.hints import check_hint
from harmony.sampling.guidance import Settings, add_residuals, compile_once, control_residuals, embed_hints
from harmony.training.objective import Objective, noised, target
from harmony.training.schedule import adamw, lay_out, place_moments
from harmony.training.task import Task, refuse_other_weights

Run = Callable[[Callable], Callable]  # what becomes of a function of a network before it is called
LEVELS = 4  # equal ranges of t over which the loss is also reported


def as_it_is(function: Callable) -> Callable:
    """A function of a network that is not compiled."""
    return function


def answer(
    net: torch.nn.Module, pixels: torch.Tensor, u: torch.Tensor, t: torch.Tensor, text: torch.Tensor
) -> Residuals:
    """The residuals of a ControlNet with its hint ``pixels``, the hint encoder included."""
    return control_residuals(embed_hints([(net, pixels, 1.0)]), u, t, text)


class Controls(Task):
    """What runs with ControlNets have in common once they are trained; ``controls`` and ``backbone`` are the task's."""

    compiles = False
    hints: dict[str, dict] = {}  # branch -> parameters of its operator, as the data make them

    @property
    def controls(self) -> dict[str, torch.nn.Module]:
        """Branch -> ControlNet: what this run trains."""
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
        self.hints = data.recipes["train"].hints

    @property
    def branches(self) -> list[Branch]:
        return [Branch(name, net, 1.0, self.hints.get(name, {})) for name, net in self.controls.items()]

    def baseline(self, settings: Settings) -> Inpainting:
        """Words alone: the hints off."""
        return Inpainting(self.backbone, [], settings)

    def result(self, settings: Settings) -> Inpainting:
        return Inpainting(self.backbone, self.branches, settings)

    def export(self, folder: Path) -> None:
        """Write each ControlNet in diffusers layout: into ``folder``, or one of several into a folder of its name."""
        for b in self.branches:
            target = folder if len(self.controls) == 1 else folder / b.name
            export_controlnet(b.net, target, b.name, b.parameters, self.backbone)


class ControlTask(Controls):
    """Fill the instance back into its own photograph, seeing only its hint: Liu 2025, eq. 8 over the whole latent.

    Trained: the ControlNet, in float32. Frozen, in the backbone's own dtype, and absent from checkpoints: VAE, text
    encoder and UNet (the backbone is no submodule). The UNet is not under no_grad: the gradient must pass through its
    decoder to the residuals. Defaults are those of Liu 2025 (AdamW, lr 1e-6, warm-up 10,000, lambda 1).

    ``zero_lr``: learning rate of the zero convolutions and of the hint encoder's last layer, which start at 0 and hold
    everything else back; None = ``lr``. ``decay``: linear to 0 at the end instead of constant.
    ``prompt_dropout``: share of samples trained with the empty prompt.
    ``companion``: a trained ControlNet (see ``controlnet_folder``) that runs beside this one, frozen, in ``share`` of
    the samples; its hint must travel with the batch too. Liu 2025 trains each alone, and then both tell the UNet what
    they have in common (where the object ends, say) twice: see ``experiments/structure_long.yaml``.
    ``compile``: both halves of the UNet and the ControlNet become one graph each. ``checkpointing``: activations are
    computed again for the gradient instead of kept. ``offload``: AdamW's moments and the update in host memory.
    """

    def __init__(
        self,
        backbone: Backbone,
        branch: str = "color",
        lr: float = 1e-6,
        zero_lr: float | None = None,
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
        if branch not in BRANCHES:
            raise UserError(f"module.branch={branch}: choose one of {', '.join(BRANCHES)}")
        self.backbone, self.branch, self.lr, self.zero_lr, self.warmup, self.decay = (
            backbone,
            branch,
            lr,
            zero_lr,
            warmup,
            decay,
        )
        self.weight_decay, self.prompt_dropout, self.in_channels = weight_decay, prompt_dropout, in_channels
        self.objective = Objective(**(objective or {}))
        self.companion = companion and load_branch(companion, backbone)  # no submodule
        self.share = share
        self.net: torch.nn.Module | None = None

    def configure_model(self):
        if self.net is None:
            self.net = lay_out(from_unet(self.backbone.load_precise("unet"), self.backbone.factor, self.in_channels))
            for net in (self.net, self.backbone.unet) if self.checkpointing else ():
                net.enable_gradient_checkpointing()

    @property
    def controls(self) -> dict[str, torch.nn.Module]:
        return {self.branch: self.net}

    def check(self, data: LatentData) -> None:
        """UserError unless the companion's hints travel with the batch, made as it was taught."""
        super().check(data)
        if self.companion is None:
            return
        name, taught = self.companion.name, self.companion.parameters
        if name not in data.branches:
            raise UserError(f"the companion's hint is not in the batch: data.branch=[{self.branch},{name}]")
        given = data.recipes["train"].hints.get(name)
        if taught is not None and given != taught:
            raise UserError(
                f"the companion was trained on {name} hints {taught}: data.hints.{name}={given} must equal them"
            )

    @cached_property
    def frozen(self) -> dict[str, str]:
        """sha256 of each frozen part: what the ControlNet was trained on."""
        hashes = {part: self.backbone.hash(part) for part in ("vae", "unet", "text_encoder")}
        return hashes | ({"companion": weights_hash(self.companion.net)} if self.companion else {})

    def on_save_checkpoint(self, checkpoint):
        checkpoint["backbone"] = self.frozen

    def on_load_checkpoint(self, checkpoint):
        refuse_other_weights(checkpoint, self.frozen, f"backbone {self.backbone.name} or of its companion")

    def on_fit_start(self):
        self.backbone.to(self.device)
        self.empty = self.backbone.prompt([""])
        if self.companion:
            move_module(self.companion.net, self.device)

    on_validation_start = on_fit_start

    def on_train_start(self):
        place_moments(self.optimizers())

    @property
    def reports(self) -> bool:
        """Whether the loggers look at this step's figures: they do after every log_every_n_steps-th step."""
        return (self.global_step + 1) % self.trainer.log_every_n_steps == 0

    def groups(self) -> list[dict]:
        """Parameter groups: the trunk, and what starts at zero with its own learning rate."""
        fast = [*zero_convolutions(self.net), *self.net.controlnet_cond_embedding.conv_out.parameters()]
        chosen = {id(p) for p in fast}
        slow = [p for p in self.net.parameters() if id(p) not in chosen]
        return [{"params": slow, "lr": self.lr}, {"params": fast, "lr": self.zero_lr or self.lr}]

    def optimiser(self, groups: list[dict], trainer: lightning.Trainer) -> dict:
        return adamw(groups, trainer, self.lr, self.weight_decay, self.warmup, self.decay, offload=self.offload)

    def configure_optimizers(self):
        return self.optimiser(self.groups(), self.trainer)

    def inputs(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(u, t, text, wanted): the UNet's input B x (2C + 1) x h x w, timesteps B, states of the prompts (some empty),
        and the output that is wanted, B x C x h x w in float32: of a rounded latent, v would be off at high noise.
        """
        backbone = self.backbone
        text = backbone.text(batch["tokens"])
        text = torch.where((batch["drop"] < self.prompt_dropout)[:, None, None], self.empty, text)
        z, known, t = noised(batch, backbone.vae.config.scaling_factor, backbone.alphas_cumprod, self.objective.t_min)
        wanted = target(backbone.prediction_type, z, batch["noise"], backbone.alphas_cumprod[t])
        return torch.cat([z, known], 1).to(backbone.dtype), t, text.to(backbone.dtype), wanted

    def behind(
        self,
        batch: dict,
        u: torch.Tensor,
        t: torch.Tensor,
        text: torch.Tensor,
        wanted: torch.Tensor,
        encoded: Activations,
        hint_off: bool = False,
        run: Run = as_it_is,
    ) -> torch.Tensor:
        """Weighted squared error B x C x h x w with the ControlNet or without, behind the frozen first half."""
        pixels = batch[f"hint_{self.branch}"].to(u.dtype)
        residuals = None if hint_off else run(answer)(self.net, pixels, u, t, text)
        if self.companion:
            beside = self.beside(batch, u, t, text, run)
            residuals = beside if residuals is None else add_residuals(residuals, beside)
        e = run(decode)(self.backbone.unet, encoded, text, residuals)
        kind, a = self.backbone.prediction_type, self.backbone.alphas_cumprod[t]
        return self.objective.weight(a, batch["weight"], kind) * F.mse_loss(e.float(), wanted, reduction="none")

    @torch.no_grad()
    def beside(self, batch: dict, u: torch.Tensor, t: torch.Tensor, text: torch.Tensor, run: Run) -> Residuals:
        """The companion's residuals, zero for the samples in which it does not run."""
        pixels = batch[f"hint_{self.companion.name}"].to(u.dtype)
        down, middle = run(answer)(self.companion.net, pixels, u, t, text)
        runs = (batch["beside"] < self.share).to(u.dtype)[:, None, None, None]
        return tuple(runs * r for r in down), runs * middle

    def error(self, batch: dict, *inputs: torch.Tensor, run: Run = as_it_is) -> torch.Tensor:
        """Weighted squared error B x C x h x w: the whole pass through UNet and ControlNet."""
        encoded = run(encode)(self.backbone.unet, *inputs[:3])
        return self.behind(batch, *inputs, encoded, run=run)

    @property
    def run(self) -> Run:
        """How a training step calls a network: compiled where ``compile`` asks for it.

        The two halves of the UNet and the ControlNet are a graph each, not the whole step: nets of one run share
        them, and what compiling costs grows faster than the graph.
        """
        return compile_once if self.compiles else as_it_is

    def errors(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """(weighted squared error B x C x h x w, timesteps B)."""
        inputs = self.inputs(batch)
        return self.error(batch, *inputs, run=self.run), inputs[1]

    def training_step(self, batch: dict, index: int) -> torch.Tensor:
        if self.global_step == 0:
            check_hint(batch[f"hint_{self.branch}"])
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
        """Fixed noise and timesteps: the loss with the hint and, for comparison, without (weight 0).

        A companion runs in both, in its share of the samples.
        """
        u, t, text, wanted = self.inputs(batch)
        encoded = encode(self.backbone.unet, u, t, text)
        for name, hint_off in (("validation/loss", False), ("validation/loss_hint_off", True)):
            error = self.behind(batch, u, t, text, wanted, encoded, hint_off)
            self.log(name, error.mean(), batch_size=len(t), sync_dist=True)


class JointTask(Controls):
    """Several ControlNets in one run, each with a loss of its own, behind one pass of the frozen UNet's first half.

    ``branch`` lists them; the other options of ``ControlTask`` hold for all. AdamW moves every weight by its own
    gradient alone, so the nets become what separate runs on the same noise would make them.
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
        """The task whose inputs all share."""
        return self.tasks[self.names[0]]

    def configure_model(self):
        state = torch.get_rng_state()
        for task in self.tasks.values():
            torch.set_rng_state(state)  # each net starts as it would in a run of its own
            task.configure_model()

    def on_save_checkpoint(self, checkpoint):
        self.lead.on_save_checkpoint(checkpoint)

    def on_load_checkpoint(self, checkpoint):
        self.lead.on_load_checkpoint(checkpoint)

    def on_fit_start(self):
        self.backbone.to(self.device)
        self.lead.empty = self.backbone.prompt([""])

    on_validation_start = on_fit_start

    def on_train_start(self):
        place_moments(self.optimizers())

    def configure_optimizers(self):
        groups = [group for task in self.tasks.values() for group in task.groups()]
        return self.lead.optimiser(groups, self.trainer)

    def means(
        self, batch: dict, *inputs: torch.Tensor, hint_off: bool = False, run: Run = as_it_is
    ) -> dict[str, torch.Tensor]:
        """The loss of each net; ``inputs`` are those of ``ControlTask.inputs``."""
        encoded = run(encode)(self.backbone.unet, *inputs[:3])
        errors = {name: task.behind(batch, *inputs, encoded, hint_off, run) for name, task in self.tasks.items()}
        return {name: error.mean() for name, error in errors.items()}

    def training_step(self, batch: dict, index: int) -> torch.Tensor:
        if self.global_step == 0:
            for branch in self.names:
                check_hint(batch[f"hint_{branch}"])
        losses = self.means(batch, *self.lead.inputs(batch), run=self.lead.run)
        size = len(batch["noise"])
        for branch, loss in losses.items():
            self.log(f"train/loss_{branch}", loss, batch_size=size)
        loss = torch.stack(list(losses.values())).sum()
        self.log("train/loss", loss, prog_bar=True, batch_size=size)
        return loss

    def validation_step(self, batch: dict, index: int) -> None:
        size = len(batch["noise"])
        inputs = self.lead.inputs(batch)
        for name, hint_off in (("loss", False), ("loss_hint_off", True)):
            losses = self.means(batch, *inputs, hint_off=hint_off)
            for branch, loss in losses.items():
                self.log(f"validation/{name}_{branch}", loss, batch_size=size, sync_dist=True)
            self.log(f"validation/{name}", torch.stack(list(losses.values())).sum(), batch_size=size, sync_dist=True)
