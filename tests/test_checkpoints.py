"""safetensors in and out: everything sound is read back bit for bit, everything else is refused before it is used."""

import json
import pickle
import struct

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from notebook_kit import checkpoints
from notebook_kit.checkpoints import (
    DTYPES,
    INDEX,
    BadCheckpoint,
    Checkpoint,
    TensorWriter,
    atomic,
    load,
    read_header,
    save,
)
from tests.untyped import untyped


def raw(header, data=b"", *, length=None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape=(1,), offsets=(0, 4), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.fixture
def written(tmp_path):
    def write(content: bytes, name="model.safetensors"):
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return write


def tensor_of(dtype, shape):
    bits = torch.randint(0, 2 if dtype == torch.bool else 100, shape)
    return bits.to(dtype) if dtype != torch.complex64 else torch.complex(bits.float(), -bits.float())


def same(a, b):
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))
    )


# ---------------------------------------------------------------- round trips
@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_and_shape_comes_back(name, tmp_path):
    dtype = DTYPES[name]
    weights = {"m": tensor_of(dtype, (2, 3)), "scalar": tensor_of(dtype, ()), "empty": tensor_of(dtype, (0, 4))}
    back = load(save(weights, tmp_path / "w.safetensors"))
    assert list(back) == list(weights)
    assert all(same(back[key], weights[key]) for key in weights)


@pytest.mark.parametrize("name", sorted(set(DTYPES) - {"C64"}))
def test_the_safetensors_library_agrees_both_ways(name, tmp_path):
    dtype = DTYPES[name]
    weights = {"b.weight": tensor_of(dtype, (3, 2)), "a": tensor_of(dtype, ()), "none": tensor_of(dtype, (0,))}
    theirs = safetensors.torch.load_file(save(weights, tmp_path / "ours.safetensors"))
    assert all(same(theirs[key], weights[key]) for key in weights)
    safetensors.torch.save_file(weights, tmp_path / "theirs.safetensors", metadata={"format": "pt", "note": "é"})
    ours = load(tmp_path / "theirs.safetensors")
    assert ours.keys() == weights.keys()
    assert all(same(ours[key], weights[key]) for key in weights)


def test_strided_tied_and_trained_tensors_are_written_as_they_look(tmp_path):
    w = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    weights = {"w": w, "t": w.T, "tied": w, "column": w[:, 1], "wide": torch.ones(1).expand(5)}
    back = load(save(weights, tmp_path / "w.safetensors"))
    assert all(torch.equal(back[key], weights[key]) for key in weights)
    assert not any(tensor.requires_grad for tensor in back.values())


def test_no_tensors_at_all(tmp_path):
    path = save({}, tmp_path / "none.safetensors")
    assert load(path) == {}
    assert safetensors.torch.load_file(path) == {}


@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), max_size=12).filter(lambda name: name != "__metadata__"),
        st.tuples(st.lists(st.integers(0, 4), max_size=3), st.sampled_from(sorted(DTYPES))),
        max_size=5,
    )
)
@settings(deadline=None, max_examples=40)
def test_any_names_and_shapes_come_back(tmp_path_factory, parts):
    weights = {name: tensor_of(DTYPES[dtype], shape) for name, (shape, dtype) in parts.items()}
    path = save(weights, tmp_path_factory.mktemp("any") / "w.safetensors")
    back = load(path)
    assert list(back) == list(weights)
    assert all(same(back[key], weights[key]) for key in weights)


