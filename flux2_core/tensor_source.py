"""One table over the tensors of one or several safetensors files, checked before any memory is taken.

Format: https://github.com/huggingface/safetensors - eight bytes with the length of a JSON header, the header, the data.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeGuard

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .block_memory import Transfers, make_transfers
from .device_memory import available_host_bytes
from .file_reader import FileReader, expect
from .files import read_json_object

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library itself."""
MAX_INDEX_BYTES = 64 * 2**20

BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6,
    "F6_E3M2": 6, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
    "C64": 64,
}  # fmt: skip
"""Size of an element of each type that the format knows."""
TORCH_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
FOREIGN_STARTS: tuple[tuple[bytes, str, str], ...] = (
    (b"PK\x03\x04", "a zip archive, probably a pickled PyTorch checkpoint", "pickle can run code and is not read"),
    (b"\x80\x02", "a pickled PyTorch checkpoint", "pickle can run code and is not read"),
    (b"\x80\x03", "a pickled PyTorch checkpoint", "pickle can run code and is not read"),
    (b"\x80\x04", "a pickled PyTorch checkpoint", "pickle can run code and is not read"),
    (b"\x80\x05", "a pickled PyTorch checkpoint", "pickle can run code and is not read"),
    (b"GGUF", "a GGUF file", "GGUF is not read"),
    (b"version https://git-lfs", "a Git LFS pointer, not the weights", "run `git lfs pull`, or download the file"),
    (b"<!DOCTYPE", "a web page", "the download failed; log in or accept the licence, then download again"),
    (b"<!doctype", "a web page", "the download failed; log in or accept the licence, then download again"),
    (b"<html", "a web page", "the download failed; log in or accept the licence, then download again"),
    (b"\x1f\x8b", "a gzip archive", "unpack it first"),
    (b"{", "a JSON file", "give the safetensors file, or an index that ends in .safetensors.index.json"),
)
"""How other kinds of file begin, what they are, and what to do."""
SUBFOLDERS = {"dit": ("transformer",), "autoencoder": ("vae",), "text_encoder": ("text_encoder",)}
"""Where a diffusers model folder keeps a component."""
STANDARD_NAMES = ("diffusion_pytorch_model", "model")
"""Which file of a folder is meant when it holds several precisions, as Hugging Face libraries name them."""
SHARD = re.compile(r"(?P<stem>.+)-(?P<index>\d{5})-of-(?P<count>\d{5})\.safetensors")


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """Where a tensor lies and what it is, as its file's header says."""

    file: Path
    dtype: str
    """In the format's own name, such as "BF16"."""
    shape: tuple[int, ...]
    begin: int
    """Offset in the file, in bytes."""
    num_bytes: int

    @property
    def num_elements(self) -> int:
        """Product of the shape."""
        count = 1
        for side in self.shape:
            count *= side
        return count


