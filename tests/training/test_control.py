"""Training one ControlNet (Liu 2025): what is trained, what stays, where gradients go, and what the loss is."""

import copy

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils._python_dispatch import TorchDispatchMode

from harmony.core.errors import UserError
from harmony.models.backbone import Backbone
from harmony.models.controlnet import export_controlnet, load_controlnet, zero_convolutions
from harmony.training import control, schedule
from harmony.training.callbacks import NaNGuard, Throughput
from harmony.training.control import ControlTask, JointTask
from harmony.training.schedule import HostAdamW

FROZEN = ("unet", "vae", "text_encoder")


@pytest.fixture
def backbone(random_backbone):
    return Backbone(str(random_backbone))


@pytest.fixture
def data(latent_data):
    data = latent_data(batch_size=4)
    data.setup()
    return data


def fresh(backbone: Backbone, **options) -> ControlTask:
    """A task ready for single steps by hand."""
    torch.manual_seed(0)
    task = ControlTask(backbone, warmup=0, **options)
    task.configure_model()
    task.on_fit_start()
    return task


def batch_of(data, first: int = 0, count: int = 4) -> dict:
    items = [data.sets["train"][first + i, first + i] for i in range(count)]
    return torch.utils.data.default_collate(items)


def trainer(folder, steps: int, *callbacks: Callback, **options) -> lightning.Trainer:
    return lightning.Trainer(
        accelerator="cpu", max_steps=steps, logger=False, callbacks=list(callbacks), default_root_dir=str(folder),
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
        use_distributed_sampler=False, **options,
    )  # fmt: skip


def gradients(task: ControlTask) -> tuple[dict[str, torch.Tensor], set[str]]:
    """Gradients by name, and the names of the zero convolutions."""
    zero = {id(p) for p in zero_convolutions(task.net)}
    named = dict(task.net.named_parameters())
    return {name: p.grad for name, p in named.items()}, {name for name, p in named.items() if id(p) in zero}


def test_gradients_arrive_in_order(backbone, data):
    """Guards their order: zero convolutions first, then trunk and the hint encoder's end, then the whole hint encoder.

    Every other gradient exists and is exactly 0, so that DDP finds no unused parameter.
    """
    task = fresh(backbone, zero_init_lr=1e-2, lr=1e-2)
    optimiser = torch.optim.AdamW(task.net.parameters(), lr=1e-2)
    moving = []
    for step in range(3):
        optimiser.zero_grad()
        task.compute_errors(batch_of(data, 4 * step))[0].mean().backward()
        grads, zero = gradients(task)
        assert all(g is not None for g in grads.values())
        moving.append({name for name, g in grads.items() if g.any()})
        optimiser.step()
    early = {n for n in grads if n.startswith("controlnet_cond_embedding.") and ".conv_out." not in n}
    end = {n for n in grads if n.startswith("controlnet_cond_embedding.conv_out.")}
    assert early and end and len(zero) == 2 * (4 + 1), (
        "one convolution a skip (conv_in, block, downsampler, block), one middle"
    )
    assert moving[0] == zero
    assert (
        end <= moving[1]
        and not early & moving[1]
        and "conv_in.weight" in moving[1]
        and "mid_block.resnets.0.conv1.weight" in moving[1]
    )
    assert early & moving[2] and "controlnet_cond_embedding.conv_in.weight" in moving[2]
    assert all(p.grad is None and not p.requires_grad for part in FROZEN for p in getattr(backbone, part).parameters())


class Watch(Callback):
    """No frozen parameter ever holds a gradient."""

    def on_after_backward(self, trainer, module):
        assert all(p.grad is None for part in FROZEN for p in getattr(module.backbone, part).parameters())


def test_only_the_controlnet_changes(backbone, data, tmp_path):
    """Guards what is frozen: after k steps its tensors are byte-equal, and checkpoints hold ControlNet keys alone."""
    before = {part: copy.deepcopy(getattr(backbone, part).state_dict()) for part in FROZEN}
    task = ControlTask(backbone, lr=1e-3, warmup=0)
    run = trainer(tmp_path, 3, Watch())
    run.fit(task, data)
    for part, state in before.items():
        now = getattr(backbone, part).state_dict()
        assert all(torch.equal(now[name], tensor) for name, tensor in state.items()), part
    run.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert set(saved) == {f"net.{name}" for name in task.net.state_dict()}
    start = fresh(Backbone(backbone.path)).net.state_dict()
    moved = [name for name, tensor in task.net.state_dict().items() if not torch.equal(tensor, start[name])]
    assert (
        any(name.startswith("controlnet_down_blocks") for name in moved) and "mid_block.resnets.0.conv1.weight" in moved
    )
    assert not any(module.training for part in FROZEN for module in getattr(backbone, part).modules())


