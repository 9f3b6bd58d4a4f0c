"""Values that no option can have: over all commands each ends in one line with exit code 2, before anything is done."""

import importlib
import sys

import numpy as np
import pytest

from harmony.cli import command as cli_command
from harmony.cli import explain
from harmony.cli.compose import compose
from harmony.pixels.images import write_image

START = {
    "harmonize": "composite=c.png mask=m.png",
    "edit": "image=c.png source=car target=cat",
    "evaluate": "logger=none",
    "prepare": "",
    "export": "run=c.png",
    "bench": "what=[train]",
    "browse": "",
    "demo": "",
    "doctor": "check=python",
    "fit": "experiment=color logger=none",
    "fit ": "experiment=textual_inversion logger=none token=<a> init=car dataset.dir=.",
    "evaluate ": "experiment=table1 logger=none",
}
BAD = {
    "harmonize": """
        seed=-1 seed=4294967296 seed=abc seed=1.5 seed=null seed=[1] seed=true seed={a:1}
        steps=0 steps=1000 steps=-5 steps=abc steps=null steps=2.5 steps=nan steps=inf steps=[] steps=true
        guidance=abc guidance=nan guidance=inf guidance=[1] guidance=true guidance={a:1} guidance=1e400
        lambda_l=abc lambda_l=nan lambda_l=-inf lambda_l=[] lambda_l=null lambda_h=inf lambda_h=true
        batch=0 batch=-1 batch=abc batch=null batch=1.5 rounds=0 rounds=abc rounds=null
        feather=-1 feather=nan feather=abc feather=inf feather=null feather=[1]
        raw=abc raw=2 raw=null raw=[] graphs=perhaps compile=3 graphs=null
        box=1,2,3 box=1,2,3,4,5 box=a,b,c,d box=[] box=nan,0,1,1 box=inf,0,1,1 box={a:1} box=5 box=true
        solver=euler solver=1 solver=null solver=[] guided=2 guided=-0.1 guided=abc guided=nan
        encoder_every=0 encoder_every=-1 encoder_every=1.5 encoder_every=half
        model=huge model=1e400 model=[] model.dtype=int8 model.dtype=3 model.weights=some model.attention=fast
        model.path=[] method=none_such method=-1 method=[] method=true
        zero_shot.refine=-1 zero_shot.refine=abc zero_shot.lr=nan zero_shot.edges=abc zero_shot.detail=5 zero_shot=3
        paths=1 paths.runs=[] paths.runs='' unknown=1 sed=1 =5 composite
    """,
    "edit": """
        steps=0 steps=1.5 inner=-1 inner=few threshold=2 threshold=nan threshold=abc
        cross_attention_steps=-0.1 cross_attention_steps=abc self_attention_steps=1.1 self_attention_steps=[1]
        mode=remove mode=1 local=abc local=2 paste=abc paste=null guidance=abc guidance=inf reweight=[1]
        reweight={blue:nan} reweight={blue:many} seed=1
    """,
    "evaluate": """
        limit=-1 limit=0 limit=abc limit=1.5 limit=true limit=[] split=all split=1 split=null steps=abc seed=-1
        study=none_such study=-1 study=[] study.shown=0 study.shown=abc study=comparison,editing dataset=0
        dataset=none_such resume=3 resume=[] logger=tensorboard name=[]
    """,
    "evaluate ": """
        study.eval_set=all study.lambdas=abc study.lambdas=[a] study.lambdas=[nan] study.pairs=none study.figure=bar
        study.degrade=[0] study.degrade=2 study.radius=-1 study.radius=nan study.rows=[] study.rows.ours=[1]
        study.rows.ours=5 study.rows.ours.steps=0 study.rows.ours.guidance=abc study.paper=3 study.hidden=3
        controlnets.color=[1] controlnets=3 study.sweep=3 experiment=color experiment=none_such
    """,
    "prepare": """
        dataset.name=[] dataset.splits=[all] dataset.splits=train dataset.select.min_area=2 dataset.select.min_area=abc
        dataset.select.min_area=nan dataset.select.max_samples=0 dataset.select.max_samples=-3
        dataset.select.allow_truncated=abc dataset.count=0 dataset.count=many dataset=none_such trainer.devices=0
        trainer.devices=many trainer.accelerator=abacus trainer=3
    """,
    "export": """
        format=onnx format=1 half=2 half=abc tower=abc license=[1] output=[1] run=[1] checkpoint=first checkpoint=1
    """,
    "bench": """
        what=[nothing] what=abc batch=0 batch=abc steps=0 blocks=0 blocks=-1 blocks=abc compile=abc checkpointing=3
        offload=[1,2] sampling.batch=0 sampling.steps=abc data.boxes=0 data.masks=abc limit=0 sampling.guidance=nan
    """,
    "browse": "port=0 port=70000 port=abc port=null address=[1] dataset=none_such",
    "demo": """
        port=0 port=70000 port=abc port=null host=[1] host=null waiting=0 waiting=abc steps=0 steps=abc rounds=0
        lambda_l=abc lambda_h=nan guidance=abc solver=euler controlnet=[1] model=huge method=controlnet
    """,
    "doctor": "check=everything check=[] check=3 paths=3",
    "fit": """
        module.lr=nan module.lr=abc module.lr=-1 module.lr=null module.lr=[1] module.lr=true module.zero_init_lr=abc
        module.warmup=-1 module.warmup=abc module.decay=3 module.weight_decay=-1 module.prompt_dropout=2
        module.prompt_dropout=abc module.branch=[1] module.share=2 module.objective.t_min=1000
        module.objective.weighting=none module.objective.clip=[1] module.compile=perhaps module.in_channels=0
        data.batch_size=0 data.batch_size=-4 data.batch_size=abc data.workers=-1 data.workers=abc data.variants=0
        data.mismatch=2 data.mismatch=abc data.crop=round data.hints.color.blur=-1 data.hints.color.blur=abc
        data.hints.color=3 trainer.max_steps=abc trainer.max_steps=-2 trainer.max_steps=1.5 trainer.devices=0
        trainer.devices=-2 trainer.accelerator=abacus trainer.accumulate_grad_batches=0 trainer.gradient_clip_val=abc
        trainer.val_check_interval=abc trainer.val_check_interval=-1 trainer.log_every_n_steps=0
        checkpoint_every=0 checkpoint_every=abc checkpoint=abc checkpoint=null checkpoint=3 callbacks.best.mode=most
        callbacks.best=3 seed=-1 seed=4294967296 seed=abc evaluate.steps=0 evaluate.limit=0
        evaluate.split=none evaluate=3 callbacks.samples.every=0 callbacks.samples.steps=abc module=true data=3
        data.backbone={} data.backbone=null data.backbone={path:tiny} module.backbone={} module.backbone=null
        module.lrr=1 data.batchsize=3 trainer.max_step=3 resume=5 guidance=abc
    """,
    "fit ": "vectors=0 vectors=abc vectors=1000 property=5 module.steps=0 data.previews=abc",
}
CASES = [(command, word) for command, words in BAD.items() for word in words.split()]


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("desk")
    write_image(folder / "c.png", np.full((40, 60, 3), 90, np.uint8))
    mask = np.zeros((40, 60), bool)
    mask[10:30, 20:40] = True
    write_image(folder / "m.png", mask)
    return folder


