"""The declaration: splits without overlap, windows and batches of bytes."""

from itertools import chain

import pytest
import torch

from notebook_kit.data import LANGUAGES, byte_batches, byte_windows, udhr


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_language_has_31_blocks_divided_without_overlap(language):
    blocks = udhr(language).rstrip("\n").split("\n\n")
    assert len(blocks) == 31
    parts = {s: udhr(language, s).rstrip("\n").split("\n\n") for s in ("train", "val", "test")}
    assert sorted(chain.from_iterable(parts.values())) == sorted(blocks)
    sizes = {split: len(udhr(language, split).encode()) for split in parts}
    assert sizes["train"] > 7_000
    assert sizes["val"] > 1_300
    assert sizes["test"] > 1_300


def test_text_is_clean():
    for language in LANGUAGES:
        text = udhr(language)
        assert "<" not in text
        assert "&" not in text
        assert "\ufffd" not in text
        assert all(line == line.strip() for line in text.split("\n"))
    assert udhr("deu").split("\n\n")[1].startswith("Artikel 1\nAlle Menschen sind frei und gleich")


def test_the_same_articles_are_held_out_in_every_language():
    assert "Article 3\n" in udhr("eng", "test")
    assert "Artikel 3\n" in udhr("deu", "test")
    assert "Article 4\n" in udhr("eng", "val")


def test_unknown_language_or_split_names_the_options():
    with pytest.raises(ValueError, match=r"'lat'.*eng, deu"):
        udhr("lat")
    with pytest.raises(ValueError, match=r"'dev'.*train, val, test"):
        udhr("eng", "dev")


def test_windows_are_the_text_in_order():
    windows = byte_windows("añb" * 10, 8)
    assert windows.shape == (5, 8)
    assert bytes(windows.flatten().tolist()) == ("añb" * 10).encode()
    assert byte_windows("abcdefghij", 4).shape == (2, 4)
    with pytest.raises(ValueError, match=r"3 bytes, fewer than one window of 4"):
        byte_windows("abc", 4)


def test_batches_are_seeded_windows_of_the_language_they_name():
    texts = {language: udhr(language, "train") for language in LANGUAGES}
    batches = byte_batches(texts, batch_size=64, length=16)
    ids, languages = batches(torch.Generator().manual_seed(0))
    again, _ = batches(torch.Generator().manual_seed(0))
    assert ids.shape == (64, 17)
    assert torch.equal(ids, again)
    assert ids.min() >= 0
    assert ids.max() <= 255
    for row, language in zip(ids.tolist(), languages.tolist(), strict=True):
        assert bytes(row) in texts[LANGUAGES[language]].encode()


def test_batches_reach_the_first_and_the_last_byte():
    batches = byte_batches({"a": "abcd"}, batch_size=200, length=2)
    ids, _ = batches(torch.Generator().manual_seed(0))
    assert {bytes(row) for row in ids.tolist()} == {b"abc", b"bcd"}


def test_a_text_shorter_than_a_window_is_refused_by_name():
    with pytest.raises(ValueError, match=r"deu has 2 bytes, a window needs 4"):
        byte_batches({"eng": "a long text", "deu": "ab"}, batch_size=1, length=3)