def test_the_loss_starts_at_that_of_the_frozen_model(backbone, data, tmp_path):
    """Guards the beginning: a fresh ControlNet changes nothing; hint and no hint give the same loss to the last bit."""
    task = ControlTask(backbone, prompt_dropout=0.0)
    run = trainer(tmp_path, 1)
    first = run.validate(task, data, verbose=False)[0]
    assert first["validation/loss"] == first["validation/loss_hint_off"] > 0
    assert run.validate(task, data, verbose=False)[0] == first, "fixed noise and timesteps"
    task = fresh(backbone, prompt_dropout=0.0)
    b = batch_of(data)
    error, t = task.compute_errors(b)
    abar = backbone.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    clean, masked = backbone.latent(b["moments"], b["encode"]), backbone.latent(b["masked_moments"], b["encode_masked"])
    z = torch.cat([abar.sqrt() * clean + (1 - abar).sqrt() * b["noise"], b["hole"], masked], 1)
    plain = backbone.unet(z, t, backbone.text_encoder(b["tokens"])[0]).sample
    assert torch.allclose(error, (plain - b["noise"]) ** 2, atol=1e-5) and error.shape == (4, 4, 8, 8)


def test_prompt_dropout_empties_the_dropped_prompts_alone(backbone, data):
    """Guards the dropout: a sample is trained with the empty prompt exactly when its draw lies below the rate."""
    b = batch_of(data)
    b["drop"] = torch.tensor([0.05, 0.5, 0.09, 0.95])
    mixed = fresh(backbone, prompt_dropout=0.1).compute_errors(b)[0]
    kept, dropped = (fresh(backbone, prompt_dropout=rate).compute_errors(b)[0] for rate in (0.0, 1.0))
    empty = fresh(backbone, prompt_dropout=0.0).compute_errors(b | {"tokens": backbone.tokens([""] * 4)})[0]
    assert torch.allclose(dropped, empty, atol=1e-6) and not torch.allclose(kept, dropped, atol=1e-4)
    for i, source in enumerate((dropped, kept, dropped, kept)):
        assert torch.allclose(mixed[i], source[i], atol=1e-6)


def test_hints_of_another_range_are_refused(backbone, data):
    """Guards the range: a hint in [-1, 1] is one clear line, not a bad training."""
    task = fresh(backbone)
    b = batch_of(data)
    with pytest.raises(UserError, match=r"hint must lie in \[0, 1\]"):
        task.training_step(b | {"hint_color": 2 * b["hint_color"] - 1}, 0)
    with pytest.raises(UserError, match="module.branch=blur"):
        ControlTask(backbone, branch="blur")


def test_optimiser_groups_and_rates(backbone, data, tmp_path):
    """Guards the optimizer: AdamW, each parameter in one group, warm-up from the first step, its own rate where
    asked.
    """

    class Rates(Callback):
        def __init__(self):
            self.seen = []

        def on_before_optimizer_step(self, trainer, module, optimizer):
            self.seen.append([group["lr"] for group in optimizer.param_groups])

    rates = Rates()
    task = ControlTask(backbone, lr=1e-4, zero_init_lr=4e-4, warmup=4, weight_decay=0.02)
    run = trainer(tmp_path, 6, rates)
    run.fit(task, data)
    assert [slow for slow, _ in rates.seen] == pytest.approx([0.25e-4, 0.5e-4, 0.75e-4, 1e-4, 1e-4, 1e-4])
    assert all(fast == pytest.approx(4 * slow) for slow, fast in rates.seen)
    optimiser = run.optimizers[0]
    assert isinstance(optimiser, torch.optim.AdamW) and {g["weight_decay"] for g in optimiser.param_groups} == {0.02}
    listed = [id(p) for group in optimiser.param_groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in task.net.parameters())
    assert {id(p) for p in zero_convolutions(task.net)} < {id(p) for p in optimiser.param_groups[1]["params"]}


