"""doctor: what is wrong with this Jupyter, and the line that mends it."""

import html
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

PIP = f"{Path(sys.executable).name} -m pip install"


@dataclass(frozen=True)
class Finding:
    """One check: what was looked at, whether it is well, what was found, and what mends it."""

    check: str
    well: bool
    found: str
    mend: str = ""


@dataclass(frozen=True)
class Report:
    """All findings; prints as text, shows as a table in a notebook."""

    findings: tuple[Finding, ...]

    @property
    def well(self) -> bool:
        """Whether everything is."""
        return all(finding.well for finding in self.findings)

    def __repr__(self):
        lines = []
        for finding in self.findings:
            lines.append(f"{'ok ' if finding.well else 'BAD'}  {finding.check}: {finding.found}")
            if not finding.well:
                lines.append(f"     mend it with: {finding.mend}")
        return "\n".join(lines)

    def _repr_html_(self):
        rows = []
        for finding in self.findings:
            colour, mark = ("#009E73", "ok") if finding.well else ("#D55E00", "mend")
            texts = (finding.check, finding.found, "" if finding.well else finding.mend)
            cells = "".join(f'<td style="text-align:left">{html.escape(text)}</td>' for text in texts)
            rows.append(f'<tr><td style="color:{colour}"><b>{mark}</b></td>{cells}</tr>')
        return f"<table>{''.join(rows)}</table>"


def doctor() -> Report:
    """Look at this kernel's environment, at JupyterLab's, and at whether widgets can reach from one to the other.

    Returns:
        Report: prints itself; `.well` is True when nothing needs mending.
    """
    findings = [_python(), *(_package(name, low) for name, low in _wanted())]
    findings += [_front_end("anywidget"), _front_end("@jupyter-widgets/jupyterlab-manager"), _same_environment()]
    findings.append(_threads())
    return Report(tuple(findings))


def _wanted() -> list[tuple[str, str]]:
    """Our own requirements, as the installed metadata states them."""
    wanted = []
    for line in metadata.requires("notebook_kit") or []:
        if "extra ==" in line:
            continue
        name = line.split(">")[0].split("<")[0].split("=")[0].strip()
        low = line.split(">=")[1].split(",")[0].strip() if ">=" in line else "0"
        wanted.append((name, low))
    return wanted


def _version(text: str) -> tuple[int, ...]:
    return tuple(int("".join(filter(str.isdigit, part)) or 0) for part in text.split("+")[0].split(".")[:3])


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    return Finding("Python", (3, 11) <= sys.version_info[:2] < (3, 14), version, "use Python 3.11, 3.12 or 3.13")


def _package(name: str, low: str) -> Finding:
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding(name, False, "not installed in this kernel's environment", f"{PIP} '{name}>={low}'")
    return Finding(name, _version(found) >= _version(low), found, f"{PIP} '{name}>={low}'")


def _front_end(extension: str) -> Finding:
    """Widgets draw through JupyterLab extensions that come inside Python packages."""
    import jupyter_core.paths as paths

    for folder in paths.jupyter_path("labextensions"):
        if (Path(folder) / extension).is_dir():
            return Finding(f"JupyterLab extension {extension}", True, "found")
    package = "anywidget" if extension == "anywidget" else "jupyterlab_widgets"
    return Finding(
        f"JupyterLab extension {extension}",
        False,
        "not found: widgets would stay blank",
        f"{PIP} --force-reinstall {package}   and reload the page",
    )


def _same_environment() -> Finding:
    """Kernel and JupyterLab may live apart; then the widgets' front ends must be in JupyterLab's environment."""
    server = _server_python()
    if server is None:
        return Finding("kernel and JupyterLab", True, "no running JupyterLab seen from here")
    own = Path(sys.prefix).resolve()
    if own in Path(server).parents or Path(server).parent.parent.resolve() == own:
        return Finding("kernel and JupyterLab", True, "one environment")
    lab = Path(server)
    mend = f"{lab} -m pip install anywidget ipywidgets   and restart JupyterLab"
    return Finding(
        "kernel and JupyterLab", False, f"two environments: kernel {own}, JupyterLab {lab.parent.parent}", mend
    )


def _server_python() -> str | None:
    """The interpreter of the server that started this kernel, if this is a kernel."""
    if "ipykernel" not in sys.modules and "JPY_SESSION_NAME" not in os.environ:
        return None
    command = ["ps", "-o", "args=", "-p", os.environ.get("JPY_PARENT_PID", str(os.getppid()))]
    try:
        line = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return line[0] if line and "python" in Path(line[0]).name and Path(line[0]).is_absolute() else None


def _threads() -> Finding:
    cores = os.cpu_count() or 1
    found = os.environ.get("OMP_NUM_THREADS", "unset")
    return Finding("threads", True, f"{cores} cores, OMP_NUM_THREADS {found}; lessons use one thread")
