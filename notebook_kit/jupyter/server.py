"""What the kit asks of the Jupyter server: stills in saved notebooks, and no waiting on the wire.

A notebook that is opened again has no kernel, and for a live view JupyterLab then says "model not found", although the
still lies in the same output. So when a notebook is saved, outputs that carry a still are saved as that still. The page
on which the notebook is open keeps its live widgets.

A kernel answers a slider with two small messages. TCP holds the second back until the first is acknowledged, for up to
40 ms (Nagle's algorithm and delayed acknowledgement); a websocket to a kernel is better off without.
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


def undelayed(connection_class: type) -> type:
    """The server's class of kernel connections, with small messages sent at once.

    Args:
        connection_class: whatever class the server is set to use.
    """

    class Undelayed(connection_class):
        def connect(self):
            self.websocket_handler.set_nodelay(True)
            return super().connect()

    return Undelayed


def _load_jupyter_server_extension(server) -> None:
    server.contents_manager.register_pre_save_hook(keep_stills)
    settings = server.web_app.settings
    if settings.get("kernel_websocket_connection_class"):
        settings["kernel_websocket_connection_class"] = undelayed(settings["kernel_websocket_connection_class"])
