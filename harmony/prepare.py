"""F6. ``python -m harmony.prepare dataset=NAME``: from annotations (or a recipe for renders) to a manifest."""

from omegaconf import DictConfig, OmegaConf

from harmony.config import entry
from harmony.data.preparation import prepare


@entry("prepare")
def main(cfg: DictConfig) -> None:
    """Prepare a dataset: select, import into FiftyOne, check pixels, caption, write the manifest."""
    recipe = OmegaConf.to_container(cfg.dataset, resolve=True)
    print(prepare(recipe, cfg.model.path, cfg.paths.work))


if __name__ == "__main__":
    main()
