"""``python -m harmony.prepare dataset=NAME``: from annotations (or a recipe for renders) to a manifest."""

from contextlib import nullcontext

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from harmony.cli.command import entry
from harmony.data.preparation import find_place, lock, prepare
from harmony.data.shards import predictor


@entry("prepare")
def main(cfg: DictConfig) -> None:
    """Prepare a dataset: select, import into FiftyOne, check pixels, caption, write the manifest."""
    recipe = OmegaConf.to_container(cfg.dataset, resolve=True)
    trainer = predictor(instantiate(cfg.trainer, _partial_=True, _convert_="all"))
    with lock(find_place(recipe, cfg.paths.work)) if trainer.is_global_zero else nullcontext():
        manifest = prepare(recipe, cfg.model.path, cfg.paths.work, trainer)
    if trainer.is_global_zero:
        print(manifest)


if __name__ == "__main__":
    main()
