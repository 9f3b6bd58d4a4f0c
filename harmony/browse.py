"""``python -m harmony.browse dataset=open_images``: the FiftyOne App on a prepared dataset, kept and rejected."""

from omegaconf import DictConfig, OmegaConf

from harmony.cli.command import entry


@entry("browse")
def main(cfg: DictConfig) -> None:
    """Look at a prepared dataset in the FiftyOne App: what was kept, and what was rejected for which reason."""
    from harmony.apps.plugin.link import link_plugin
    from harmony.data.sources.open_images.browse import find_dataset, serve

    dataset = find_dataset(OmegaConf.to_container(cfg.dataset, resolve=True))
    link_plugin()
    serve(dataset, cfg.port, cfg.address)


if __name__ == "__main__":
    main()
