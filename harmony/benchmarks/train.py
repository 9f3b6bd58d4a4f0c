"""The training step of one ControlNet against the loop of the common training script.

The reference is what diffusers' ``train_controlnet.py`` does, with the masked picture that inpainting adds: both
pictures go through the VAE and the prompts through the text encoder in every step, nothing is compiled or fused, and
the loss is read back. Ours begins from cached latents. Both train the same ControlNet from the same weights, with
the same loss on the same backbone.
"""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from harmony.benchmarks.measure import alternate, matmul_rate, peak_memory, tflop
from harmony.models.backbone import Backbone
from harmony.training.control import ControlTask, JointTask
from harmony.training.schedule import HostAdamW

Step = Callable[[], object]


def cached_batch(backbone: Backbone, batch: int, branches: tuple[str, ...] = ("color",)) -> dict[str, torch.Tensor]:
    """What the cache hands to a training step, of the right shapes and with random contents."""
    rng = torch.Generator().manual_seed(0)
    c, side, pixels = backbone.channels, backbone.resolution // backbone.factor, backbone.resolution
    made = {name: torch.randn(batch, 2 * c, side, side, generator=rng) for name in ("moments", "masked_moments")}
    made |= {name: torch.randn(batch, c, side, side, generator=rng) for name in ("noise", "encode", "encode_masked")}
    made |= {name: torch.rand(batch, generator=rng) for name in ("time", "drop", "beside")}
    made |= {"hole": torch.ones(batch, 1, side, side), "weight": torch.ones(batch, 1, side, side)}
    made |= {f"hint_{branch}": torch.rand(batch, 3, pixels, pixels, generator=rng) for branch in branches}
    return made | {"tokens": backbone.tokens(["a photograph of a mushroom"] * batch)}


def to_device(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}


def whole_step(task: ControlTask | JointTask, inputs: dict[str, torch.Tensor], step: Callable) -> torch.Tensor:
    """The loss of ``step``, compiled or not, with its gradients."""
    lead = task.lead if isinstance(task, JointTask) else task
    with mixed(task.backbone.device):
        found = step(inputs, *lead.inputs(inputs))
        loss = torch.stack([*found.values()]).sum() if isinstance(found, dict) else found.mean()
    loss.backward()
    return loss.detach()


