"""Benchmark of the training step of a ControlNet against the loop of the common training script.

The reference does what diffusers' ``train_controlnet.py`` does, with the masked picture that inpainting adds: in every
step both pictures go through the VAE and the prompts through the text encoder, nothing is compiled or fused, and the
loss is read back. Ours starts from cached latents. Both train the same ControlNet from the same weights, with the
same loss on the same backbone.
"""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from harmony.benchmarks.measure import alternate, count_tflop, measure_matmul_rate, measure_peak_memory
from harmony.core.progress import tell
from harmony.models.backbone import Backbone
from harmony.training.control import ControlTask, JointTask
from harmony.training.schedule import HostAdamW

Step = Callable[[], object]


def make_batch(backbone: Backbone, size: int, branches: tuple[str, ...] = ("color",)) -> dict[str, torch.Tensor]:
    """A batch of ``size`` samples as the cache gives it to a training step, with random values."""
    rng = torch.Generator().manual_seed(0)
    c, side, pixels = backbone.channels, backbone.resolution // backbone.factor, backbone.resolution
    batch = {name: torch.randn(size, 2 * c, side, side, generator=rng) for name in ("moments", "masked_moments")}
    batch |= {name: torch.randn(size, c, side, side, generator=rng) for name in ("noise", "encode", "encode_masked")}
    batch |= {name: torch.rand(size, generator=rng) for name in ("time", "drop", "beside")}
    batch |= {"hole": torch.ones(size, 1, side, side), "weight": torch.ones(size, 1, side, side)}
    batch |= {f"hint_{branch}": torch.rand(size, 3, pixels, pixels, generator=rng) for branch in branches}
    return batch | {"tokens": backbone.tokens(["a photograph of a mushroom"] * size)}


def to_device(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}


def compute_gradients(task: ControlTask | JointTask, inputs: dict[str, torch.Tensor], step: Callable) -> torch.Tensor:
    """The loss of ``step``, compiled or not; the gradients are left in the parameters."""
    lead = task.lead if isinstance(task, JointTask) else task
    with autocast(task.backbone.device):
        errors = step(inputs, *lead.prepare_inputs(inputs))
        loss = torch.stack([*errors.values()]).sum() if isinstance(errors, dict) else errors.mean()
    loss.backward()
    return loss.detach()


