"""Fusion of ControlNets, guidance, and the nine channels of the inpainting UNet."""

from collections import OrderedDict
from dataclasses import replace
from types import SimpleNamespace

import diffusers
import pytest
import torch

from harmony.core.errors import UserError
from harmony.models.attention import ConstantOutput
from harmony.models.backbone import Backbone
from harmony.sampling import cuda_graphs
from harmony.sampling import guidance as inpaint_module
from harmony.sampling.ddim import step, timesteps
from harmony.sampling.guidance import (
    SOLVERS,
    GuidedModel,
    Schedule,
    compile_once,
    control_residuals,
    embed_hints,
    inpaint,
    predict,
    predict_mean,
)


@pytest.fixture(scope="module")
def scene(random_backbone, awake):
    """A backbone, two ControlNets with their hints, and everything that sampling starts from."""
    backbone, rng = Backbone(str(random_backbone)), torch.Generator().manual_seed(0)

    s = SimpleNamespace(backbone=backbone)
    s.noise = torch.randn(2, 4, 8, 8, generator=rng)
    s.hole = (torch.rand(2, 1, 8, 8, generator=rng) > 0.5).float()
    s.masked = torch.randn(2, 4, 8, 8, generator=rng)
    s.known = torch.cat([s.hole, s.masked], 1)
    s.text, s.empty = backbone.prompt(["a red mushroom", "a blue car"]), backbone.prompt([""])
    s.nets = [awake(backbone, 1), awake(backbone, 2)]
    s.hints = [torch.rand(2, 3, 32, 32, generator=rng) for _ in s.nets]
    s.t = torch.tensor([481, 481])

    def run(*weights, steps=3, guidance=2.0, **more):
        controls = list(zip(s.nets, s.hints, weights, strict=False))
        return inpaint(
            backbone, s.noise, s.hole, s.masked, s.text, s.empty, Schedule(steps, guidance, **more), controls
        )

    s.run = run
    return s


@pytest.fixture
def count(scene):
    """Batch sizes of all evaluations of the ControlNets and of the UNet."""
    calls = {"net": [], "unet": []}
    hooks = [net.conv_in.register_forward_hook(lambda m, x, y: calls["net"].append(len(x[0]))) for net in scene.nets]
    hooks.append(scene.backbone.unet.conv_in.register_forward_hook(lambda m, x, y: calls["unet"].append(len(x[0]))))
    yield calls
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def residuals(scene, *weights):
    controls = list(zip(scene.nets, scene.hints, weights, strict=True))
    down, middle = control_residuals(
        embed_hints(controls), torch.cat([scene.noise, scene.known], 1), scene.t, scene.text
    )
    return [*down, middle]


def test_fusion_is_linear(scene):
    for both, first, second in zip(
        residuals(scene, 0.7, 0.3), residuals(scene, 1, 0), residuals(scene, 0, 1), strict=True
    ):
        assert first.abs().max() > 1e-3
        assert second.abs().max() > 1e-3
        torch.testing.assert_close(both, 0.7 * first + 0.3 * second, rtol=1e-5, atol=1e-6)


def test_no_weight_is_plain_inpainting_and_runs_no_net(scene, count):
    plain = scene.run()
    assert torch.equal(scene.run(0, 0), plain)
    assert count["net"] == []
    assert not torch.equal(scene.run(1, 0), plain)


def test_one_weight_is_the_single_net(scene, count):
    both = scene.run(1, 0)
    assert len(count["net"]) == 3  # the first net, once a step
    assert torch.equal(scene.run(1), both)
    assert not torch.equal(scene.run(1, 1), both)


@torch.no_grad()
def test_channel_order_matters(scene):
    right = predict(scene.backbone.unet, scene.noise, torch.cat([scene.hole, scene.masked], 1), scene.t, scene.text)
    wrong = predict(scene.backbone.unet, scene.noise, torch.cat([scene.masked, scene.hole], 1), scene.t, scene.text)
    assert (right - wrong).abs().max() > 1e-3


@torch.no_grad()
def test_guidance(scene, count):
    def eps(w, text=scene.text):
        return GuidedModel(scene.backbone, scene.known, text, scene.empty, Schedule(guidance=w))(scene.noise, 481)

    conditional, unconditional = eps(1), eps(1, scene.empty.expand_as(scene.text))
    assert count["unet"] == [2, 2]  # w = 1 needs one half only
    torch.testing.assert_close(eps(0), unconditional, rtol=1e-5, atol=1e-6)
    expected = unconditional + 7.5 * (conditional - unconditional)
    torch.testing.assert_close(eps(7.5), expected, rtol=1e-4, atol=1e-5)
    assert count["unet"][2:] == [4, 4]
    assert (conditional - unconditional).abs().max() > 1e-4


