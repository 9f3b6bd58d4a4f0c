"""From options to methods: the option files of ``configs/method``, completed by a command's settings."""

from collections.abc import Mapping
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict

from harmony.cli.command import find_user_error, literal
from harmony.cli.compose import CONFIGS, load_yaml
from harmony.cli.explain import nearest
from harmony.cli.run_folder import device
from harmony.core.errors import UserError

FOLDER = CONFIGS / "method"
SAMPLING = ("solver", "guided", "encoder_every", "graphs", "compile")  # not every method is sampled by a schedule


def method_file(name: str) -> DictConfig:
    """The option file of a method. UserError for an unknown name."""
    names = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    if name not in names:
        raise UserError(f"unknown method {name}{nearest(name, names) or '.'} There are: {', '.join(names)}")
    return load_yaml(FOLDER / f"{name}.yaml")


def complete(cfg: DictConfig, options: Mapping[str, Any]) -> dict[str, Any]:
    """All that a method is built from: ``options`` over its file over the settings of the command.

    ``options`` name the ``method``. UserError for an option that it does not take.
    """
    options = dict(options)
    name = options.pop("method", None)
    if name is None:
        raise UserError(f"a row needs method=NAME: {options}")
    file = OmegaConf.to_container(method_file(name), resolve=False)
    if unknown := [key for key in options if key not in file]:
        raise UserError(f"method {name} takes no {unknown[0]}{nearest(unknown[0], file)}")
    context = cfg.copy()
    with open_dict(context):
        context["_method"] = {key: value for key, value in file.items() if not plain(options.get(key))}
    node = OmegaConf.to_container(context["_method"], resolve=True)
    for key, value in options.items():  # of a mapping a row gives the part that differs
        node[key] = node[key] | value if isinstance(value, dict) and isinstance(node.get(key), dict) else value
    return node


def plain(value: Any) -> bool:
    """Whether an option takes the place of the file's, which then need not resolve."""
    return value is not None and not isinstance(value, dict)


def refuse_unread(cfg: DictConfig) -> None:
    """UserError for an option of sampling that is set and that the chosen method does not read."""
    defaults = load_yaml(CONFIGS / "method_options.yaml")
    if wrong := [key for key in SAMPLING if key not in cfg.method and cfg[key] != defaults[key]]:
        raise UserError(f"this method does not sample by a schedule: leave out {' and '.join(f'{k}=' for k in wrong)}")


def build(node: Mapping[str, Any], backbone: Any) -> Any:
    """The method of a completed node, on a backbone."""
    try:
        return instantiate(dict(node), backbone, _convert_="all")
    except InstantiationException as error:
        raise find_user_error(error) from None


def load_backbone(cfg: DictConfig) -> Any:
    """The backbone of a command's settings, on the device of this process. UserError where its weights are missing."""
    try:
        return instantiate(cfg.model).to(device())
    except InstantiationException as error:
        raise find_user_error(error) from None


def shorthand(text: str) -> dict[str, Any]:
    """``METHOD`` or ``METHOD:VALUE`` as options: the value is that of the one option without a default."""
    name, _, value = text.partition(":")
    if not value:
        return {"method": name}
    required = [key for key, default in method_file(name).items_ex(resolve=False) if default == "???"]
    if len(required) != 1:
        raise UserError(f"{text}: method {name} has no single option that must be given; write {{method: {name}, ...}}")
    return {"method": name, required[0]: value}


def row_facts(name: str, node: Any) -> dict[str, Any]:
    """What a row of ``study.rows`` says, as keywords of ``evaluation.comparison.Row``."""
    if node is None:
        return {}
    if isinstance(node, str):
        return {"options": shorthand(node)}
    if not isinstance(node, DictConfig):
        raise UserError(f"study.rows.{name}={node}: give {{method: NAME, OPTION: value, ...}} or METHOD:VALUE")
    options = OmegaConf.to_container(node, resolve=True)
    if picked := options.pop("picked", None):
        return {"picked": tuple(picked)}
    best = tuple(options.pop("best", ()))
    return {"options": options, "best": best, "lacking": tuple(lacking(node))}


def row_override(word: str) -> str:
    """``study.rows.NAME=...`` as Hydra wants it: added where no experiment has it, METHOD:VALUE quoted."""
    key, _, value = word.partition("=")
    if not key.startswith("study.rows.") or "." in key.removeprefix("study.rows."):
        return word
    text = literal(word, (key,)) if value and value[0] not in "{'\"" else word
    return f"++{text}"


def lacking(node: DictConfig) -> list[str]:
    """Settings of the command that the options of a row refer to and that are null, as words of the command line."""
    names = []
    for key in node:
        if OmegaConf.is_interpolation(node, key) and node[key] is None:
            names.append(f"{node._get_node(key)._value().strip('${}')}=RUN")
    return names