def mixed(device: torch.device):
    """bf16 on a GPU, as both sides train there; the CPU has no use for it."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def forward_pass(task: ControlTask | JointTask) -> Callable:
    """What a step computes of a batch and its inputs, before the gradient."""
    return task.means if isinstance(task, JointTask) else task.error


def our_step(task: ControlTask | JointTask, batch: dict[str, torch.Tensor]) -> Step:
    """One step of ``fit experiment=color``: latents from the cache, one fused update."""
    tasks = task.tasks.values() if isinstance(task, JointTask) else [task]
    groups = [group for one in tasks for group in one.groups()]
    lead = task.lead if isinstance(task, JointTask) else task
    optimiser = HostAdamW(groups) if lead.offload else torch.optim.AdamW(groups, fused=True)
    device = task.backbone.device

    def step() -> torch.Tensor:
        loss = whole_step(task, to_device(batch, device), partial(forward_pass(task), run=lead.run))
        optimiser.step()
        optimiser.zero_grad()
        return loss

    return step


def counted(task: ControlTask | JointTask, batch: dict[str, torch.Tensor]) -> float:
    """TFLOP of a step, per image, counted on the uncompiled step."""
    step = forward_pass(task)
    work = tflop(lambda: whole_step(task, to_device(batch, task.backbone.device), step), len(batch["noise"]))
    for net in task.controls.values():
        net.zero_grad()
    return work


def reference_step(backbone: Backbone, net: torch.nn.Module, batch: dict[str, torch.Tensor]) -> Step:
    """One step of the common script on pictures; ``net`` reads the noised latent alone, as ours does."""
    device, dtype = backbone.device, backbone.dtype
    count, pixels, scale = len(batch["noise"]), backbone.resolution, backbone.vae.config.scaling_factor
    vae = torch.nn.Module.to(
        copy.deepcopy(backbone.vae), dtype
    )  # the script casts it too; diffusers' own only warns more
    picture, mask = torch.rand(count, 3, pixels, pixels) * 2 - 1, torch.ones(count, 1, pixels, pixels)
    given = {"picture": picture, "masked": picture * (1 - mask), "tokens": batch["tokens"], "hole": batch["hole"]}
    given["hint"] = next(value for name, value in batch.items() if name.startswith("hint_"))
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-6)

    def step() -> float:
        b = to_device(given, device)
        with torch.no_grad():
            z = vae.encode(b["picture"].to(dtype)).latent_dist.sample() * scale
            masked = vae.encode(b["masked"].to(dtype)).latent_dist.sample() * scale
            text = backbone.text_encoder(b["tokens"])[0]
        noise = torch.randn_like(z)
        t = torch.randint(0, len(backbone.alphas_cumprod), (count,), device=device)
        a = backbone.alphas_cumprod[t].view(-1, 1, 1, 1)
        noisy = (a.sqrt() * z + (1 - a).sqrt() * noise).to(dtype)
        with mixed(device):
            down, middle = net(noisy, t, text, b["hint"].to(dtype), return_dict=False)
            u = torch.cat([noisy, b["hole"].to(dtype), masked], 1)
            output = backbone.unet(
                u, t, text, down_block_additional_residuals=down, mid_block_additional_residual=middle
            ).sample
        loss = F.mse_loss(output.float(), noise.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        return loss.item()

    return step


@dataclass(frozen=True)
class Load:
    """What is measured: ``batch`` images a step, ``blocks`` of ``steps`` steps; the rest are options of ours
    (``checkpointing`` of both sides, which share the frozen networks).
    """

    batch: int
    steps: int
    blocks: int
    compile: bool = False
    checkpointing: bool = False
    offload: bool = False


def ready(backbone: Backbone, branches: tuple[str, ...], load: Load) -> ControlTask | JointTask:
    """A task as it stands when a training begins; several branches are trained in one run."""
    options = {"warmup": 0, "compile": load.compile, "checkpointing": load.checkpointing, "offload": load.offload}
    backbone.unet.disable_gradient_checkpointing()  # what was measured before may have asked for it
    torch.manual_seed(0)
    task = (
        JointTask(backbone, branches, **options) if len(branches) > 1 else ControlTask(backbone, *branches, **options)
    )
    with backbone.device:
        task.configure_model()
    task.to(backbone.device)
    task.on_fit_start()
    return task


def bench_train(backbone: Backbone, load: Load, branches: tuple[str, ...] = ("color",), say=print) -> dict[str, float]:
    """Rates in images a second (pairs a second for two branches, of which the reference trains one after another)."""
    batch = cached_batch(backbone, load.batch, branches)
    if backbone.device.type == "cuda":
        batch = {name: value.pin_memory() for name, value in batch.items()}
        torch.cuda.reset_peak_memory_stats()
    task = ready(backbone, branches, load)
    nets = [copy.deepcopy(net) for net in task.controls.values()]
    ours = our_step(task, batch)
    work = counted(task, batch)
    ours()
    memory = peak_memory(backbone.device)
    steps = [reference_step(backbone, net, batch) for net in nets]
    work_reference = sum(tflop(step, load.batch) for step in steps)
    peak = matmul_rate(backbone.device, torch.bfloat16 if backbone.device.type == "cuda" else torch.float32)
    say(
        f"{work:.4g} TFLOP an image, the reference {work_reference:.4g}; products of matrices run at {peak:.3g} TFLOP/s"
    )
    rates = alternate(
        ours, lambda: [step() for step in steps], load.batch, backbone.device, load.steps, load.blocks, say
    )
    facts = {"tflop": work, "reference_tflop": work_reference, "peak_tflops": peak, "memory_gib": memory}
    return rates.figures(work, peak) | facts
