"""F6. ``python -m harmony.prepare dataset=NAME``: from annotations (or a recipe for renders) to a manifest."""

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from harmony.config import entry
from harmony.data.preparation import prepare
from harmony.data.shards import predictor


@entry("prepare")
def main(cfg: DictConfig) -> None:
    """Prepare a dataset: select, import into FiftyOne, check pixels, caption, write the manifest."""
    recipe = OmegaConf.to_container(cfg.dataset, resolve=True)
    trainer = predictor(instantiate(cfg.trainer, _partial_=True, _convert_="all"))
    manifest = prepare(recipe, cfg.model.path, cfg.paths.work, trainer)
    if trainer.is_global_zero:
        print(manifest)


if __name__ == "__main__":
    main()
