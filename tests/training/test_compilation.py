"""What a run says while its first step is compiled."""

import re

import lightning
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch import config
from torch._functorch.aot_autograd import make_boxed_func

from harmony.models.backbone import Kit
from harmony.training import control
from harmony.training.control import ControlTask


def fit(task: ControlTask, data, folder, steps: int) -> None:
    lightning.Trainer(
        accelerator="cpu", max_steps=steps, logger=False, default_root_dir=str(folder), enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
    ).fit(task, data)  # fmt: skip


def test_a_run_says_that_it_compiles_and_how_long_that_took_last_time(
    random_kit, latent_data, tmp_path, monkeypatch, capsys
):
    """Guards the two lines, the memory beside inductor's cache, and that another batch size knows nothing of it."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(control, "compiled_once", lambda function: function)

    def lines(size: int) -> list[str]:
        fit(ControlTask(Kit(str(random_kit)), compile=True), latent_data(batch_size=size), tmp_path, 2)
        return [line for line in capsys.readouterr().out.splitlines() if "compil" in line]

    begin, end = lines(2)
    assert begin == "compiling the first step, which takes minutes"
    seconds = re.fullmatch(r"compiled: the first step took (\d+) s", end)[1]
    assert lines(2)[0] == f"compiling the first step, which took {seconds} s last time"
    assert lines(3)[0] == begin
    assert len(list((tmp_path / "cache" / "harmony").iterdir())) == 2
    fit(ControlTask(Kit(str(random_kit))), latent_data(batch_size=2), tmp_path, 2)
    assert "compil" not in capsys.readouterr().out


def test_the_backward_pass_is_compiled_by_the_main_thread(random_kit, latent_data, tmp_path, monkeypatch):
    """Guards Ctrl-C on a GPU: all graphs are there when the forward pass is, none is left to a thread of autograd."""
    monkeypatch.setattr(config, "force_non_lazy_backward_lowering", False)
    torch._dynamo.reset()
    compiled, forward_only = [], []

    def keep(name):
        def compiler(graph, inputs):
            compiled.append(name)
            return make_boxed_func(graph.forward)

        return compiler

    backend = aot_autograd(fw_compiler=keep("forward"), bw_compiler=keep("backward"), inference_compiler=keep("frozen"))
    monkeypatch.setattr(
        control, "compiled_once", lambda f: torch.compile(f, fullgraph=True, dynamic=False, backend=backend)
    )

    class Watched(ControlTask):
        def on_before_backward(self, loss):
            forward_only.extend(compiled)

    fit(Watched(Kit(str(random_kit)), compile=True), latent_data(batch_size=2), tmp_path, 1)
    assert sorted(forward_only) == ["backward", "backward", "forward", "forward", "frozen"] == sorted(compiled)
    assert config.force_non_lazy_backward_lowering
