"""Shapes and types in signatures are checked while tests run; one thread, fixed seeds, no network."""

import os
import socket

os.environ.setdefault("NOTEBOOK_KIT_STRICT", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from jaxtyping import install_import_hook

import tests.typecheck  # noqa: F401  the hook imports no more than the package of its checker

# is_pep484_tower: an int is a valid float, as everywhere in Python.
install_import_hook("notebook_kit", "tests.typecheck.check")

import pytest  # noqa: E402
import torch  # noqa: E402

collect_ignore = [] if torch.cuda.is_available() else ["test_gpu.py"]


@pytest.fixture(autouse=True)
def _one_thread_and_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    connect = socket.socket.connect

    def local_only(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"a test tried to reach {address[0]}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)
