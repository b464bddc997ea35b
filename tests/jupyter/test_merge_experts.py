import re
from html.parser import HTMLParser

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from notebook_kit.expert_merging import expert_view
from notebook_kit.expert_merging.files import MergedLayer
from notebook_kit.expert_merging.plan import LayerPlan
from notebook_kit.jupyter.cli import main
from notebook_kit.jupyter.merge_experts import PAGE, calibration_ids, report_page
from tests.expert_merging.moes import moe

TEXT = "Everyone has the right to life, liberty and security of person. " * 60


@pytest.fixture
def folder(tmp_path):
    moe().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def test_from_the_command_line_to_a_model_and_a_page(folder, capsys):
    line = ["merge-experts", str(folder / "model"), "--method", "m_smoe", "--n-experts", "4"]
    line += ["--calibration", str(folder / "text.txt"), "--length", "64"]
    assert main(line) == 0
    out = folder / "model-m_smoe-4"
    said = capsys.readouterr()
    assert said.out.split() == [str(out), str(out / PAGE)]
    assert "merging with m_smoe: 100%" in said.err
    assert [len(layer) for layer in expert_view(AutoModelForCausalLM.from_pretrained(out))] == [4, 4]
    page = (out / PAGE).read_text("utf-8")
    assert "8 experts become 4" in page
    assert page.count("data:image/png;base64,") == 4
    assert not re.search(r"(src|href)=\"(?!data:)", page)  # stands alone
    HTMLParser().feed(page)
    assert main([*line, "--out", str(folder / "other"), "--no-align"]) == 0
    assert main(line) == 2  # it is there already
    assert "exists" in capsys.readouterr().err


def test_text_on_the_page_is_escaped():
    plan = LayerPlan(((0, 1),), ((0.75, 0.25),))
    layer = MergedLayer("<script>", torch.tensor([0.75, 0.25]), torch.eye(2), plan, (8, 4))
    page = report_page({"model": "<b>&"}, [layer])
    assert "<script>" not in page
    assert "&lt;b&gt;&amp;" in page
    assert "8 before, 4 after (50%)" in page


def test_ids_are_bytes_or_the_tokenizers(folder):
    ids = calibration_ids(folder / "model", folder / "text.txt", 1000, 128)
    assert ids.shape == (7, 128)
    assert bytes(ids[0].tolist()).decode() == TEXT[:128]
    assert calibration_ids(folder / "model", folder / "text.txt", 50, 128).shape == (1, 50)
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: i for i, word in enumerate(["Everyone", "has", "the", "?"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder / "model")
    assert calibration_ids(folder / "model", folder / "text.txt", 8, 4)[0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (["--n-experts", "9"], r"n_experts must be in \[1, 8\]"),
        (["--method", "ties"], "method must be one of"),
        (["--length", "1"], "at least 2"),
        (["--calibration", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_bad_input_is_one_line(folder, capsys, change, text):
    line = ["merge-experts", str(folder / "model"), "--calibration", str(folder / "text.txt"), *change]
    assert main(line) == 2
    assert re.search(text, capsys.readouterr().err)


def test_bad_folders_and_texts(folder, capsys):
    (folder / "short.txt").write_text("a")
    assert main(["merge-experts", str(folder / "model"), "--calibration", str(folder / "short.txt")]) == 2
    assert "at least 2" in capsys.readouterr().err
    assert main(["merge-experts", str(folder / "no"), "--calibration", str(folder / "text.txt")]) == 2
    assert "no folder" in capsys.readouterr().err
    model = moe()
    model.config.vocab_size = 300
    model.config.save_pretrained(folder / "model")
    assert main(["merge-experts", str(folder / "model"), "--calibration", str(folder / "text.txt")]) == 2
    assert "not bytes" in capsys.readouterr().err
