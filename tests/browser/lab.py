"""The real JupyterLab, in headless Chromium: for tests, screenshots and latency benchmarks."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat

CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def chromium() -> str | None:
    """Path of a Chromium or Chrome on this machine, or None."""
    names = [os.environ.get("NOTEBOOK_KIT_CHROMIUM"), "chromium", "chromium-browser", "google-chrome"]
    return next((path for name in names if name and (path := shutil.which(name))), None)


def write_notebook(path: Path, cells: list[str]) -> None:
    """Write a notebook of code cells, not run yet."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source.strip()) for source in cells])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, path)


class Lab:
    """A running JupyterLab and a browser page on it."""

    def __init__(self, url: str, page):
        self.url, self.page = url, page

    def open(self, notebook: str, *, height: int = 1600, width: int = 1280) -> None:
        """Open a notebook in a fresh workspace and wait for its kernel."""
        self.page.set_viewport_size({"width": width, "height": height})
        self.page.goto(f"{self.url}/lab/workspaces/w{time.time_ns()}/tree/{notebook}?reset")
        self.page.wait_for_selector(".jp-Notebook", timeout=60_000)
        self.page.wait_for_function(
            """() => {
                const kernel = window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel;
                return kernel?.status === 'idle' && window.jupyterapp.commands.isEnabled('notebook:run-all-cells');
            }""",
            timeout=90_000,
        )

    def run_all(self, *, timeout: float = 180) -> None:
        """Run every cell and wait until the kernel is idle again."""
        self.page.evaluate("() => void window.jupyterapp.commands.execute('notebook:run-all-cells')")
        deadline = time.time() + timeout
        while time.time() < deadline:
            # A cell that ran has a number in its prompt; one that failed ends the run and leaves the rest blank.
            waiting, failed = self.page.evaluate(
                """() => {
                    const prompts = [...document.querySelectorAll('.jp-Notebook .jp-CodeCell .jp-InputPrompt')];
                    const waiting = prompts.filter((node) => !/\\[\\d+\\]/.test(node.textContent)).length;
                    const running = prompts.some((node) => node.textContent.includes('*'));
                    const error = document.querySelector('.jp-OutputArea-output[data-mime-type*="error"]');
                    return [waiting, Boolean(error) && !running];
                }"""
            )
            if not waiting or failed:
                return
            time.sleep(0.25)
        raise TimeoutError(f"the notebook still runs after {timeout} s")

    def errors(self) -> list[str]:
        """Texts of error outputs now on the page."""
        texts = self.page.evaluate(
            """() => [...document.querySelectorAll('[data-mime-type="application/vnd.jupyter.stderr"]')]
                .map((node) => node.textContent)"""
        )
        return [text for text in texts if "Traceback" in text or "Error" in text]

    def wait_drawn(self, index: int = 0, *, more_than: int = 0, timeout: float = 30) -> None:
        """Wait until the index-th picture was drawn more than so many times."""
        self.page.wait_for_function(
            """([index, more]) =>
                Number(document.querySelectorAll('.nbk-stage .nbk-picture')[index]?.dataset.drawn ?? 0) > more""",
            arg=[index, more_than],
            timeout=timeout * 1000,
        )


@contextmanager
def running_lab(folder: Path, *, theme: str = "JupyterLab Light") -> Iterator[Lab]:
    """Start JupyterLab on a folder, and a browser; both end with the block.

    Args:
        folder: what JupyterLab serves; notebooks in it may be changed by saving.
        theme: "JupyterLab Light" or "JupyterLab Dark".
    """
    from playwright.sync_api import sync_playwright

    home = folder / ".lab"
    settings = home / "config" / "lab" / "user-settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True, exist_ok=True)
    (settings / "themes.jupyterlab-settings").write_text(json.dumps({"theme": theme}))
    quiet = {"fetchNews": "false", "checkForUpdates": False}
    (settings / "notification.jupyterlab-settings").write_text(json.dumps(quiet))
    port = _free_port()
    environment = dict(os.environ)
    environment |= {
        "JUPYTER_CONFIG_DIR": str(home / "config"),
        "JUPYTERLAB_SETTINGS_DIR": str(home / "config" / "lab" / "user-settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
        "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        "IPYTHONDIR": str(home / "ipython"),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}", "--ip=127.0.0.1"]
    command += ["--IdentityProvider.token=", "--ServerApp.password=", "--ServerApp.disable_check_xsrf=True"]
    command += ["--LabApp.expose_app_in_browser=True", "--LabApp.news_url=None", f"--ServerApp.root_dir={folder}"]
    log = open(home / "lab.log", "w")  # noqa: SIM115  closed below, after the server
    server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_for(url + "/api", server)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium(), args=CHROMIUM_FLAGS)
            page = browser.new_page(viewport={"width": 1280, "height": 1600})
            page.set_default_timeout(60_000)
            yield Lab(url, page)
            browser.close()
    finally:
        server.terminate()
        try:
            server.wait(15)
        except subprocess.TimeoutExpired:
            server.kill()
        log.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_for(url: str, server: subprocess.Popen) -> None:
    deadline = time.time() + 60
    while time.time() < deadline:
        if server.poll() is not None:
            raise RuntimeError(f"JupyterLab ended with {server.returncode}; see .lab/lab.log")
        try:
            urllib.request.urlopen(url, timeout=2).read()
            return
        except OSError:
            time.sleep(0.2)
    raise TimeoutError("JupyterLab did not answer within 60 s")
