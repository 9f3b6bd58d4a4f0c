"""F6. ``python -m harmony.browse dataset=open_images``: the FiftyOne App on a prepared dataset, kept and rejected."""

from omegaconf import DictConfig, OmegaConf

from harmony.config import entry


def run(cfg: DictConfig) -> None:
    """Serve the App on ``cfg.port`` until Ctrl-C."""
    from harmony.data.open_images import browse

    browse(OmegaConf.to_container(cfg.dataset, resolve=True), cfg.port, cfg.address)


@entry("browse")
def main(cfg: DictConfig) -> None:
    run(cfg)


if __name__ == "__main__":
    main()
