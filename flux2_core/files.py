"""Files are written whole or not at all: into a temporary file beside the target, flushed, then renamed over it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def write_atomically(path: str | os.PathLike[str], write: Callable[[Path], None]) -> Path:
    """Calls ``write(temporary_path)`` and renames the result to ``path``; on any failure ``path`` stays as it was.

    The temporary file keeps the suffix of ``path``, since some writers choose the format by it.
    """
    path = Path(path)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.stem[:40]}-", suffix=path.suffix, dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if os.name == "posix":
            mask = os.umask(0)
            os.umask(mask)
            temporary.chmod(0o666 & ~mask)  # mkstemp makes files private; ours get the user's usual mode
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Path:
    """Saves tensors and string metadata as one safetensors file, atomically."""
    from safetensors.torch import save_file

    contiguous = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    return write_atomically(path, lambda temporary: save_file(contiguous, temporary, dict(metadata or {})))


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Saves UTF-8 text, atomically."""
    return write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