@pytest.mark.parametrize("length", [640, 896, 1152, 1408, 19280, 640 + 65536])
def test_a_header_whose_length_looks_like_a_pickle_is_no_pickle(length, written):
    path = written(raw(json.dumps({"a": entry()}).encode().ljust(length), b"1234"))
    assert path.read_bytes()[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK")
    assert load(path)["a"].shape == (1,)


def test_a_checkpoint_is_a_lazy_mapping(tmp_path, monkeypatch):
    weights = {"a": torch.ones(2, 3), "n": torch.tensor(3)}
    checkpoint = Checkpoint(save(weights, tmp_path / "w.safetensors"))
    assert checkpoint.spec() == {"a": ((2, 3), torch.float32), "n": ((), torch.int64)}
    assert len(checkpoint) == 2
    assert checkpoint.file_of("a") == tmp_path / "w.safetensors"
    assert checkpoint["a"] is not checkpoint["a"]
    checkpoint["a"].zero_()
    assert torch.equal(checkpoint["a"], torch.ones(2, 3))
    with pytest.raises(KeyError):
        checkpoint["b"]
    monkeypatch.setattr(Checkpoint, "__getitem__", lambda *_: pytest.fail("a question about names read a tensor"))
    assert "a" in checkpoint
    assert "b" not in checkpoint


def test_the_data_is_aligned(tmp_path):
    path = save({"odd name": torch.ones(3, dtype=torch.uint8), "w": torch.ones(2)}, tmp_path / "w.safetensors")
    assert read_header(path)[1] % 8 == 0


# ---------------------------------------------------------------- folders
def shard(folder, parts, index=True):
    folder.mkdir(exist_ok=True)
    where = {}
    for i, weights in enumerate(parts):
        name = f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors"
        save(weights, folder / name)
        where |= dict.fromkeys(weights, name)
    if index:
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def test_a_sharded_folder_is_one_mapping(tmp_path):
    parts = [{"b": torch.ones(2)}, {"a": torch.zeros(3), "c": torch.tensor(1)}]
    for index in (True, False):
        back = load(shard(tmp_path / f"m{index}", parts, index))
        assert set(back) == {"a", "b", "c"}
        assert torch.equal(back["a"], parts[1]["a"])


def test_only_the_indexed_files_are_read(tmp_path):
    folder = shard(tmp_path / "m", [{"a": torch.ones(1)}])
    save({"a": torch.zeros(1)}, folder / "consolidated.safetensors")
    assert load(folder)["a"].item() == 1


def test_folders_that_do_not_fit(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"no \.safetensors file in"):
        load(tmp_path)
    twice = shard(tmp_path / "twice", [{"a": torch.ones(1)}, {"a": torch.ones(1)}], index=False)
    with pytest.raises(BadCheckpoint, match="holds tensor 'a' in two files"):
        load(twice)


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "/etc/passwd", "..", ".", "", "sub/x.safetensors", "gone.safetensors", 5, None, "a\0b"],
)
def test_an_index_names_files_of_its_folder_only(name, tmp_path):
    save({"a": torch.ones(1)}, tmp_path / "outside.safetensors")
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(BadCheckpoint, match=r"not a file of that folder|is damaged"):
        load(folder)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": ["x"]}}', "[" * 100_000, "\xff", '{"weight_map": 1}'],
)
def test_a_damaged_index(text, tmp_path):
    (tmp_path / INDEX).write_bytes(text.encode("latin-1"))
    with pytest.raises(BadCheckpoint, match="is damaged"):
        load(tmp_path)


def test_an_index_that_promises_too_much(tmp_path):
    folder = shard(tmp_path / "m", [{"a": torch.ones(1)}])
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["ghost"] = index["weight_map"]["a"]
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(BadCheckpoint, match="names 'ghost', which no shard holds"):
        load(folder)


# ---------------------------------------------------------------- pickles
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_is_refused_by_its_first_bytes(protocol, written):
    path = written(pickle.dumps({"a": [1.0] * 100}, protocol=protocol))
    with pytest.raises(BadCheckpoint, match=r"looks like a pickle, .*convert it once: .*save_file"):
        load(path)


def test_a_torch_file_is_refused_and_runs_nothing(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "m.safetensors")
    with pytest.raises(BadCheckpoint, match="looks like a pickle"):
        load(tmp_path / "m.safetensors")


@pytest.mark.parametrize("suffix", sorted(checkpoints.PICKLES))
def test_a_pickle_is_refused_by_its_suffix(suffix, written, tmp_path):
    path = written(raw({"a": entry()}, b"1234"), name=f"pytorch_model{suffix}")
    with pytest.raises(BadCheckpoint, match="looks like a pickle"):
        load(path)
    with pytest.raises(BadCheckpoint, match=f"pytorch_model{suffix} looks like a pickle"):
        load(tmp_path)


# ---------------------------------------------------------------- hostile files
GOOD = {"a": entry((2,), (0, 8)), "b": entry((3,), (8, 14), "F16")}
DATA = bytes(range(14))


