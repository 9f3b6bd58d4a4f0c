"""What a run says while its first step is compiled."""

import re
from functools import partial

import lightning
import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch import config
from torch._functorch.aot_autograd import make_boxed_func

from harmony.models.backbone import Backbone
from harmony.training import control
from harmony.training.control import ControlTask, JointTask


def fit(task: ControlTask | JointTask, data, folder, steps: int, **options) -> float:
    """Train and return the loss of the last step."""
    run = lightning.Trainer(
        accelerator="cpu", max_steps=steps, logger=False, default_root_dir=str(folder), enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, **options,
    )  # fmt: skip
    run.fit(task, data)
    return float(run.logged_metrics["train/loss"])


def test_a_run_says_that_it_compiles_and_how_long_that_took_last_time(
    random_backbone, latent_data, tmp_path, monkeypatch, capsys
):
    """Guards the two lines, the memory beside inductor's cache, and that another batch size knows nothing of it."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(control, "compile_once", lambda function: function)

    def lines(size: int) -> list[str]:
        fit(ControlTask(Backbone(str(random_backbone)), compile=True), latent_data(batch_size=size), tmp_path, 2)
        return [line for line in capsys.readouterr().out.splitlines() if "compil" in line]

    begin, end = lines(2)
    assert begin == "compiling the first step, which takes minutes"
    seconds = re.fullmatch(r"compiled: the first step took (\d+) s", end)[1]
    assert lines(2)[0] == f"compiling the first step, which took {seconds} s last time"
    assert lines(3)[0] == begin
    assert len(list((tmp_path / "cache" / "harmony").iterdir())) == 2
    fit(ControlTask(Backbone(str(random_backbone))), latent_data(batch_size=2), tmp_path, 2)
    assert "compil" not in capsys.readouterr().out


def test_what_is_compiled_in_bfloat16_is_the_step(random_backbone, latent_data, tmp_path, monkeypatch):
    """Guards module.compile as a GPU runs it, under autocast on bfloat16 networks: the losses are those of plain steps,
    one net needs nothing beyond what two needed, and every graph is there when the forward pass is: none is left to a
    thread of autograd, which would not let the main thread obey Ctrl-C.
    """
    monkeypatch.setattr(config, "force_non_lazy_backward_lowering", False)
    torch._dynamo.reset()
    compiled, early = [], []

    def keep(name):
        def compiler(graph, inputs):
            compiled.append(name)
            return make_boxed_func(graph.forward)

        return compiler

    backend = aot_autograd(fw_compiler=keep("forward"), bw_compiler=keep("backward"), inference_compiler=keep("frozen"))
    run = partial(torch.compile, fullgraph=True, dynamic=False, backend=backend)
    monkeypatch.setattr(control, "compile_once", run)
    for kind, branch in ((JointTask, ["color", "structure"]), (ControlTask, "color")):

        class Watched(kind):
            def on_before_backward(self, loss):
                early[:] = compiled

        losses, data = [], latent_data(batch_size=2, branch=branch)
        for compile in (False, True):
            torch.manual_seed(0)
            task = Watched(Backbone(str(random_backbone), dtype="bfloat16"), branch, compile=compile)
            losses.append(fit(task, data, tmp_path, 1, precision="bf16-mixed"))
        assert losses[1] == pytest.approx(losses[0], rel=1e-2)
        assert sorted(early) == ["backward", "backward", "forward", "forward", "frozen"] == sorted(compiled)
