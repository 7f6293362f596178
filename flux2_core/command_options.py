"""Options that several commands have in common."""

from __future__ import annotations

from pathlib import Path

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def choose_device(name: str | None) -> torch.device:
    """The device of that name; None: CUDA where there is one, else the CPU.

    Raises:
        ValueError: this machine has no such device.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros((), device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"--device is {name!r}, which cannot be used ({reason}); give cpu, cuda or cuda:N") from error
    if device.type == "meta":
        raise ValueError("--device is 'meta', which holds no values; give cpu, cuda or cuda:N")
    return device


def models_folder(path: str | None) -> Path | None:
    """The folder of ``--models_dir``.

    Raises:
        ValueError: it is no folder.
    """
    if path is not None and not Path(path).is_dir():
        raise ValueError(f"--models_dir {path} is no folder; give ComfyUI's models folder")
    return Path(path) if path is not None else None