def test_figures_are_of_the_step_that_is_logged(backbone, data, tmp_path):
    """Guards the log: with log_every_n_steps = 2 the levels and the gradient norm are those of steps 2 and 4."""

    class Seen(Callback):
        def __init__(self):
            self.logged, self.norms = [], []

        def on_before_optimizer_step(self, trainer, module, optimizer):
            squares = [p.grad.square().sum() for p in zero_convolutions(module.net)]
            self.norms.append(float(torch.stack(squares).sum().sqrt()))

        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            self.logged.append({k: float(v) for k, v in trainer.logged_metrics.items()})

    seen = Seen()
    run = trainer(tmp_path, 4, seen)
    run.log_every_n_steps = 2
    run.fit(ControlTask(backbone, lr=1e-3, warmup=0), data)
    for step in (1, 3):
        assert seen.logged[step]["train/zero_conv_grad"] == pytest.approx(seen.norms[step])
        levels = [seen.logged[step][f"train/loss_t{n}"] for n in range(4)]
        assert all(v >= 0 for v in levels) and sum(v > 0 for v in levels) >= 1
    assert seen.norms[1] != pytest.approx(seen.norms[0])


def test_joint_training_is_two_separate_ones(backbone, latent_data, tmp_path):
    """Guards the joint run: after three steps each net is, within rounding, that of a run of its own."""
    branches, options = ["color", "structure"], {"lr": 1e-3, "zero_init_lr": 4e-3, "warmup": 2, "prompt_dropout": 0.5}

    def trained(task, branch, name):
        torch.manual_seed(0)
        data = latent_data(batch_size=4, branch=branch)
        trainer(tmp_path / name, 3).fit(task, data)
        return task.controls

    together = trained(JointTask(backbone, branches, **options), branches, "joint")
    for branch in branches:
        alone = trained(ControlTask(backbone, branch, **options), branch, branch)[branch].state_dict()
        for name, tensor in together[branch].state_dict().items():
            torch.testing.assert_close(tensor, alone[name], atol=1e-6, rtol=1e-5)
        fresh_net = fresh(backbone, branch=branch).net.state_dict()
        assert any(not torch.equal(alone[name], fresh_net[name]) for name in alone)


def test_a_companion_runs_in_its_share_and_stays_as_it_is(backbone, awake, latent_data, tmp_path):
    """Guards the companion: in samples beyond its share the output is that without it, in the others another one; its
    weights neither move nor enter a checkpoint; a fresh net beside it is the companion alone.
    """
    data = latent_data(batch_size=4, branch=["structure", "color"])
    data.setup()
    net = awake(backbone, 3)
    folder = export_controlnet(net, tmp_path, "color", {"blur": 1.25, "normalize": True}, backbone)
    batch = batch_of(data)
    batch["beside"] = torch.tensor([0.1, 0.4, 0.6, 0.9])
    alone, beside = (
        fresh(backbone, branch="structure"),
        fresh(backbone, branch="structure", companion=str(folder.parent)),
    )
    with torch.no_grad():
        (a, _), (b, _) = alone.compute_errors(batch), beside.compute_errors(batch)
        colour = fresh(backbone, branch="color")
        colour.net = net
        c, _ = colour.compute_errors(batch)
    assert torch.equal(a[2:], b[2:]) and torch.allclose(b[:2], c[:2]) and not torch.allclose(a[:2], b[:2], rtol=1e-3)
    assert set(beside.state_dict()) == set(alone.state_dict())
    trainer(tmp_path, 2).fit(beside, data)
    assert all(torch.equal(v, net.state_dict()[n]) for n, v in beside.companion.net.state_dict().items())
    beside.check(data)
    with pytest.raises(UserError, match=r"data.branch=\[structure,color\]"):
        beside.check(latent_data(branch="structure"))
    data.recipes["train"].hints["color"] = {"blur": 4, "normalize": True}
    with pytest.raises(UserError, match="the companion was trained on color hints .*data.hints.color="):
        beside.check(data)


def test_joint_training_wants_a_list_of_branches(backbone):
    """Guards bad input: one branch as text, or one twice."""
    for wrong in ("color", ["color", "color"]):
        with pytest.raises(UserError, match="list each branch once"):
            JointTask(backbone, wrong)


def loss_of(task: ControlTask | JointTask, batch: dict) -> torch.Tensor:
    """What a training step takes the gradient of."""
    if isinstance(task, ControlTask):
        return task.compute_errors(batch)[0].mean()
    losses = task.compute_losses(batch, *task.lead.prepare_inputs(batch), run=task.lead.run)
    return torch.stack([*losses.values()]).sum()


