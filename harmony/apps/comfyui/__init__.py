"""Nodes of harmony for ComfyUI, which asks this folder for them where it lies in ``custom_nodes``."""

from typing import Any


async def comfy_entrypoint() -> Any:
    """The extension with all nodes. ComfyUI logs an error in one line, as where harmony is not installed."""
    from harmony.apps.comfyui.nodes import Harmony

    return Harmony()