class TensorSource:
    """The tensors of a safetensors file, of a set of shards, or of a folder, by name.

    Args:
        path: a file; a shard ``X-00001-of-0000N.safetensors``, which stands for all; an index
            ``*.safetensors.index.json``; or a folder with one of these, in it or in the diffusers subfolder of
            ``component``.
        component: which subfolder to look in first.

    Raises:
        ValueError: nothing is there, a shard is missing, or a file is damaged or no safetensors file.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        component: Literal["dit", "autoencoder", "text_encoder"] | None = None,
    ) -> None:
        self.path = Path(path)
        self.component = component
        found = _resolve(self.path, component)
        self.folder = found.parent
        """The folder of the files, with their config.json where there is one."""
        weight_map: dict[str, str] | None = None
        if found.name.endswith(".json"):
            weight_map = _read_index(found)
            self.files = sorted({found.parent / name for name in weight_map.values()})
        else:
            self.files = _shards(found)
        absent = [file.name for file in self.files if not file.is_file()]
        if absent:
            raise ValueError(
                f"{self.path}: {len(absent)} of {len(self.files)} files are missing from {self.folder}: "
                f"{', '.join(absent[:4])}; download them into that folder"
            )
        self.metadata: dict[str, str] = {}
        self.table: dict[str, TensorEntry] = {}
        for file in self.files:
            entries, metadata = read_header(file)
            self.metadata |= metadata
            for name, entry in entries.items():
                if weight_map is not None and weight_map.get(name) != file.name:
                    continue
                if name in self.table:
                    raise ValueError(f"{self.path}: {name!r} is in {self.table[name].file.name} and in {file.name}")
                self.table[name] = entry
        if weight_map is not None and (lost := sorted(weight_map.keys() - self.table.keys())):
            raise ValueError(
                f"{found}: {len(lost)} of its tensors are not in the files it names, such as {lost[0]!r}; "
                "index and shards are not of one download"
            )
        self._handles: dict[Path, Any] = {}
        self._reader = FileReader()
        self._transfers: dict[torch.device, Transfers] = {}
        self._is_read_ahead: bool | None = None

    @property
    def names(self) -> list[str]:
        """All names, in the order of the files."""
        return list(self.table)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor."""
        return {name: entry.shape for name, entry in self.table.items()}

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(entry.num_bytes for entry in self.table.values())

    def dtype(self, name: str) -> torch.dtype | None:
        """Type of a tensor, None where torch has none to hold it."""
        return TORCH_DTYPES.get(self.table[name].dtype)

    @torch.inference_mode(False)  # `Transfers` writes to no tensor of inference mode
    def get(self, name: str, mapped: bool = False, device: str | torch.device = "cpu") -> Tensor:
        """Reads one tensor as it is stored.

        Args:
            mapped: whether a tensor on the CPU may share memory with the file, read as it is used and given back by the
                system when memory is short; writing to it does not change the file. Otherwise it is read into memory
                of its own.
            device: where it goes; to CUDA it passes through pinned memory part by part, and the copies need not be over
                when it is given back: they come before what is computed next.

        Raises:
            ValueError: the type is not one torch can hold, or the file changed since it was opened.
        """
        entry, device = self.table[name], torch.device(device)
        dtype = TORCH_DTYPES.get(entry.dtype)
        if dtype is None:
            raise ValueError(
                f"{entry.file}: {name} has the type {entry.dtype}; types that are read: {', '.join(TORCH_DTYPES)}"
            )
        # A view needs its offset to be a multiple of the element's size, which not every writer sees to.
        if mapped and device.type == "cpu" and entry.num_bytes and entry.begin % dtype.itemsize == 0:
            return self._map(entry, name)
        is_staged = device.type == "cuda"
        data = torch.empty(entry.num_bytes, dtype=torch.uint8, device=device if is_staged else "cpu")
        try:
            self._reader.fill(entry.file, entry.begin, data, self._transfers_to(device) if is_staged else None)
        except EOFError as error:
            raise ValueError(f"{entry.file} was cut off while it was read; download it again") from error
        return data.view(dtype).reshape(entry.shape).to(device)

    def _transfers_to(self, device: torch.device) -> Transfers:
        if device not in self._transfers:
            self._transfers[device] = make_transfers(device)
        return self._transfers[device]

    def _map(self, entry: TensorEntry, name: str) -> Tensor:
        try:
            if entry.file not in self._handles:
                self._handles[entry.file] = safe_open(entry.file, framework="pt", device="cpu")
            if self._is_read_ahead is None:
                # What does not fit is streamed from the file: reading it ahead would only push other things out.
                self._is_read_ahead = 2 * self.num_bytes < (available_host_bytes() or 0)
            if self._is_read_ahead:
                expect(entry.file, entry.begin, entry.num_bytes)
            return self._handles[entry.file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{entry.file} cannot be mapped: {error}; download it again") from error


def read_header(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """The table and the metadata of one safetensors file; reads the header only.

    Raises:
        ValueError: the file is truncated, inconsistent, or of another kind.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(32)
            length = int.from_bytes(start[:8], "little")
            _check_start(path, start, size, length)
            file.seek(8)
            raw = file.read(length)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique_object)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged: its safetensors header is no valid JSON ({error}); download it again"
        ) from None
    if not isinstance(header, dict):
        raise ValueError(f"{path} is damaged: its safetensors header is no JSON object; download it again")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{path} is damaged: its metadata must map names to text; download it again")
    data_start, data_bytes = 8 + length, size - 8 - length
    entries = {name: _check_entry(path, name, value, data_start, data_bytes) for name, value in header.items()}
    _check_coverage(path, entries, data_start, data_bytes)
    return entries, metadata


def _check_start(path: Path, start: bytes, size: int, length: int) -> None:
    for beginning, what, advice in FOREIGN_STARTS:
        # The eight bytes of a header's length may look like one of these; the header itself begins with a brace.
        if start.lstrip().startswith(beginning) and start[8:9] != b"{":
            raise ValueError(f"{path} is {what}, not a safetensors file: {advice}; give a .safetensors file")
    if size < 8 + 2:
        raise ValueError(f"{path} holds {size} bytes, too few for a safetensors file; download it again")
    if length > MAX_HEADER_BYTES or start[8:9] != b"{":
        raise ValueError(f"{path} is not a safetensors file; give a .safetensors file")
    if 8 + length > size:
        raise ValueError(
            f"{path} is truncated: its header takes {length} bytes and the file holds {size}; download it again"
        )


def _check_entry(path: Path, name: str, value: object, data_start: int, data_bytes: int) -> TensorEntry:
    damaged = f"{path} is damaged: the header entry of {name[:200]!r}"
    if not isinstance(value, dict):
        raise ValueError(f"{damaged} is no object; download it again")
    dtype, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"{damaged} has the unknown type {str(dtype)[:40]!r}; known types: {', '.join(BITS)}")
    if not _whole_numbers(shape) or len(shape) > 16 or not _whole_numbers(offsets) or len(offsets) != 2:
        raise ValueError(f"{damaged} has no valid shape and data_offsets; download it again")
    begin, end = offsets
    if not begin <= end:
        raise ValueError(f"{damaged} ends before it begins; download it again")
    if end > data_bytes:
        raise ValueError(
            f"{path} is truncated: {name[:200]!r} ends at byte {data_start + end} and the file holds "
            f"{data_start + data_bytes}; download it again"
        )
    entry = TensorEntry(file=path, dtype=dtype, shape=tuple(shape), begin=data_start + begin, num_bytes=end - begin)
    if entry.num_elements * BITS[dtype] != 8 * entry.num_bytes:
        raise ValueError(
            f"{damaged} gives {entry.num_bytes} bytes to {list(shape)} elements of {dtype}; download it again"
        )
    return entry


def _check_coverage(path: Path, entries: Mapping[str, TensorEntry], data_start: int, data_bytes: int) -> None:
    """The format allows neither gaps nor overlaps: overlaps would be a way to ask for more memory than the file has."""
    position = data_start
    for entry in sorted(entries.values(), key=lambda entry: (entry.begin, entry.num_bytes)):
        if entry.begin != position:
            raise ValueError(f"{path} is damaged: its tensors overlap or leave gaps; download it again")
        position += entry.num_bytes
    if position != data_start + data_bytes:
        raise ValueError(
            f"{path} is damaged: its tensors end at byte {position} and the file holds {data_start + data_bytes}; "
            "download it again"
        )


def _whole_numbers(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(number) is int and 0 <= number < 2**63 for number in value)


def _unique_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _resolve(path: Path, component: str | None) -> Path:
    """The file that stands for ``path``: a safetensors file or an index."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"{path} does not exist; give a .safetensors file, its index, or a model folder")
    folders = [path / name for name in SUBFOLDERS.get(component or "", ())]
    folders = [folder for folder in folders if folder.is_dir()] + [path]
    for folder in folders:
        if found := _find_in_folder(folder):
            return found
    subfolders = ", ".join(f"{name}/" for names in SUBFOLDERS.values() for name in names)
    raise ValueError(
        f"{path} is a folder without safetensors files; give the file itself or a model folder with one of {subfolders}"
    )


def _find_in_folder(folder: Path) -> Path | None:
    indices = sorted(folder.glob("*.safetensors.index.json"))
    files = sorted(folder.glob("*.safetensors"))
    # Of a set of shards, the first stands for all.
    files = [file for file in files if not (shard := SHARD.fullmatch(file.name)) or int(shard["index"]) == 1] or files
    stems = {file.name.removesuffix(".index.json").removesuffix(".safetensors"): file for file in [*files, *indices]}
    for name in STANDARD_NAMES:
        if name in stems:
            return stems[name]
    choices = indices or files
    if len(choices) > 1:
        raise ValueError(
            f"{folder} holds {len(choices)} checkpoints: {', '.join(choice.name for choice in choices[:6])}; "
            "give the path of one of them"
        )
    return choices[0] if choices else None


def _shards(path: Path) -> list[Path]:
    match = SHARD.fullmatch(path.name)
    if not match:
        return [path]
    count = int(match["count"])
    if not 1 <= int(match["index"]) <= count:
        raise ValueError(
            f"{path.name}: shard {match['index']} of {match['count']} does not exist; restore the file's name"
        )
    return [path.with_name(f"{match['stem']}-{index:05d}-of-{count:05d}.safetensors") for index in range(1, count + 1)]


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_json_object(path, MAX_INDEX_BYTES, _unique_object).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path} has no weight_map; give a .safetensors file or its .safetensors.index.json")
    for name in weight_map.values():
        if not isinstance(name, str) or not re.fullmatch(r"[^/\\:\x00]+\.safetensors", name):
            raise ValueError(
                f"{path} names the file {str(name)[:200]!r}; an index may name only .safetensors files of its folder"
            )
    return weight_map


def spread_samples(num_bytes: int, num_samples: int, sample_bytes: int) -> list[tuple[int, int]]:
    """Begin and end of stretches spread evenly over a tensor, its beginning and end among them; all of a small one."""
    if num_bytes <= num_samples * sample_bytes:
        return [(0, num_bytes)]
    starts = [(num_bytes - sample_bytes) * index // (num_samples - 1) for index in range(num_samples)]
    return [(start, start + sample_bytes) for start in starts]