def start_of(kind: type, backbone: Backbone, **options) -> ControlTask | JointTask:
    """A task whose nets answer, ready for steps by hand."""
    torch.manual_seed(0)
    task = kind(backbone, **options)
    task.configure_model()
    task.on_fit_start()
    with torch.no_grad():
        for net in task.controls.values():
            for p in zero_convolutions(net):
                p.fill_(0.01)
    return task


def hinted(data) -> dict:
    batch = batch_of(data)
    return batch | {"hint_structure": 1 - batch["hint_color"]}


@pytest.mark.parametrize("kind", [ControlTask, JointTask])
def test_a_compiled_step_is_three_graphs_that_nets_share(backbone, data, kind, monkeypatch):
    """Guards what module.compile costs: the UNet's halves and a ControlNet are traced once each, for two nets too."""
    torch._dynamo.reset()
    graphs = []

    def capture(function):
        return torch.compile(function, fullgraph=True, dynamic=False, backend=keep)

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(control, "compile_once", capture)
    compiled, plain = start_of(kind, backbone, compile=True), start_of(kind, backbone)
    for _ in range(2):
        assert torch.equal(loss_of(compiled, hinted(data)), loss_of(plain, hinted(data)))
    assert len(graphs) == 3, "another net, or another step, was traced anew: TORCH_LOGS=recompiles says why"


@pytest.mark.slow
def test_compiled_steps_in_bfloat16_are_the_steps(backbone, data):
    """Guards module.compile as a GPU runs it, by inductor under autocast on bfloat16 networks: losses and gradients."""
    torch._dynamo.reset()
    for kind in (JointTask, ControlTask):
        results = []
        for compile in (False, True):
            task = start_of(kind, Backbone(backbone.path, dtype="bfloat16"), compile=compile)
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(task, hinted(data))
            loss.backward()
            results.append((loss.item(), torch.cat([p.grad.flatten() for p in task.parameters()])))
        (plain, gradient), (loss, compiled) = results
        assert loss == pytest.approx(plain, rel=1e-2)
        assert torch.cosine_similarity(compiled, gradient, dim=0) > 0.99


@pytest.mark.parametrize(
    ("kind", "options"),
    [(ControlTask, {}), (ControlTask, {"checkpointing": True}), (ControlTask, {"offload": True}), (JointTask, {})],
)
def test_bfloat16_trains_as_float32_does(backbone, latent_data, tmp_path, kind, options):
    """Guards the precision of full size: a step on bfloat16 networks under autocast has float32's loss within rounding
    and moves float32 weights.
    """
    data, losses = latent_data(batch_size=4, branch=["color", "structure"] if kind is JointTask else "color"), []
    for dtype, precision in (("float32", "32-true"), ("bfloat16", "bf16-mixed")):
        torch.manual_seed(0)
        task, run = (
            kind(Backbone(backbone.path, dtype=dtype), lr=1e-3, warmup=0, **options),
            trainer(tmp_path, 2, precision=precision),
        )
        run.fit(task, data)
        losses.append({name: float(v) for name, v in run.logged_metrics.items() if name.startswith("train/loss")})
        assert all(p.dtype == torch.float32 for p in task.parameters())
        assert any(p.any() for net in task.controls.values() for p in zero_convolutions(net)), "nothing moved"
    assert losses[0] == pytest.approx(losses[1], rel=3e-2) and losses[0] != losses[1]


def test_checkpointing_changes_no_gradient(backbone, data):
    """Guards module.checkpointing: less is kept, and every gradient is the same."""
    found = []
    for option in (False, True):
        task = fresh(Backbone(backbone.path), checkpointing=option)
        with torch.no_grad():
            for p in zero_convolutions(task.net):
                p.fill_(0.01)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            error = task.compute_errors(batch_of(data))[0].mean()
        error.backward()
        found.append((sum(kept), {name: p.grad for name, p in task.net.named_parameters()}))
    (whole, plain), (less, again) = found
    assert less < 0.6 * whole
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-5, atol=1e-7)


