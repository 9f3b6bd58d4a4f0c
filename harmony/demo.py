"""``python -m harmony.demo``: the demo in the browser, for one photograph at a time.

Upload a photograph, place a cut-out on it or paint over an object that is in it already, choose a
method, and compare before and after. The picture to download equals the photograph bit for bit
outside the hole and keeps its color profile and EXIF. The page makes no request to any other
machine; Ctrl-C ends the demo and removes all uploads.
  host=0.0.0.0                               for other machines too, without a password
  controlnet=RUN structure=RUN               networks of your own (structure: its strength too)
  model=sd2 controlnet=FOLDER guidance=7.5   at true size
"""

import importlib.util

from hydra.utils import instantiate
from omegaconf import DictConfig

from harmony.cli.command import entry, literal
from harmony.cli.run_folder import device
from harmony.core.errors import UserError

TEXTS = ("host", "painter", "controlnet", "structure", "model.path", "describer", "evaluator", "clip")


def overrides(words: list[str]) -> list[str]:
    """The command line for Hydra: names and paths are text."""
    return [literal(word, TEXTS) for word in words]


@entry("demo", read=overrides, last_line="the demo has ended, its uploads and results are removed")
def main(cfg: DictConfig) -> None:
    """Serve the demo until it is interrupted."""
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the demo needs gradio: make demo in a clone, or pip install 'gradio>=6.25,<7'")
    from harmony.apps.demo.engine import Engine, list_choices
    from harmony.apps.demo.page import check_address, serve

    check_address(cfg.host, cfg.port)
    choices = list_choices(cfg)
    serve(Engine(cfg, choices, instantiate(cfg.model).to(device())), cfg.host, cfg.port, cfg.waiting)


if __name__ == "__main__":
    main()
