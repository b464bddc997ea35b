"""Checkpoint files: safetensors only, one file or sharded, read lazily, written atomically.

The header is read by our own code, because a file from a stranger must be refused before anything is allocated,
and because one tensor at a time must be readable without mapping the whole file.
"""

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 64
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAME_OF = {dtype: name for name, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"


class BadCheckpoint(ValueError):
    """A file that is not a sound safetensors checkpoint; the text says which file, what is wrong, what to do."""


def read_header(path: str | Path) -> tuple[dict[str, dict], int]:
    """Read and verify the header of one safetensors file.

    Args:
        path: a .safetensors file.

    Returns:
        The header (tensor name to dtype, shape, data_offsets; "__metadata__" kept apart by the caller) and the
        position of the first data byte.

    Raises:
        BadCheckpoint: a pickle, a truncated file, or a header that lies about its tensors.
    """
    path = Path(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(9)
        head = start[:8]
        # A header length may look like a pickle's first bytes; but a header starts with "{", and a pickle does not.
        if path.suffix in PICKLES or (start[8:] != b"{" and start[:2] in PICKLE_STARTS):
            raise BadCheckpoint(_pickle_text(path))
        file.seek(8)
        if len(head) < 8:
            raise BadCheckpoint(f"{path} is truncated: {size} bytes, a safetensors file has at least 8")
        length = int.from_bytes(head, "little")
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise BadCheckpoint(
                f"{path} is truncated or not a safetensors file: its header claims {length:,} bytes, "
                f"{size - 8:,} are there and {MAX_HEADER_BYTES:,} are allowed"
            )
        text = file.read(length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError, ValueError) as error:
        raise BadCheckpoint(f"{path} has a damaged header: {error}") from None
    if not isinstance(header, dict):
        raise BadCheckpoint(f"{path} has a damaged header: expected an object, got {type(header).__name__}")
    _verify(header, size - 8 - length, path)
    return header, 8 + length


class Checkpoint(Mapping[str, Tensor]):
    """A checkpoint on disk as a read-only mapping: a tensor is read when it is asked for, and not kept.

    Args:
        path: a .safetensors file, or a folder with one, or with shards and their index.

    Raises:
        BadCheckpoint: as `read_header`; also for an index that names a file outside the folder, or lacks a tensor.
        FileNotFoundError: nothing there.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.files = _files(self.path)
        self._entries: dict[str, tuple[Path, int, dict]] = {}
        for file in self.files:
            header, start = read_header(file)
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                if name in self._entries:
                    raise BadCheckpoint(f"{self.path} holds tensor {name!r} in two files")
                self._entries[name] = (file, start, entry)
        _verify_index(self.path, self._entries)

    def __getitem__(self, name: str) -> Tensor:
        file, start, entry = self._entries[name]
        begin, end = entry["data_offsets"]
        dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
        if begin == end:
            return torch.empty(shape, dtype=dtype)
        buffer = bytearray(end - begin)
        with open(file, "rb") as handle:
            handle.seek(start + begin)
            if handle.readinto(buffer) != len(buffer):
                raise BadCheckpoint(f"{file} ended while {name!r} was read")
        return torch.frombuffer(buffer, dtype=dtype).reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries  # Mapping's own would read the tensor

    def spec(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every tensor, from the headers alone."""
        return {name: (tuple(entry["shape"]), DTYPES[entry["dtype"]]) for name, (_, _, entry) in self._entries.items()}

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._entries[name][0]


def load(path: str | Path) -> dict[str, Tensor]:
    """Load a safetensors checkpoint into memory.

    Args:
        path: a .safetensors file or a folder (sharded or not).

    Returns:
        dict: tensor name to tensor, on the CPU, in the dtype of the file.

    Raises:
        BadCheckpoint: a pickle (with the way to convert it), a truncated or hostile file.
    """
    checkpoint = Checkpoint(path)
    return {name: checkpoint[name] for name in checkpoint}


def save(weights: Mapping[str, Tensor], path: str | Path) -> Path:
    """Save weights as one safetensors file, atomically: either the whole file appears or nothing changes.

    Args:
        weights: tensor name to tensor. Tied tensors are written once for each name.
        path: the file to write; its folder must exist.

    Returns:
        The path written.

    Raises:
        TypeError: a value is not a tensor, or its dtype has no place in the format.
    """
    for name, tensor in weights.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name!r} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in _NAME_OF:
            raise TypeError(f"{name!r} is {tensor.dtype}, which safetensors does not hold; cast it first")
    spec = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in weights.items()}
    with atomic(path) as partial, TensorWriter(partial, spec) as writer:
        for name, tensor in weights.items():
            writer.write(name, tensor)
    return Path(path)


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Give a hidden neighbour of `path` to write to; it takes the name `path` only if the block succeeds.

    An interrupt or an error inside the block removes it, and what stood at `path` stays as it was.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)
        raise