class Reads(TorchDispatchMode):
    """Counts how often the host reads a value of a tensor, which waits for all that a GPU has been asked before."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [ControlTask, JointTask])
def test_a_step_never_waits_for_the_device(backbone, latent_data, tmp_path, kind):
    """Guards the rate on a GPU: from batch to optimizer step, and in the callbacks of every run, nothing is read back
    in steps that no logger reports.
    """
    branches = ["color", "structure"] if kind is JointTask else "color"
    data = latent_data(batch_size=4, branch=branches)
    data.setup()

    class Watched(Callback):
        def __init__(self):
            self.mode, self.seen = Reads(), []

        def on_train_batch_start(self, trainer, module, batch, index):
            self.mode.count = 0
            self.mode.__enter__()

        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            self.mode.__exit__(None, None, None)
            self.seen.append(self.mode.count)

    run, watched = trainer(tmp_path, 4, Watched(), NaNGuard(), Throughput()), None
    run.log_every_n_steps = 1000
    (watched,) = (c for c in run.callbacks if isinstance(c, Watched))
    run.fit(kind(backbone), data)
    assert watched.seen[0] > 0, "the first step looks at the hints"
    assert watched.seen[1:] == [0, 0, 0]


def test_the_update_is_one_kernel_unless_gradients_are_clipped(backbone, data, tmp_path):
    """Guards the optimizer: fused, and a run that clips in mixed precision begins instead of ending in a traceback."""
    for options, fused in (({}, True), ({"gradient_clip_val": 1.0, "precision": "bf16-mixed"}, False)):
        run = trainer(tmp_path, 1, **options)
        run.fit(ControlTask(backbone), data)
        assert run.optimizers[0].defaults["fused"] is fused


def test_the_update_in_host_memory_is_the_update(backbone, data, tmp_path):
    """Guards ``offload``: the same weights to the last bit, also when the run is stopped and goes on."""
    nets, where = [], tmp_path / "stopped.ckpt"
    for offload, parts in ((False, [4]), (True, [2, 4])):
        for steps in parts:
            torch.manual_seed(0)
            task, run = ControlTask(backbone, lr=1e-3, warmup=2, offload=offload), trainer(tmp_path, steps)
            run.fit(task, data, ckpt_path=where if steps == 4 and offload else None)
            run.save_checkpoint(where)
        nets.append(task.net.state_dict())
    assert isinstance(run.optimizers[0], HostAdamW)
    assert all(torch.equal(value, nets[1][name]) for name, value in nets[0].items())


def test_channels_last_changes_no_run(backbone, data, tmp_path, monkeypatch):
    """Guards the layout that a GPU trains in: weights, gradients and moments have it; a run that is stopped goes on to
    the last bit, also on a checkpoint from a device with the other layout; what is exported is contiguous.
    """

    class Strides(Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            for p in module.parameters():
                assert p.grad.stride() == p.stride() or 1 in p.shape

    def flat(net: torch.nn.Module) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in net.parameters()])

    def trained(layout: torch.memory_format, steps: int, checkpoint=None) -> ControlTask:
        monkeypatch.setattr(schedule, "memory_format", lambda device: layout)
        torch.manual_seed(0)
        task, run = ControlTask(Backbone(backbone.path), lr=1e-3, warmup=2), trainer(tmp_path, steps, Strides())
        run.fit(task, data, ckpt_path=checkpoint)
        run.save_checkpoint(tmp_path / f"{steps}.ckpt")
        for p, state in run.optimizers[0].state.items():
            assert state["exp_avg"].stride() == state["exp_avg_sq"].stride() == p.stride()
        return task

    last, plain = torch.channels_last, torch.contiguous_format
    unbroken = trained(last, 4)
    weight = unbroken.net.mid_block.resnets[0].conv1.weight
    assert weight.is_contiguous(memory_format=last) and not weight.is_contiguous()
    trained(last, 2)
    resumed = trained(last, 4, tmp_path / "2.ckpt").net.state_dict()
    assert all(torch.equal(v, resumed[name]) for name, v in unbroken.net.state_dict().items())
    halfway = flat(trained(plain, 2).net)
    elsewhere = trained(last, 4, tmp_path / "2.ckpt").net
    end = flat(unbroken.net)
    assert (flat(elsewhere) - end).norm() < 0.05 * (end - halfway).norm()
    folder = export_controlnet(unbroken.net, tmp_path, "color", {"blur": 1.25, "normalize": True}, backbone)
    exported = load_controlnet(folder).state_dict()
    assert all(torch.equal(v, exported[name]) for name, v in unbroken.net.state_dict().items())
    assert all(v.is_contiguous() for v in exported.values())