def test_the_pattern_of_the_hostile_files_is_itself_sound(written):
    assert set(load(written(raw(GOOD, DATA)))) == {"a", "b"}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "is truncated: 0 bytes"),
        (b"\x10\0\0", "is truncated: 3 bytes"),
        (raw(GOOD, DATA)[:40], "header claims"),
        (raw(GOOD, DATA)[:-1], "is truncated or padded: 13 bytes of data, expected 14"),
        (raw(GOOD, DATA) + b"x", "is truncated or padded: 15 bytes of data, expected 14"),
        (raw(GOOD, b""), "is truncated or padded"),
        (raw(GOOD, DATA, length=2**63), "header claims"),
        (raw(GOOD, DATA, length=2**64 - 1), "header claims"),
        (raw(GOOD, DATA, length=0), "damaged header"),
        (raw(GOOD, DATA, length=5), "damaged header"),
        (raw(b"not json"), "damaged header"),
        (raw(b"[]"), "expected an object, got list"),
        (raw(b"null"), "expected an object, got NoneType"),
        (raw(b'"text"'), "expected an object, got str"),
        (raw(b"\xff\xfe{}"), "damaged header"),
        (raw(b'{"a\xff": 1}'), "damaged header"),
        (raw(b"[" * 200_000), "damaged header"),
        (raw(b'{"a":' * 100_000), "damaged header"),
        (raw(b'{"__metadata__": {"k": "1", "k": "2"}}'), "key 'k' stands there twice"),
        (raw(b'{"a": %s, "a": %s}' % ((json.dumps(entry()).encode(),) * 2), b"1234"), "key 'a' stands there twice"),
        (raw(b'{"a": {"dtype": "F32", "dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', b"1234"), "twice"),
        (raw(b'{"a": {"dtype": "F32", "shape": [1e0], "data_offsets": [0, 4]}}', b"1234"), "damaged entry"),
        (raw(b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 4]}}', b"1234"), "damaged entry"),
        (
            raw(b'{"a": {"dtype": "F32", "shape": [%s], "data_offsets": [0, 4]}}' % (b"9" * 5000), b"1234"),
            "damaged header",
        ),
        (raw({"a": entry(dtype="F7")}, b"1234"), "damaged entry for tensor 'a'"),
        (raw({"a": entry(dtype=["F32"])}, b"1234"), "damaged entry"),
        (raw({"a": entry(dtype=None)}, b"1234"), "damaged entry"),
        (raw({"a": 3}, b"1234"), "damaged entry"),
        (raw({"a": None}, b"1234"), "damaged entry"),
        (raw({"a": [1, 2]}, b"1234"), "damaged entry"),
        (raw({"a": {}}, b"1234"), "damaged entry"),
        (raw({"a": {"dtype": "F32", "shape": [1]}}, b"1234"), "damaged entry"),
        (raw({"a": entry((-1,), (0, 4))}, b"1234"), "damaged entry"),
        (raw({"a": entry((-1, -1), (0, 4))}, b"1234"), "damaged entry"),
        (raw({"a": entry((1,), (-4, 0))}, b"1234"), "damaged entry"),
        (raw({"a": entry((True,), (0, 4))}, b"1234"), "damaged entry"),
        (raw({"a": entry((1,), (False, 4))}, b"1234"), "damaged entry"),
        (raw({"a": entry(("1",), (0, 4))}, b"1234"), "damaged entry"),
        (raw({"a": entry((1,), (0, 4, 8))}, b"1234"), "damaged entry"),
        (raw({"a": {**entry(), "shape": ""}}, b"1234"), "damaged entry"),
        (raw({"a": {**entry(), "shape": {}}}, b"1234"), "damaged entry"),
        (raw({"a": {**entry(), "data_offsets": "04"}}, b"1234"), "damaged entry"),
        (raw({"a": entry((2**62, 4), (0, 4))}, b"1234"), "damaged entry"),
        (raw({"a": entry((2**62, 2**62, 0), (0, 0))}), "damaged entry"),
        (raw({"a": entry((10**300,), (0, 4))}, b"1234"), "damaged entry"),
        (raw({"a": entry([1] * 5000, (0, 4))}, b"1234"), "damaged entry"),
        (raw({"a": entry([9] * 1_000_000, (0, 4))}, b"1234"), "damaged entry"),
        (raw({"a": entry((2,), (0, 4))}, b"1234"), r"'a' of shape \[2\] does not fill its 4 bytes"),
        (raw({"a": entry((1,), (4, 0))}, b"1234"), "does not fill its -4 bytes"),
        (raw({"a": entry((10**9,), (0, 4 * 10**9))}, b"1234"), "truncated or padded: 4 bytes of data, expected 4,0"),
        (raw({"a": entry((1,), (4, 8))}, b"12345678"), "'a' starts at byte 4, expected 0"),
        (raw({"a": entry(), "b": entry()}, b"1234"), "'b' starts at byte 0, expected 4"),
        (raw({"a": entry((2,), (0, 8)), "b": entry((1,), (4, 8))}, b"12345678"), "'b' starts at byte 4, expected 8"),
        (raw({"a": entry(), "b": entry((1,), (8, 12))}, b"123456789012"), "'b' starts at byte 8, expected 4"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_a_hostile_file_is_refused_with_its_name(content, text, written):
    path = written(content)
    with pytest.raises(BadCheckpoint, match=text) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_every_truncation_is_refused(written):
    whole = raw(GOOD, DATA)
    for size in range(len(whole)):
        with pytest.raises(BadCheckpoint):
            load(written(whole[:size]))


def test_a_huge_header_is_not_even_read(written, monkeypatch):
    monkeypatch.setattr(checkpoints, "MAX_HEADER_BYTES", 50)
    with pytest.raises(BadCheckpoint, match="50 are allowed"):
        load(written(raw(GOOD, DATA)))


def test_names_are_only_names(tmp_path):
    names = ["../../x", "/etc/passwd", "", "a\0b", "<script>alert(1)</script>", "é", "a" * 5000, "C:\\x", "__proto__"]
    weights = {name: torch.full((1,), float(i)) for i, name in enumerate(names)}
    back = load(save(weights, tmp_path / "w.safetensors"))
    assert [back[name].item() for name in names] == list(range(len(names)))
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]


