"""Keeps pictures in saved notebooks: JupyterLab shows a widget's still only where the live view is not named beside it.

A notebook that is opened again has no kernel, and for a live view JupyterLab then says "model not found", although the
still lies in the same output. So when a notebook is saved, outputs that carry a still are saved as that still. The page
on which the notebook is open keeps its live widgets.
"""

VIEW = "application/vnd.jupyter.widget-view+json"


def keep_stills(model: dict, **kwargs) -> None:
    """Before a notebook is saved: drop the live view from every output that also has a picture.

    Args:
        model: jupyter_server's contents model; changed in place.
    """
    if model.get("type") != "notebook" or not model.get("content"):
        return
    for cell in model["content"].get("cells", []):
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if VIEW in data and "image/png" in data:
                del data[VIEW]


def _jupyter_server_extension_points() -> list[dict]:
    return [{"module": "notebook_kit.jupyter.server"}]


def _load_jupyter_server_extension(server) -> None:
    server.contents_manager.register_pre_save_hook(keep_stills)
