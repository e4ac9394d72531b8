"""Checkpoints of a training run: one file of tensors and JSON, without pickle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from armed_pyro._free_space import check_free
from armed_pyro.rows.source import RowSource

__all__ = ["VERSION", "Checkpoint", "digest", "module_tensors", "restore_module"]

# Version of the guide's parameters in checkpoints and saved fits.
VERSION = 3


@dataclass(frozen=True)
class Checkpoint:
    """State of a training run after a step."""

    tensors: dict[str, Tensor]  # parameters, buffers, optimizer moments and random state
    record: dict[str, Any]  # step, history, stopping state and settings, as JSON values

    def write(self, path: Path) -> None:
        """Write the checkpoint to `path`; if the process is killed, the old file stays whole.

        OSError if the disk has too little space; the old file stays then, too.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        size = sum(tensor.nbytes for tensor in self.tensors.values())
        check_free(path.parent, size, "the checkpoint")
        partial = path.with_suffix(".partial")
        tensors = {name: t.detach().cpu().contiguous() for name, t in self.tensors.items()}
        record = json.dumps(self.record)
        metadata = {"record": record, "version": str(VERSION), "sha256": _sum(tensors, record)}
        try:
            save_file(tensors, partial, metadata=metadata)
            partial.replace(path)
        except SafetensorError as error:  # a full disk
            raise OSError(f"the checkpoint could not be written to {path}: {error}") from error
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def read(cls, path: Path) -> Checkpoint:
        """The checkpoint at `path`; ValueError if it is damaged or of another `VERSION`."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                record = json.loads(metadata["record"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            # Checkpoints of earlier versions have no sum.
            if metadata.get("sha256", expected := _sum(tensors, metadata["record"])) != expected:
                raise KeyError("its checksum differs")
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(
                f"{path} is damaged or not a checkpoint ({error}): delete it and fit anew"
            ) from error
        if metadata.get("version") != str(VERSION):
            raise ValueError(
                f"{path} has the format's version {metadata.get('version')}, but this armed_pyro "
                f"needs version {VERSION}: delete it and fit anew"
            )
        return cls(tensors, record)


def _sum(tensors: Mapping[str, Tensor], record: str) -> str:
    """SHA-256 of a record and of the names, types, shapes and values of tensors."""
    hashed = hashlib.sha256(record.encode())
    for name, tensor in sorted(tensors.items()):
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        hashed.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def module_tensors(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    """A module's parameters and buffers, copied, under a prefix."""
    return {f"{prefix}.{name}": t.detach().clone() for name, t in module.state_dict().items()}


def restore_module(prefix: str, module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load the parameters and buffers that `module_tensors` copied under the prefix."""
    start = f"{prefix}."
    names = [name for name in tensors if name.startswith(start)]
    module.load_state_dict({name.removeprefix(start): tensors[name] for name in names})


def digest(rows: RowSource, encoding: Mapping[str, Any]) -> str:
    """Hash of the rows and of the scales and labels, as JSON values, that encoded them."""
    hashed = hashlib.sha256(json.dumps(encoding, default=str).encode())
    for part in rows.fingerprint():
        hashed.update(part)
    return hashed.hexdigest()
