import notebook_kit
from notebook_kit.jupyter import doctor as module
from notebook_kit.jupyter.cli import main


def test_this_environment_is_well():
    report = notebook_kit.doctor()
    assert report.well, repr(report)
    assert "ok   torch" in repr(report)


def test_a_missing_package_is_named_with_the_line_that_mends_it(monkeypatch):
    monkeypatch.setattr(module, "_wanted", lambda: [("no-such-package-here", "1.0")])
    report = module.doctor()
    assert not report.well
    assert "BAD  no-such-package-here" in repr(report)
    assert "-m pip install 'no-such-package-here>=1.0'" in repr(report)


def test_an_old_package_is_noticed(monkeypatch):
    monkeypatch.setattr(module, "_wanted", lambda: [("numpy", "99.0")])
    assert not module.doctor().well


def test_two_environments_are_noticed(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_server_python", lambda: str(tmp_path / "bin" / "python"))
    finding = module._same_environment()
    assert not finding.well
    assert "two environments" in finding.found
    assert "pip install anywidget" in finding.mend


def test_missing_front_end_is_noticed(monkeypatch):
    import jupyter_core.paths

    monkeypatch.setattr(jupyter_core.paths, "jupyter_path", lambda *parts: [])
    finding = module._front_end("anywidget")
    assert not finding.well
    assert "blank" in finding.found


def test_html_is_escaped():
    report = module.Report((module.Finding("<b>x</b>", False, "a & b", "do <this>"),))
    assert "<b>x</b>" not in report._repr_html_()
    assert "&lt;this&gt;" in report._repr_html_()


def test_command_line(capsys, tmp_path):
    assert main(["cite", "ties"]) == 0
    assert "2306.01708" in capsys.readouterr().out
    assert main(["cite", "tise"]) == 2
    assert "ties" in capsys.readouterr().err
    assert main(["catalog"]) == 0
    assert "`merging.ties`" in capsys.readouterr().out
    assert main(["claims", str(tmp_path / "nowhere")]) == 2
    readme = tmp_path / "README.md"
    readme.write_text("no marks")
    assert main(["readme", str(readme)]) == 2
    assert readme.read_text() == "no marks"