def test_there_are_many():
    assert len(CASES) > 250 and len({*CASES}) == len(CASES)


def remember(memo, args, more):
    key = repr((args, more))
    if key not in memo:
        memo[key] = compose(*args, **more)
    return memo[key]


@pytest.mark.parametrize("command", BAD)
def test_a_value_that_cannot_be_is_one_line(command, desk, monkeypatch, capsys):
    """Guards the door: no traceback, no folder of a run, and the line names the option."""
    module, failures = importlib.import_module(f"harmony.{command.strip()}"), []
    monkeypatch.chdir(desk)
    for place in (cli_command, explain):  # the same defaults for all values of a command
        monkeypatch.setattr(place, "compose", lambda *args, memo={}, **more: remember(memo, args, more))
    before = sorted(desk.iterdir())
    for word in [word for other, word in CASES if other == command]:
        start = [w for w in START[command].split() if w.partition("=")[0] != word.partition("=")[0]]
        monkeypatch.setattr(sys, "argv", [f"harmony-{command}", *start, word])
        try:
            code = module.main() or 0
        except SystemExit as leave:
            code = leave.code
        except Exception as error:
            code = repr(error)[:200]
        lines = capsys.readouterr().err.strip().splitlines()
        said = lines[-1] if lines else ""
        if code != 2 or len(lines) != 1 or not said.startswith("harmony: error: ") or sorted(desk.iterdir()) != before:
            failures.append((word, code, said))
    assert not failures
