"""``python -m harmony.harmonize``: put one object into one photograph so that it belongs there.

Pixels outside the hole (the mask and a small rim) stay as they are, bit for bit, in the photograph's color profile.
  background=B.jpg foreground=F.jpg mask=M.png             all of one size
  background=B.jpg foreground=F.png box=x0,y0,x1,y1        a cut-out with alpha; default: bottom center
  composite=C.jpg mask=M.png                               the object has been pasted already
  dir=FOLDER                                               many, from index.csv or composite/ and mask/
  method=paint_by_example background=B.jpg reference=R.jpg mask=M.png    what R shows, painted where M is white
  method=zero_shot composite=C.jpg mask=M.png              by words for two lights, with nothing trained
"""

from collections.abc import Sequence
from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from harmony.cli.command import entry, literal
from harmony.cli.methods import build, refuse_unread
from harmony.cli.run_folder import device, hold, make_folder, new_folder, unfinished
from harmony.core.errors import UserError
from harmony.core.files import write_json, write_text
from harmony.core.progress import tell

TEXTS = (  # options that are text whatever it holds
    "dir", "background", "foreground", "composite", "mask", "region", "reference", "painter", "controlnet", "structure",
    "output", "model.path", "prompt", "prompts", "describer", "evaluator", "clip",
)  # fmt: skip


def overrides(words: list[str]) -> list[str]:
    """The command line for Hydra: paths and prompts are text, and ``box=1,2,3,4`` is a list rather than a sweep."""
    boxed = [f"box=[{w[4:]}]" if w.startswith("box=") and "," in w and "[" not in w else w for w in words]
    return [literal(word, TEXTS) for word in boxed]


def refuse_overwriting(cfg: DictConfig, inputs: Sequence[str]) -> None:
    """UserError where a result would take the place of one of the ``inputs`` of the command line."""
    from harmony.methods.runs import PICTURE_NAMES

    targets = {Path(cfg.output).resolve() / f"{name}.png" for name in PICTURE_NAMES} if cfg.output else set()
    for path in inputs:
        if Path(path).resolve() in targets:
            raise UserError(f"output={cfg.output}: its results would overwrite {path}; choose another folder")


def folder_of(cfg: DictConfig) -> Path:
    """Where the results go: ``output``, the newest unfinished folder of the same ``dir=`` command, or a new one."""
    if cfg.output:
        return make_folder(cfg.output)
    parent, text = Path(cfg.paths.runs).resolve() / "harmonize", OmegaConf.to_yaml(cfg, resolve=True)
    folder = (unfinished(parent, text) if cfg.dir else None) or new_folder(parent)
    hold(folder)
    write_text(folder / "config.yaml", text)
    return folder


@entry("harmonize", read=overrides)
def main(cfg: DictConfig) -> None:
    """Harmonize one composite or a folder of them; every run writes a folder of its own."""
    from harmony.evaluation.eval_sets import subsample
    from harmony.evaluation.pages import ROWS, PageRow, write_page
    from harmony.methods.inputs import PICTURES, list_composites, read_inputs
    from harmony.methods.runs import Inserter, Request
    from harmony.models.shipped import check_places
    from harmony.pixels.images import write_image

    options = {name: OmegaConf.to_container(cfg)[name] for name in (*PICTURES, "prompts")}
    if cfg.dir is not None and (pictures := [name for name in PICTURES if cfg[name] is not None]):
        raise UserError(f"dir= brings pictures of its own: leave out {', '.join(pictures)}")
    refuse_unread(cfg)
    refuse_overwriting(cfg, [value for value in options.values() if isinstance(value, str)])
    # bad input is refused before any weights are loaded
    items, incomplete_ids = list_composites(Path(cfg.dir)) if cfg.dir else ([], [])
    inputs = None if cfg.dir else [read_inputs(options)]
    lights = {"describer": "given"} if cfg.prompts is not None and "describer" in cfg.method else {}
    options_of_method = OmegaConf.to_container(cfg.method, resolve=True) | lights
    check_places(options_of_method)
    backbone = instantiate(cfg.model).to(device())
    method = build(options_of_method, backbone)
    method.say = tell
    print(method.describe())
    for each in inputs or ():
        each.cut(method)  # what the method cannot use is refused before a folder is made
    folder = folder_of(cfg)
    inserter = Inserter(method, backbone, cfg.seed, cfg.feather, cfg.raw, cfg.detail, cfg.shadow)
    if inputs is not None:
        (files,) = inserter.run([Request(options, folder, cfg.prompt)], inputs)
        print(*files.values(), sep="\n")
        return
    common = {"prompts": cfg.prompts}
    requests = {name: Request(common | options_of_one, folder / name, cfg.prompt) for name, options_of_one in items}
    sheet, results = inserter.run_folder(requests, cfg.batch)
    write_image(folder / "sheet.png", sheet)
    figures = {"composites": len(results), "left_out": len(items) - len(results) + len(incomplete_ids)}
    rows = (PageRow(name, request.read_pictures(), name) for name, request in subsample(list(results.items()), ROWS))
    text = f"{figures['composites']} composites, {figures['left_out']} left out\n{method.describe()}"
    config = OmegaConf.to_yaml(cfg, resolve=True)
    page = write_page(folder, f"harmonize {folder.name}", text, config, rows, len(results))
    write_json(folder / "metrics.json", figures)
    print(page, folder / "sheet.png", sep="\n")


if __name__ == "__main__":
    main()
