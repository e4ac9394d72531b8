"""Checkpoints of a training run: tensors and their bookkeeping in one file, without pickle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from armed_pyro.rows.batch import Rows
from armed_pyro.rows.source import RowSource

__all__ = ["VERSION", "Checkpoint", "digest", "module_tensors", "restore_module"]


# Version of the guide's parameters in checkpoints and saved fits.
VERSION = 3


@dataclass(frozen=True)
class Checkpoint:
    """State of a run after some step.

    Attributes
    ----------
    tensors : dict of str to Tensor
        Parameters, buffers, optimizer moments and random state, by name.
    record : dict
        Step, history, stopping state and settings, as JSON values.
    """

    tensors: dict[str, Tensor]
    record: dict[str, Any]

    def write(self, path: Path) -> None:
        """Write the file under a temporary name, then rename: a kill leaves the old file whole."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        tensors = {name: one.detach().cpu().contiguous() for name, one in self.tensors.items()}
        metadata = {"record": json.dumps(self.record), "version": str(VERSION)}
        save_file(tensors, partial, metadata=metadata)
        partial.replace(path)

    @classmethod
    def read(cls, path: Path) -> Checkpoint:
        """The checkpoint at `path`.

        Raises
        ------
        ValueError
            If the file is damaged, not a checkpoint, or of a guide of another version.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                record = json.loads(metadata["record"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{path} is damaged or not a checkpoint ({error}): delete it and fit anew"
            ) from error
        if metadata.get("version") != str(VERSION):
            raise ValueError(
                f"{path} has the format's version {metadata.get('version')}, this armed_pyro goes "
                f"on from version {VERSION}: delete it and fit anew"
            )
        return cls(tensors, record)


def module_tensors(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    """A module's parameters and buffers, copied, under a prefix."""
    return {f"{prefix}.{name}": one.detach().clone() for name, one in module.state_dict().items()}


def restore_module(prefix: str, module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put back what `module_tensors` took."""
    start = f"{prefix}."
    own = {key[len(start) :]: one for key, one in tensors.items() if key.startswith(start)}
    module.load_state_dict(own)


def digest(rows: Rows | RowSource, encoding: Mapping[str, Any]) -> str:
    """Hash of rows and of the scales and labels by which they were encoded, as JSON values."""
    hashed = hashlib.sha256(json.dumps(encoding, default=str).encode())
    for part in rows.fingerprint():
        hashed.update(part)
    return hashed.hexdigest()
