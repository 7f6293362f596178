"""Where a run writes, and the LoRAs that it has saved, of which the last are kept."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..flux2_core.files import make_writable
from ..flux2_core.lora_writer import write_lora
from .base_model import DTYPES

if TYPE_CHECKING:
    from ..flux2_core.lora_factors import Lora
    from .config import OutputConfig

SaveKind = Literal["trained", "step", "epoch", "stopped"]
STATE_BYTES = 4 * 4
"""Of a trained value in a state: the fp32 master, two moments and an average."""
SPARE_BYTES = 64 * 2**20
"""Left free on the disk beside what training is going to write."""


class RunFiles:
    """The folders and file names of a run.

    Args:
        writes: whether this process is the one that writes.
    """

    def __init__(self, output: OutputConfig, *, writes: bool) -> None:
        self.output, self.writes = output, writes
        self.name, self.folder = output.output_name, output.output_dir
        self.lora_folder = output.lora_dir or output.output_dir
        self.state_folder = self.folder / f"{self.name}-state"
        self.sample_folder = self.folder / "sample"
        self.metrics_path = self.folder / f"{self.name}-metrics.jsonl"
        self.curves_path = self.folder / f"{self.name}-curves.png"
        self.saved: list[tuple[SaveKind, int]] = []
        """Saves by steps and epochs that are kept, with the steps or epochs done."""

    def lora_path(self, kind: SaveKind, number: int = 0) -> Path:
        """Of the LoRA after so many epochs or steps, or after all of them."""
        suffix = {"trained": "", "epoch": f"-{number:06d}"}.get(kind, f"-step{number:08d}")
        return self.lora_folder / f"{self.name}{suffix}.safetensors"

    def make_folders(self, *, is_new: bool) -> None:
        """Makes the folders, and takes away what a killed run of this name has left half written.

        Args:
            is_new: the run does not go on from a state.

        Raises:
            ValueError: nothing can be written there, or a new run would write over another one.
        """
        for folder in (self.folder, self.lora_folder):
            try:
                make_writable(folder)
            except OSError as error:
                raise ValueError(
                    f"nothing can be written into {folder} ({error.strerror}); choose another folder"
                ) from error
        names = re.compile(re.escape(self.name) + r"(-\d{6}|-step\d{8})?\.safetensors")
        found = sorted(path for path in self.lora_folder.iterdir() if names.fullmatch(path.name))
        found += [self.state_folder] if any(self.state_folder.glob("*.safetensors")) else []
        if is_new and found:
            some = ", ".join(path.name for path in found[:3])
            raise ValueError(
                f"{found[0].parent} has a run named {self.name} already ({some}); go on with it (resume), choose "
                "another output_name, or delete these files"
            )
        if self.writes:
            self._delete_half_written()

    def check_space(self, num_values: int, *, num_steps: int, num_epochs: int) -> None:
        """Sees whether all that is going to be written fits onto the disk.

        Args:
            num_values: trained ones.
            num_steps, num_epochs: that are left.

        Raises:
            ValueError: it does not.
        """
        # The trained LoRA and the state each take their space twice while a new one replaces the old one.
        num_loras = 2 + self._num_saves("step", num_steps) + self._num_saves("epoch", num_epochs)
        lora_bytes = num_loras * num_values * DTYPES[self.output.save_precision].itemsize
        state_bytes = 2 * num_values * STATE_BYTES
        is_one_disk = self.lora_folder.stat().st_dev == self.folder.stat().st_dev
        for folder, num_bytes in ((self.lora_folder, lora_bytes), (self.folder, state_bytes)):
            needed = SPARE_BYTES + (lora_bytes + state_bytes if is_one_disk else num_bytes)
            free = shutil.disk_usage(folder).free
            if free < needed:
                raise ValueError(
                    f"{folder} has {free / 2**30:.2f} GiB free, and the LoRAs with the state need up to "
                    f"{needed / 2**30:.2f} GiB; free some space, save less often, keep fewer (save_last_n_steps, "
                    "save_last_n_epochs), or write to another disk"
                )

    def save_lora(self, make: Callable[[], Lora], kind: SaveKind, number: int) -> Path:
        """Writes a LoRA, see `lora_path`, and deletes those saved by steps or epochs that are not to be kept longer.

        Raises:
            OSError: the disk is full.
        """
        path = self.lora_path(kind, number)
        if self.writes:
            write_lora(path, make())
        if kind in ("trained", "stopped"):
            return path
        kept, unit = self._kept(kind)
        old = [entry for entry in self.saved if entry[0] == kind and kept and entry[1] <= number - kept * unit]
        self.saved = [*(entry for entry in self.saved if entry not in old), (kind, number)]
        if self.writes:
            for entry in old:
                self.lora_path(*entry).unlink(missing_ok=True)
        return path

    def state_dict(self) -> list[Any]:
        """What a run that goes on has to know."""
        return [list(entry) for entry in self.saved]

    def load_state_dict(self, state: list[Any]) -> None:
        """Restores what `state_dict` gave.

        Raises:
            ValueError: it is something else.
        """
        for kind, number in state:
            if kind not in ("step", "epoch") or type(number) is not int:
                raise ValueError(f"{kind!r} {number!r} is no save of a run")
        self.saved = [(kind, number) for kind, number in state]

    def _delete_half_written(self) -> None:
        """Temporary files of `files.write_atomically` under the names of this run."""
        stem = re.escape(self.name[:40]) + r"(-\d{6}|-step\d{8}|-curves|-metrics)?"
        names = re.compile(rf"\.({stem}|state)-[0-9a-f]{{8}}\.(safetensors|png|jsonl)")
        for folder in (self.lora_folder, self.folder, self.state_folder):
            for path in folder.iterdir() if folder.is_dir() else ():
                if names.fullmatch(path.name):
                    path.unlink(missing_ok=True)

    def _kept(self, kind: SaveKind) -> tuple[int | None, int]:
        """How many saves are kept, and of how many steps or epochs each counts: steps are counted one by one."""
        if kind == "step":
            return self.output.save_last_n_steps, 1
        return self.output.save_last_n_epochs, self.output.save_every_n_epochs or 1

    def _num_saves(self, kind: SaveKind, number: int) -> int:
        """Saves that `number` steps or epochs leave on the disk."""
        every = self.output.save_every_n_steps if kind == "step" else self.output.save_every_n_epochs
        if every is None:
            return 0
        kept, unit = self._kept(kind)
        return number // every if kept is None else min(number // every, -(-kept * unit // every))


def metrics_beside(state_folder: Path) -> Path:
    """The metrics of the run that has written a state."""
    folder = state_folder.resolve()
    return folder.with_name(folder.name.removesuffix("-state") + "-metrics.jsonl")
