"""The FiftyOne plugin ``@harmony/compose``; FiftyOne loads this file by its path."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fiftyone.plugins.context import PluginContext


def register(context: "PluginContext") -> None:
    """Register all operators and the panel; what FiftyOne calls."""
    from harmony.apps.plugin import decide, embed, harmonize, panel, runs

    for each in (harmonize.Harmonize, runs.Score, decide.Decide, runs.OpenRun, embed.Embed, panel.Compare):
        context.register(each)
