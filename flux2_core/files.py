"""Small files are read with a limit on their size, and files are written whole or not at all.

What is written goes into a temporary file beside the target, is flushed, then renamed over it.
"""

from __future__ import annotations

import json
import os
import secrets
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

MAX_JSON_BYTES = 8 * 2**20
"""No configuration beside a model is larger."""


def read_limited(path: Path, max_bytes: int) -> bytes:
    """The content of a file.

    Raises:
        ValueError: it is larger than ``max_bytes``.
    """
    size = path.stat().st_size
    if size > max_bytes:
        raise ValueError(f"{path} has {size} bytes, more than the {max_bytes} that such a file may have")
    return path.read_bytes()


def read_json_object(
    path: Path,
    max_bytes: int = MAX_JSON_BYTES,
    object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None,
) -> dict[str, Any]:
    """A small JSON file that holds an object.

    Args:
        object_pairs_hook: as in `json.loads`; may raise ValueError to refuse an object.

    Raises:
        ValueError: it is too large, no JSON, or no object.
    """
    content = read_limited(path, max_bytes)
    try:
        data = json.loads(content, object_pairs_hook=object_pairs_hook)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}; download it again") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(data).__name__}")
    return data


def write_atomically(path: str | os.PathLike[str], write: Callable[[Path], object]) -> Path:
    """Calls ``write(temporary_path)`` and renames the result to ``path``; on any failure ``path`` stays as it was.

    The temporary file keeps the suffix of ``path``, since some writers choose the format by it.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem[:40]}-{secrets.token_hex(4)}{path.suffix}")
    # Not by `tempfile`: its files are private, and the user's usual mode can only be asked for by changing it, which
    # two threads must not do at a time.
    temporary.open("xb").close()
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.filename is None and error.errno is not None:  # a full disk does not say which
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)
    return path


def make_writable(folder: Path) -> None:
    """Makes a folder where there is none, and tries to write into it.

    Raises:
        OSError: one of both cannot be done.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def write_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Path:
    """Saves tensors and string metadata as one safetensors file, atomically.

    Equal content gives equal bytes; safetensors' own writer puts the metadata in another order each time.
    """
    from .tensor_source import TORCH_DTYPES

    words = {dtype: word for word, dtype in TORCH_DTYPES.items()}
    ordered = in_file_order(tensors)
    layout = {name: (words[tensor.dtype], tuple(tensor.shape), tensor.nbytes) for name, tensor in ordered.items()}
    return stream_safetensors(path, layout, ordered.items(), dict(sorted((metadata or {}).items())))


def in_file_order(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as `write_safetensors` puts them one behind the other."""
    # Wide types first, as safetensors does it: then every tensor begins at a multiple of its item size.
    return dict(sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The content of a tensor as a file holds it."""
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def stream_safetensors(
    path: str | os.PathLike[str],
    layout: Mapping[str, tuple[str, tuple[int, ...], int]],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Writes a safetensors file tensor by tensor, atomically: one of them is in memory at a time.

    Args:
        layout: by name the type in the format's own word, the shape, and the number of bytes; the order of the file.
        tensors: every tensor of ``layout``, in its order.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, (dtype, shape, num_bytes) in layout.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + num_bytes]}
        position += num_bytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # the data begins at a multiple of 8 bytes

    def write(temporary: Path) -> None:
        expected = iter(layout.items())
        with temporary.open("wb") as file:
            file.write(len(raw).to_bytes(8, "little") + raw)
            for name, tensor in tensors:
                wanted, (_, shape, num_bytes) = next(expected)
                assert (name, tuple(tensor.shape), tensor.nbytes) == (wanted, shape, num_bytes), (name, wanted)
                file.write(tensor_bytes(tensor))
                del tensor  # before the next one is made
        assert next(expected, None) is None, "fewer tensors than in the layout"

    return write_atomically(path, write)


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Saves UTF-8 text, atomically."""
    return write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