def test_the_same_noise_gives_the_same_latent(scene):
    assert torch.equal(scene.run(1, 1), scene.run(1, 1))


def test_a_backbone_that_predicts_v_gives_eps(scene, random_backbone):
    """Guards the conversion: guidance and all, eps = sqrt(a) v + sqrt(1 - a) z; other kinds are one line."""
    e, v, other = (Backbone(str(random_backbone)) for _ in range(3))
    v.scheduler.register_to_config(prediction_type="v_prediction")
    other.scheduler.register_to_config(prediction_type="sample")
    z, t = torch.randn(scene.known.shape[0], 4, *scene.known.shape[2:]), 300
    out, eps = (
        GuidedModel(backbone, scene.known, scene.text, scene.empty, Schedule(guidance=2.0))(z, t) for backbone in (e, v)
    )
    a = e.alphas_cumprod[t]
    torch.testing.assert_close(eps, a.sqrt() * out + (1 - a).sqrt() * z)
    with pytest.raises(UserError, match="predicts 'sample'"):
        GuidedModel(other, scene.known, scene.text, scene.empty, Schedule(guidance=2.0))(z, t)


@torch.no_grad()
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_what_is_computed_once_changes_no_bit(scene, guidance):
    """Guards the exact mode: hints' embeddings and the words' keys and values computed once give the latents of the
    stock networks, run whole in every step; afterwards the networks are themselves again.
    """
    backbone, abar = scene.backbone, scene.backbone.alphas_cumprod
    before = [name for net in (backbone.unet, *scene.nets) for name, _ in net.named_modules()]
    z, both = scene.noise, torch.cat([scene.empty.expand_as(scene.text), scene.text])
    for t in timesteps(3):
        u, rows = torch.cat([z, scene.known], 1), 1 if guidance == 1 else 2
        u, text, time = u.repeat(rows, 1, 1, 1), both[-2 * rows :], torch.full((2 * rows,), t)
        made = [
            net(u[:, :4], time, text, hint.repeat(rows, 1, 1, 1), conditioning_scale=w, return_dict=False)
            for net, hint, w in zip(scene.nets, scene.hints, (1.0, 0.5), strict=True)
        ]
        down = [a + b for a, b in zip(made[0][0], made[1][0], strict=True)]
        added = {"down_block_additional_residuals": down, "mid_block_additional_residual": made[0][1] + made[1][1]}
        e = backbone.unet(u, time, text, **added, return_dict=False)[0]
        e = e if guidance == 1 else e[:2] + guidance * (e[2:] - e[:2])
        z = step(z, e, t, t - len(abar) // 3, abar)
    assert torch.equal(scene.run(1.0, 0.5, guidance=guidance), z)
    assert [name for net in (backbone.unet, *scene.nets) for name, _ in net.named_modules()] == before


def test_the_networks_are_whole_again_after_an_error(scene, monkeypatch):
    def fails(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(GuidedModel, "output", fails)
    with pytest.raises(KeyboardInterrupt):
        scene.run(1, 1)
    assert not any(isinstance(m, ConstantOutput) for net in (scene.backbone.unet, *scene.nets) for m in net.modules())


def test_guidance_on_a_part_of_the_steps(scene, count):
    """Guards near-exact guidance: behind its share one half runs; a share of 1 is the whole, of 0 no guidance."""
    whole, half = scene.run(1, steps=4), scene.run(1, steps=4, guided=0.5)
    assert count["unet"] == count["net"] == [4, 4, 4, 4, 4, 4, 2, 2]
    assert torch.equal(scene.run(1, steps=4, guided=1.0), whole) and not torch.equal(half, whole)
    none = scene.run(1, steps=4, guided=0.0)
    assert torch.equal(none, scene.run(1, steps=4, guidance=1.0))
    assert count["unet"][12:] == [2] * 8


def test_encoder_propagation(scene, count):
    """Guards near-exact encoders: they run in every n-th step alone, the second half with the time of its own step; a
    change of the number of halves makes them run again.
    """
    whole = scene.run(1, 1, steps=5)
    count["unet"].clear(), count["net"].clear()
    some = scene.run(1, 1, steps=5, encoder_every=2)
    assert count["unet"] == [4, 4, 4] and len(count["net"]) == 6
    assert not torch.equal(some, whole) and (some - whole).abs().mean() < 0.5 * (whole - scene.noise).abs().mean()
    assert torch.equal(scene.run(1, 1, steps=5, encoder_every=1), whole)
    count["unet"].clear()
    scene.run(1, steps=4, encoder_every=4, guided=0.5)
    assert count["unet"] == [4, 2]


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_solver_is_that_of_diffusers(scene, solver):
    """Guards the solvers: the same latents as diffusers' scheduler makes of the same eps; of v for a backbone that
    predicts it, too.
    """
    if solver == "ddim":
        kind, options = diffusers.DDIMScheduler, {}
    else:
        kind, options = getattr(diffusers, SOLVERS[solver]), {"prediction_type": "epsilon"}
    scheduler = kind.from_config(scene.backbone.scheduler.config, **options)
    scheduler.set_timesteps(6)
    eps, z = GuidedModel(scene.backbone, scene.known, scene.text, scene.empty, Schedule(6, 2.0)), scene.noise
    with torch.no_grad():
        for t in scheduler.timesteps:
            z = scheduler.step(eps(z, int(t)), t, z, return_dict=False)[0]
    torch.testing.assert_close(scene.run(steps=6, solver=solver), z, rtol=1e-4, atol=1e-4)


def test_a_schedule_that_means_nothing_is_refused():
    for wrong, said in (
        ({"solver": "euler"}, "solver=euler: choose one of ddim, dpmsolver"),
        ({"guided": 1.5}, "guided=1.5: give a share"),
        ({"encoder_every": 0}, "encoder_every=0: give 1"),
        ({"graphs": 1}, "graphs=1: give true or false"),
        ({"compile": "yes"}, "compile=yes: give true or false"),
    ):
        with pytest.raises(UserError, match=said):
            Schedule(**wrong)


class Buffers:
    """What a CUDA graph is to its caller, on a CPU: the step reads the tensors that it was recorded with, and nothing
    else.
    """

    recorded = []

    def __init__(self, step, *inputs):
        self.step, self.inputs = step, [x.clone() for x in inputs]
        Buffers.recorded.append((step.__name__, len(inputs[1])))
        step(*self.inputs)

    def __call__(self, *inputs):
        for own, x in zip(self.inputs, inputs, strict=True):
            own.copy_(x)
        return self.step(*self.inputs)


@pytest.fixture
def recorded(monkeypatch):
    """Recordings as on a GPU, made by ``Buffers``: what was recorded, (kind of step, rows) each."""
    monkeypatch.setattr(cuda_graphs, "_recordings", OrderedDict())
    monkeypatch.setattr(Buffers, "recorded", [])

    class Recorded(GuidedModel):
        def __init__(self, backbone, known, text, empty, schedule, controls=()):
            super().__init__(backbone, known, text, empty, replace(schedule, graphs=False), controls)
            if schedule.graphs:
                self.recording = cuda_graphs.get_recording(self.network.key(), self.network, Buffers)

    monkeypatch.setattr(inpaint_module, "GuidedModel", Recorded)
    return Buffers.recorded


@pytest.mark.parametrize(
    "more",
    [{}, {"guided": 0.5}, {"encoder_every": 2}, {"encoder_every": 2, "guided": 0.5, "solver": "unipc"}],
    ids=str,
)
def test_a_recording_serves_every_later_batch(scene, recorded, more):
    """Guards graphs that are kept: other latents, holes, words and hints of the same shapes go through the graphs of
    the first batch to the numbers of plain steps; other weights are another recording.
    """

    def batch(seed: int, graphs: bool, weights=(0.7, 0.3)):
        rng = torch.Generator().manual_seed(seed)
        noise, masked = torch.randn(2, 2, 4, 8, 8, generator=rng)
        hole = (torch.rand(2, 1, 8, 8, generator=rng) > 0.5).float()
        hints = [torch.rand(2, 3, 32, 32, generator=rng) for _ in scene.nets]
        words = scene.backbone.prompt([f"a car {seed}", "a blue mushroom" * seed])
        controls = list(zip(scene.nets, hints, weights, strict=True))
        schedule = Schedule(4, 2.0, graphs=graphs, **more)
        return inpaint(scene.backbone, noise, hole, masked, words, scene.empty, schedule, controls)

    first, plain_first = batch(1, True), batch(1, False)
    count = len(recorded)
    second, plain_second = batch(2, True), batch(2, False)
    assert torch.equal(first, plain_first) and torch.equal(second, plain_second) and not torch.equal(first, second)
    assert len(recorded) == count == len(set(recorded)), "each step is recorded once"
    assert torch.equal(batch(1, True), plain_first)
    assert torch.equal(batch(2, True, (1.0, 0.0)), batch(2, False, (1.0, 0.0))) and len(recorded) > count


def test_a_recording_serves_other_schedules(scene, recorded):
    """Guards what a second half reads: the activations for as many rows as it has, whatever was recorded in between."""
    for more in ({}, {"guided": 0.5}, {"encoder_every": 2}, {"encoder_every": 2, "guided": 0.5}):
        plain = scene.run(0.7, 0.3, steps=4, **more)
        assert torch.equal(scene.run(0.7, 0.3, steps=4, graphs=True, **more), plain), more
    assert sorted(recorded) == [("run", 2), ("run", 4), ("run_second_half", 2), ("run_second_half", 4)]


def test_few_recordings_are_kept(scene, recorded):
    """Guards memory: the recordings that were used last stay, others go."""
    for weight in (0.1, 0.2, 0.3, 0.4, 0.1, 0.5):
        scene.run(weight, graphs=True, steps=1)
    kept = list(cuda_graphs._recordings.values())
    assert len(kept) == cuda_graphs.MAX_RECORDINGS
    assert [r.network.controls[0][2] for r in kept] == [0.3, 0.4, 0.1, 0.5]


@pytest.mark.slow
def test_compiled_halves_give_the_same_latents(scene):
    """Guards ``compile``: equal up to rounding; both ControlNets, other weights and the next batch compile nothing
    anew.
    """
    torch._dynamo.reset()
    compile_once.cache_clear()
    plain, compiled = scene.run(0.7, 0.3), scene.run(0.7, 0.3, compile=True)
    torch.testing.assert_close(compiled, plain, rtol=1e-3, atol=1e-4)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == 3, "encode, decode, and one for both ControlNets"
    torch.testing.assert_close(scene.run(0.2, 1, compile=True), scene.run(0.2, 1), rtol=1e-3, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to record")
def test_graphs_want_a_gpu(scene):
    """Guards ``graphs`` where nothing can be recorded: one line, no traceback out of CUDA."""
    with pytest.raises(UserError, match="graphs=true records what a GPU does, and the backbone is on the cpu"):
        scene.run(1, 1, graphs=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a GPU")
@pytest.mark.parametrize(
    "more", [{}, {"guided": 0.5}, {"encoder_every": 2}, {"encoder_every": 2, "guided": 0.5, "solver": "unipc"}]
)
def test_graphs_replay_the_same_latents(random_backbone, awake, more):
    """Guards CUDA graphs and streams: the latents of the plain steps, also where halves are skipped, of the batch that
    was recorded and of the next.
    """
    backbone, rng = Backbone(str(random_backbone)).to("cuda"), torch.Generator().manual_seed(0)
    nets = [awake(backbone, n).to("cuda") for n in (1, 2)]
    for words in (["a red mushroom", "a blue car"], ["a house", "snow"]):
        controls = [(net, torch.rand(2, 3, 32, 32, generator=rng).cuda(), 0.7) for net in nets]
        noise, masked = torch.randn(2, 2, 4, 8, 8, generator=rng).cuda()
        text = backbone.prompt(words), backbone.prompt([""])
        plain, replayed = (
            inpaint(
                backbone,
                noise,
                torch.ones_like(noise[:, :1]),
                masked,
                *text,
                Schedule(4, 2.0, graphs=g, **more),
                controls,
            )
            for g in (False, True)
        )
        torch.testing.assert_close(replayed, plain, rtol=1e-4, atol=1e-4)


def test_the_mean_is_the_noisiest_prediction_in_one_evaluation(scene, count):
    """Guards ``predict_mean``: the clean latent of the last timestep, the same for a noise and its negative, from one
    pass through the networks; guidance counts.
    """
    s = scene
    controls = [(s.nets[0], s.hints[0], 0.7)]

    def mean(noise: torch.Tensor, guidance: float = 1.0) -> torch.Tensor:
        schedule = Schedule(50, guidance)
        return predict_mean(s.backbone, noise, s.hole, s.masked, s.text, s.empty, schedule, controls)

    result = mean(s.noise)
    assert count == {"net": [4], "unet": [4]}
    torch.testing.assert_close(mean(-s.noise), result, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(mean(s.noise, 3.0), result, atol=1e-3)
    t, a, clean = torch.full((2,), 999), s.backbone.alphas_cumprod[-1], []
    for noise in (s.noise, -s.noise):
        parts = control_residuals(embed_hints(controls), torch.cat([noise, s.known], 1), t, s.text)
        output = s.backbone.unet(
            torch.cat([noise, s.known], 1), t, s.text, down_block_additional_residuals=parts[0],
            mid_block_additional_residual=parts[1],
        ).sample  # fmt: skip
        clean.append((noise - (1 - a).sqrt() * output) / a.sqrt())
    torch.testing.assert_close(result, (clean[0] + clean[1]) / 2, atol=1e-3, rtol=1e-3)
