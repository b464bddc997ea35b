from notebook_kit.jupyter.server import VIEW, _load_jupyter_server_extension, keep_stills


def model_of(*bundles):
    outputs = [{"output_type": "display_data", "data": dict(bundle)} for bundle in bundles]
    return {"type": "notebook", "content": {"cells": [{"cell_type": "code", "outputs": outputs}, {"cell_type": "raw"}]}}


def test_a_view_with_a_still_is_saved_as_the_still():
    model = model_of({VIEW: {"model_id": "a"}, "image/png": "x", "text/plain": "t"})
    keep_stills(model)
    assert model["content"]["cells"][0]["outputs"][0]["data"] == {"image/png": "x", "text/plain": "t"}


def test_other_widgets_and_files_are_left_alone():
    model = model_of({VIEW: {"model_id": "a"}, "text/plain": "t"}, {"image/png": "x"})
    before = model_of({VIEW: {"model_id": "a"}, "text/plain": "t"}, {"image/png": "x"})
    keep_stills(model)
    assert model == before
    keep_stills({"type": "file", "content": "text"})
    keep_stills({"type": "notebook", "content": None})


class Connection:
    def __init__(self, handler):
        self.websocket_handler = handler

    def connect(self):
        return "connected"


class Handler:
    nodelay = False

    def set_nodelay(self, value):
        self.nodelay = value


class Contents:
    def __init__(self):
        self.hooks = []

    def register_pre_save_hook(self, hook):
        self.hooks.append(hook)


class App:
    def __init__(self, settings):
        self.settings = settings


class Server:
    def __init__(self, **settings):
        self.contents_manager, self.web_app = Contents(), App(settings)


def test_the_server_keeps_stills_and_sends_small_messages_at_once():
    server = Server(kernel_websocket_connection_class=Connection)
    _load_jupyter_server_extension(server)
    assert server.contents_manager.hooks == [keep_stills]
    handler = Handler()
    assert server.web_app.settings["kernel_websocket_connection_class"](handler).connect() == "connected"
    assert handler.nodelay


def test_a_server_with_no_such_class_is_left_alone():
    server = Server()
    _load_jupyter_server_extension(server)
    assert server.web_app.settings == {}