def test_a_long_name_does_not_flood_the_error(written):
    with pytest.raises(BadCheckpoint) as caught:
        load(written(raw({"x" * 100_000: entry(dtype="F7")}, b"1234")))
    assert len(str(caught.value)) < 500


def test_a_file_that_shrinks_while_it_is_read(written):
    path = written(raw(GOOD, DATA))
    checkpoint = Checkpoint(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(BadCheckpoint, match="ended while 'b' was read"):
        checkpoint["b"]


SEED = raw({"__metadata__": {"format": "pt"}, **GOOD, "e": entry((0, 3), (14, 14))}, DATA)


@given(
    st.lists(st.tuples(st.integers(0, len(SEED) - 1), st.integers(0, 255)), min_size=1, max_size=4), st.integers(0, 9)
)
@settings(deadline=None, max_examples=300)
def test_mutated_files_load_or_are_refused(tmp_path_factory, edits, cut):
    content = bytearray(SEED)
    for place, byte in edits:
        content[place] = byte
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    path.write_bytes(content[: len(content) - max(0, cut - 5)])
    try:
        back = load(path)
    except BadCheckpoint:
        return
    assert sum(tensor.nbytes for tensor in back.values()) == len(DATA)


@given(st.binary(max_size=200))
@settings(deadline=None, max_examples=200)
def test_any_bytes_as_a_header_load_or_are_refused(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "bytes.safetensors"
    path.write_bytes(raw(text, b"1234"))
    with pytest.raises(BadCheckpoint):
        load(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.sampled_from(["F32", "I8", "shape", ""]) | st.just(2**64),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "a"]), inner)
    ),
    max_leaves=6,
)
FIELDS = st.fixed_dictionaries({"dtype": JSON | st.just("U8"), "shape": JSON, "data_offsets": JSON | st.just([0, 4])})


@given(st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), FIELDS | JSON, max_size=2))
@settings(deadline=None, max_examples=300)
def test_any_json_as_a_header_loads_or_is_refused(tmp_path_factory, header):
    path = tmp_path_factory.getbasetemp() / "json.safetensors"
    path.write_bytes(raw(header, b"1234"))
    try:
        back = load(path)
    except BadCheckpoint:
        return
    assert sum(tensor.nbytes for tensor in back.values()) == 4


# ---------------------------------------------------------------- writing
def test_saving_is_all_or_nothing(tmp_path, monkeypatch):
    path = save({"a": torch.ones(2)}, tmp_path / "w.safetensors")
    before = path.read_bytes()

    def interrupted(self, name, tensor):
        raise KeyboardInterrupt

    monkeypatch.setattr(TensorWriter, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save({"a": torch.zeros(2)}, path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["w.safetensors"]


def test_what_cannot_be_saved_is_said(tmp_path):
    with pytest.raises(TypeError, match=r"'a' is torch.complex128, which safetensors does not hold"):
        save({"a": torch.ones(1, dtype=torch.complex128)}, tmp_path / "w.safetensors")
    with untyped(), pytest.raises(TypeError, match="'a' must be a tensor, got float"):
        save({"a": 1.0}, tmp_path / "w.safetensors")
    with pytest.raises(FileNotFoundError):
        save({}, tmp_path / "no folder" / "w.safetensors")
    assert not list(tmp_path.iterdir())


def test_the_writer_keeps_to_its_plan(tmp_path):
    spec = {"a": ((2,), torch.float32), "b": ((), torch.int64)}
    with pytest.raises(RuntimeError, match=r"lacks 'b' and 0 more"), TensorWriter(tmp_path / "1", spec) as writer:
        writer.write("a", torch.ones(2))
    for name, tensor, text in [
        ("b", torch.tensor(1), r"expected tensor \['a'\], got 'b'"),
        ("a", torch.ones(3), "'a' must be"),
        ("a", torch.ones(2).half(), "'a' must be"),
    ]:
        with pytest.raises(RuntimeError, match=text), TensorWriter(tmp_path / "2", spec) as writer:
            writer.write(name, tensor)


@pytest.mark.parametrize("folder", [False, True])
def test_atomic_leaves_no_trace_of_a_failure(folder, tmp_path):
    def interrupted():
        with atomic(tmp_path / "out") as partial:
            if folder:
                partial.mkdir()
                (partial / "x").write_text("half")
            else:
                partial.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())
    with atomic(tmp_path / "out") as partial:
        partial.write_text("whole")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out").read_text() == "whole"