def autocast(device: torch.device) -> AbstractContextManager:
    """Mixed precision in bf16 on a GPU, where both sides train in it; no-op on the CPU."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def choose_forward(task: ControlTask | JointTask) -> Callable:
    """The method of ``task`` that computes the errors or losses of a batch and its inputs."""
    return task.compute_losses if isinstance(task, JointTask) else task.compute_error


def make_our_step(task: ControlTask | JointTask, batch: dict[str, torch.Tensor]) -> Step:
    """A training step as in ``fit experiment=color``: latents from the cache, one fused update."""
    tasks = task.tasks.values() if isinstance(task, JointTask) else [task]
    groups = [group for t in tasks for group in t.group_parameters()]
    lead = task.lead if isinstance(task, JointTask) else task
    optimizer = HostAdamW(groups) if lead.offload else torch.optim.AdamW(groups, fused=True)
    device = task.backbone.device

    def step() -> torch.Tensor:
        loss = compute_gradients(task, to_device(batch, device), partial(choose_forward(task), run=lead.run))
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def count_step_tflop(task: ControlTask | JointTask, batch: dict[str, torch.Tensor]) -> float:
    """TFLOP of a step, per image, counted without compilation."""
    step = choose_forward(task)
    work = count_tflop(
        lambda: compute_gradients(task, to_device(batch, task.backbone.device), step), len(batch["noise"])
    )
    for net in task.controls.values():
        net.zero_grad()
    return work


def make_reference_step(backbone: Backbone, net: torch.nn.Module, batch: dict[str, torch.Tensor]) -> Step:
    """A training step of the common script, from pictures; ``net`` sees the noisy latent alone, as ours does."""
    device, dtype = backbone.device, backbone.dtype
    count, pixels, scale = len(batch["noise"]), backbone.resolution, backbone.vae.config.scaling_factor
    # the script casts the VAE too; diffusers' own ``to`` only adds warnings
    vae = torch.nn.Module.to(copy.deepcopy(backbone.vae), dtype)
    picture, mask = torch.rand(count, 3, pixels, pixels) * 2 - 1, torch.ones(count, 1, pixels, pixels)
    inputs = {"picture": picture, "masked": picture * (1 - mask), "tokens": batch["tokens"], "hole": batch["hole"]}
    inputs["hint"] = next(value for name, value in batch.items() if name.startswith("hint_"))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-6)

    def step() -> float:
        b = to_device(inputs, device)
        with torch.no_grad():
            z = vae.encode(b["picture"].to(dtype)).latent_dist.sample() * scale
            masked = vae.encode(b["masked"].to(dtype)).latent_dist.sample() * scale
            text = backbone.text_encoder(b["tokens"])[0]
        noise = torch.randn_like(z)
        t = torch.randint(0, len(backbone.alphas_cumprod), (count,), device=device)
        a = backbone.alphas_cumprod[t].view(-1, 1, 1, 1)
        noisy = (a.sqrt() * z + (1 - a).sqrt() * noise).to(dtype)
        with autocast(device):
            down, middle = net(noisy, t, text, b["hint"].to(dtype), return_dict=False)
            u = torch.cat([noisy, b["hole"].to(dtype), masked], 1)
            output = backbone.unet(
                u, t, text, down_block_additional_residuals=down, mid_block_additional_residual=middle
            ).sample
        loss = F.mse_loss(output.float(), noise.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


@dataclass(frozen=True)
class Load:
    """Size of a measurement: ``batch`` images a step, ``blocks`` of ``steps`` steps.

    The rest are options of our task. ``checkpointing`` holds for both sides, since they share the frozen networks.
    """

    batch: int
    steps: int
    blocks: int
    compile: bool = False
    checkpointing: bool = False
    offload: bool = False


def prepare_task(backbone: Backbone, branches: tuple[str, ...], load: Load) -> ControlTask | JointTask:
    """A task ready for its first training step; several branches are trained in one run."""
    options = {"warmup": 0, "compile": load.compile, "checkpointing": load.checkpointing, "offload": load.offload}
    backbone.unet.disable_gradient_checkpointing()  # an earlier measurement may have enabled it
    torch.manual_seed(0)
    task = (
        JointTask(backbone, branches, **options) if len(branches) > 1 else ControlTask(backbone, *branches, **options)
    )
    with backbone.device:
        task.configure_model()
    task.to(backbone.device)
    task.on_fit_start()
    return task


def bench_train(
    backbone: Backbone, load: Load, branches: tuple[str, ...] = ("color",), say: Callable[[str], None] = tell
) -> dict[str, float]:
    """Training rates in images a second, ours and the reference.

    With two branches each image counts once; the reference trains one branch after the other.
    """
    batch = make_batch(backbone, load.batch, branches)
    if backbone.device.type == "cuda":
        batch = {name: value.pin_memory() for name, value in batch.items()}
        torch.cuda.reset_peak_memory_stats()
    task = prepare_task(backbone, branches, load)
    nets = [copy.deepcopy(net) for net in task.controls.values()]
    ours = make_our_step(task, batch)
    work = count_step_tflop(task, batch)
    ours()
    memory = measure_peak_memory(backbone.device)
    steps = [make_reference_step(backbone, net, batch) for net in nets]
    work_reference = sum(count_tflop(step, load.batch) for step in steps)
    peak = measure_matmul_rate(backbone.device, torch.bfloat16 if backbone.device.type == "cuda" else torch.float32)
    say(
        f"{work:.4g} TFLOP an image, the reference {work_reference:.4g}; products of matrices run at {peak:.3g} TFLOP/s"
    )
    rates = alternate(
        ours, lambda: [step() for step in steps], load.batch, backbone.device, load.steps, load.blocks, say
    )
    facts = {"tflop": work, "reference_tflop": work_reference, "peak_tflops": peak, "memory_gib": memory}
    return rates.summarize(work, peak) | facts