class TensorWriter:
    """Writes a safetensors file one tensor at a time, in the order of its spec.

    Args:
        path: the file.
        spec: tensor name to (shape, dtype); fixes header and order.
    """

    def __init__(self, path: Path, spec: Mapping[str, tuple[tuple[int, ...], torch.dtype]]):
        self.path, self._names = path, list(spec)
        header, position = {"__metadata__": {"format": "pt"}}, 0
        for name, (shape, dtype) in spec.items():
            end = position + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _NAME_OF[dtype], "shape": list(shape), "data_offsets": [position, end]}
            position = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._spec = dict(spec)
        self._file = open(path, "wb")  # noqa: SIM115  closed in __exit__
        self._file.write(len(text).to_bytes(8, "little") + text)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self._file.close()
        if kind is None and self._names:
            raise RuntimeError(f"{self.path} lacks {self._names[0]!r} and {len(self._names) - 1} more")

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor of the spec."""
        if not self._names or name != self._names[0]:
            raise RuntimeError(f"expected tensor {self._names[:1]}, got {name!r}")
        if (tuple(tensor.shape), tensor.dtype) != self._spec[name]:
            raise RuntimeError(f"{name!r} must be {self._spec[name]}, got {tuple(tensor.shape)}, {tensor.dtype}")
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        self._file.write(memoryview(flat.view(torch.uint8).numpy()))
        self._names.pop(0)


PICKLE_STARTS = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}


def _pickle_text(path: Path) -> str:
    return (
        f"{path} looks like a pickle, which can run code when it is opened, so it is refused. In a place you trust, "
        "convert it once: safetensors.torch.save_file(torch.load(path, weights_only=True), 'model.safetensors')"
    )


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"no checkpoint at {path}")
    index = path / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BadCheckpoint(f"{index} is damaged: {error!r}") from None
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or not (path / name).is_file():
                raise BadCheckpoint(f"{index} names {name!r}, which is not a file of that folder")
        return [path / name for name in names]
    files = sorted(path.glob("*.safetensors"))
    if not files:
        pickles = sorted(file for file in path.iterdir() if file.suffix in PICKLES)
        if pickles:
            raise BadCheckpoint(_pickle_text(pickles[0]))
        raise FileNotFoundError(f"no .safetensors file in {path}")
    return files


def _verify_index(path: Path, entries: Mapping) -> None:
    index = path / INDEX
    if path.is_dir() and index.is_file():
        missing = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"]) - set(entries))
        if missing:
            raise BadCheckpoint(f"{index} names {missing[0]!r}, which no shard holds ({len(missing)} such tensors)")


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict:
    found = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {key[:80]!r} stands there twice")
        found[key] = value
    return found


def _verify(header: dict, data_bytes: int, path: Path) -> None:
    """Every entry well-formed; together they tile the data exactly, with no overlap and no hole."""
    spans = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (begin, end) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            whole = [*shape, begin, end]
            sound = isinstance(shape, list) and len(shape) <= MAX_DIMENSIONS
            sound = sound and all(type(number) is int and 0 <= number < 2**63 for number in whole)
            # torch multiplies lengths in 64 bits, also where a 0 among them makes the tensor empty.
            sound = sound and math.prod(number or 1 for number in shape) < 2**63
        except (KeyError, TypeError, ValueError):
            sound = False
        if not sound:
            raise BadCheckpoint(f"{path} has a damaged entry for tensor {name[:80]!r}: {str(entry)[:120]}")
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise BadCheckpoint(f"{path}: {name[:80]!r} of shape {shape} does not fill its {end - begin} bytes")
        spans.append((begin, end, name))
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            raise BadCheckpoint(f"{path}: tensor {name[:80]!r} starts at byte {begin}, expected {position}")
        position = end
    if position != data_bytes:
        raise BadCheckpoint(f"{path} is truncated or padded: {data_bytes:,} bytes of data, expected {position:,}")
