"""``python -m harmony.edit``: change one photograph by the words that describe it.

  image=I.jpg source="a cat on a sofa" target="a dog on a sofa"            another word: replace
  image=I.jpg source="a cat on a sofa" target="a black cat on a sofa"      further words: insert
  image=I.jpg source="a cat on a sofa" target="a <toy> on a sofa" words=RUN   a word learned by textual inversion
  image=I.jpg source="a street" target="a street, watercolor" mode=style  the whole picture
  image=I.jpg source=S target=S reweight="{snowy: 3}"                      the same words, one of them stronger

What it cannot do: remove something, put something reliably where nothing is, move things. Words change what is there.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from harmony.cli.command import entry, literal
from harmony.cli.run_folder import device, make_folder, new_folder

if TYPE_CHECKING:
    import numpy as np

    from harmony.methods.edit_inputs import EditInput
    from harmony.methods.prompt_editing import EditResult
    from harmony.models.backbone import Backbone

TEXTS = ("image", "source", "target", "output", "model.path", "words", "look_at", "square", "reweight")
LIMITS = "words change what is there: removing, moving, or putting something where nothing is are not to be relied on"


def overrides(words: list[str]) -> list[str]:
    """The command line for Hydra, whose grammar knows neither prompts nor angle brackets: what is text stays text."""
    return [literal(word, TEXTS) for word in words]


@entry("edit", read=overrides)
def main(cfg: DictConfig) -> None:
    """Invert the photograph (once), edit it, and write source, reconstruction, edit, masks and attention maps."""
    from harmony.core.files import write_json, write_text
    from harmony.core.progress import tell
    from harmony.methods.edit_inputs import (
        choose_mode,
        find_words,
        paste_edit,
        read_edit,
        read_factors,
        split_list,
    )
    from harmony.methods.prompt_editing import edit_picture, load_or_invert, plan_edit
    from harmony.metrics.fidelity import psnr
    from harmony.models.textual_inversion import learn, read_word
    from harmony.pixels.color_profiles import to_srgb
    from harmony.pixels.images import crop_resize, from_model

    photograph = read_edit(cfg)
    for note in photograph.notes:
        print(note)
    backbone = instantiate(cfg.model).to(device())
    for path in split_list(cfg.words) or ():
        word = read_word(path)
        learn(backbone, word)
        print(f"{word.token} is a word of {len(word.vectors)} vector{'s' * (len(word.vectors) > 1)}, from {path}")
    square, large = (
        to_srgb(crop_resize(photograph.image, photograph.crop, side), photograph.profile)
        for side in (backbone.resolution, photograph.crop.side)
    )
    if cfg.source is None:
        cfg.source = describe_source(backbone, large)
    factors = read_factors(cfg.reweight)
    name, mode = choose_mode(cfg, factors)
    words = factors or None, find_words(cfg)
    # what does not fit is refused before the inversion
    planned = plan_edit(backbone, cfg.source, cfg.target, mode, *words)
    local = "local" if mode.local else "in the whole picture"
    shares = f"cross-attention {mode.cross_attention_steps:g}, self-attention {mode.self_attention_steps:g}"
    print(f"{name}, {local}: {cfg.source!r} -> {cfg.target!r}; {shares}; {LIMITS}")
    store, options = Path(cfg.paths.work) / "inversions", (cfg.source, cfg.steps, cfg.guidance, cfg.inner)
    inversion = load_or_invert(store, backbone, square, *options, tell)
    edited = edit_picture(backbone, inversion, planned, cfg.guidance, cfg.threshold)
    bound = from_model(backbone.decode(inversion.latent))[0]
    figures = {"autoencoder/psnr": psnr(bound, square), "reconstruction/psnr": psnr(edited.pictures[0], square)}
    how = "fast mode, no null texts" if cfg.inner == 0 else "null texts"
    print(
        f"reconstruction ({how}) {figures['reconstruction/psnr']:.2f} dB, the autoencoder's bound is "
        f"{figures['autoencoder/psnr']:.2f} dB"
    )
    image, region = paste_edit(photograph, edited, cfg.paste)
    folder = make_folder(cfg.output) if cfg.output else new_folder(Path(cfg.paths.runs).resolve() / "edit")
    files = write_pictures(folder, photograph, square, edited, image, region)
    write_json(folder / "metrics.json", {key: float(value) for key, value in figures.items()})
    write_text(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
    print(*files, sep="\n")


def describe_source(backbone: "Backbone", picture: "np.ndarray") -> str:
    """What the picture shows, by the backbone's captioner; empty where none knows photographs. A line says which."""
    from harmony.core.errors import UserError
    from harmony.data.captions import caption_picture, find_captioner

    try:
        source = caption_picture(picture, *find_captioner(backbone), backbone.device)
    except UserError as error:
        print(f"the source is empty, its words would be the handles, add source=...: {error}")
        return ""
    print(f"source {source!r}, by the captioner; its words are the handles: correct them with source=")
    return source


def write_pictures(
    folder: Path,
    photograph: "EditInput",
    square: "np.ndarray",
    edited: "EditResult",
    image: "np.ndarray",
    region: "np.ndarray | None",
) -> list[Path]:
    """Write the pictures of an edit: ``image`` is the photograph with it, ``region`` where it may differ.

    The model's own pictures are in sRGB, the photograph keeps its colors and EXIF.
    """
    from harmony.methods.edit_inputs import draw_attention
    from harmony.pixels.color_profiles import to_srgb
    from harmony.pixels.images import crop_resize, grid, write_image

    side = len(square)
    pictures = {"edit": image, "source": square, "reconstruction": edited.pictures[0], "raw": edited.pictures[1]}
    small = to_srgb(crop_resize(image, photograph.crop, side), photograph.profile)
    row = [square, edited.pictures[0], edited.pictures[1], small]
    titles = ["source", "reconstruction", "raw edit", "edit"]
    if region is not None:
        pictures["mask"] = region
        for who, mask in zip(("source", "target"), edited.masks, strict=True):
            pictures[f"mask_{who}"] = mask
    pictures |= {"attention": draw_attention(edited, side), "sheet": grid([row], titles)}
    colors = {"icc_profile": photograph.profile, "exif": photograph.exif}
    for file, picture in pictures.items():
        options = colors if file == "edit" else {}
        write_image(folder / f"{file}.png", picture, **options)
    return [folder / f"{file}.png" for file in pictures]


if __name__ == "__main__":
    main()
