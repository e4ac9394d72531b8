"""The training rows in ``posterior.nc``, read without any HDF5 feature that could do harm.

External links and external storage would read other files of the machine, virtual datasets and
references other objects, and a compressed block of a few kilobytes can fill the memory. A file with
any of these was not written by this library and is refused.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import xarray as xr

__all__ = ["Expected", "open_plain", "read_values"]

DEFLATE, SHUFFLE = h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE
LAYOUTS = (h5py.h5d.COMPACT, h5py.h5d.CONTIGUOUS, h5py.h5d.CHUNKED)
# No more bytes come out of a byte that zlib compressed.
LARGEST_RATIO = 1032
# Attributes by which xarray reads times and booleans; all others are ignored.
DECODED = ("units", "calendar", "dtype")
NUMBERS, LABELS = "fiu", "fiubO"


@dataclass(frozen=True)
class Expected:
    """What a variable must be: its shape, and the kinds of its values."""

    shape: tuple[int, ...]
    kinds: str = NUMBERS


@contextmanager
def open_plain(
    path: Path, groups: frozenset[str]
) -> Iterator[Mapping[tuple[str, str], h5py.Dataset]]:
    """The datasets of a file by group and name, after a check of the whole file.

    `groups` are all groups that the file may have. ValueError names what is not plain.
    """
    with h5py.File(path, "r") as file:
        yield dict(_datasets(file, groups))


def _datasets(
    file: h5py.File, groups: frozenset[str]
) -> Iterator[tuple[tuple[str, str], h5py.Dataset]]:
    """Every dataset by group and name; ValueError for anything but plain groups and datasets."""
    for group_name in file:
        group = _linked(file, group_name)
        if not isinstance(group, h5py.Group) or group_name not in groups:
            raise ValueError(f"'/{group_name}' is not a group of draws or rows")
        for name in group:
            dataset = _linked(group, name)
            _check_plain(dataset)
            yield (group_name, name), dataset


def _linked(group: h5py.Group, name: str) -> Any:
    """A member that lies in this very file; links are never followed."""
    link = group.get(name, getlink=True)
    if not isinstance(link, h5py.HardLink):
        raise ValueError(
            f"'{group.name.rstrip('/')}/{name}' is a link ({type(link).__name__}) to another "
            "object or file, which is not followed"
        )
    return group[name]


def _check_plain(dataset: Any) -> None:
    """Raise ValueError unless this is a dataset of numbers or text that the file itself holds."""
    if not isinstance(dataset, h5py.Dataset):
        raise ValueError(f"{getattr(dataset, 'name', '?')!r} is not a dataset")
    plan, name = dataset.id.get_create_plist(), dataset.name
    if dataset.is_virtual or plan.get_layout() not in LAYOUTS:
        raise ValueError(f"{name!r} is a virtual dataset, which may show other files")
    if plan.get_external_count():
        raise ValueError(f"{name!r} has its values in another file, which is not read")
    used = {plan.get_filter(place)[0] for place in range(plan.get_nfilters())}
    if used - {DEFLATE, SHUFFLE}:
        raise ValueError(f"{name!r} is compressed by other filters than shuffle and deflate")
    text = dataset.dtype.kind == "O" and h5py.check_string_dtype(dataset.dtype) is not None
    if dataset.dtype.kind not in "fiubSU" and not text:
        raise ValueError(f"{name!r} holds {dataset.dtype}, expected numbers or text")


def read_values(dataset: h5py.Dataset, expected: Expected) -> np.ndarray:
    """The values of a dataset that is as expected, with times and booleans decoded.

    ValueError, with the dataset's name, if it is not as expected or not all numbers are finite.
    """
    if dataset.shape != expected.shape:
        raise ValueError(
            f"{dataset.name!r} has the shape {dataset.shape}, expected {expected.shape} by the "
            "manifest"
        )
    if dataset.dtype.kind not in expected.kinds:
        raise ValueError(f"{dataset.name!r} holds {dataset.dtype}, expected numbers")
    if dataset.nbytes > LARGEST_RATIO * dataset.id.get_storage_size():
        raise ValueError(
            f"{dataset.name!r} claims {dataset.nbytes:.3g} bytes, but the file holds "
            f"{dataset.id.get_storage_size()} for it"
        )
    _check_blocks(dataset)
    text = dataset.dtype.kind == "O"
    values = dataset.asstr()[...].astype(object) if text else dataset[...]
    attributes = {name: _text(dataset, name) for name in DECODED if name in dataset.attrs}
    dims = [f"axis_{place}" for place in range(values.ndim)]
    variable = xr.Dataset({"values": (dims, values, attributes)})
    decoded = xr.decode_cf(variable)["values"].to_numpy()
    if decoded.dtype.kind == "f" and not np.isfinite(decoded).all():
        raise ValueError(f"{dataset.name!r} has values that are not finite")
    return decoded


def _text(dataset: h5py.Dataset, name: str) -> str:
    """An attribute, which must be a single text."""
    kind = dataset.attrs.get_id(name)
    if kind.shape != () or h5py.check_string_dtype(kind.dtype) is None:
        raise ValueError(f"{dataset.name!r} has an attribute {name!r} that is not a text")
    value = dataset.attrs[name]
    return value.decode() if isinstance(value, bytes) else str(value)


def _check_blocks(dataset: h5py.Dataset) -> None:
    """Raise ValueError if a compressed block would grow beyond its size, without growing it."""
    plan = dataset.id.get_create_plist()
    filters = [plan.get_filter(place)[0] for place in range(plan.get_nfilters())]
    if DEFLATE not in filters or not dataset.size:
        return
    if any(size > length for size, length in zip(dataset.chunks, dataset.shape, strict=True)):
        raise ValueError(f"{dataset.name!r} has blocks {dataset.chunks} larger than itself")
    size, bit = math.prod(dataset.chunks) * dataset.dtype.itemsize, 1 << filters.index(DEFLATE)
    for number in range(dataset.id.get_num_chunks()):
        block = dataset.id.get_chunk_info(number)
        if block.size > 2 * size + 1024:
            raise ValueError(f"{dataset.name!r} has a block of {block.size} bytes, expected {size}")
        if block.filter_mask & bit:
            continue
        try:
            _, content = dataset.id.read_direct_chunk(block.chunk_offset)
            grown = zlib.decompressobj().decompress(content, size + 1)
        except zlib.error as error:
            raise ValueError(f"{dataset.name!r} has a damaged block ({error})") from error
        if len(grown) != size:
            raise ValueError(f"{dataset.name!r} has a block that is not of {size} bytes")
