"""The fields of a manifest and their types, checked before anything is made from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeAlias, Union, get_args, get_origin, get_type_hints

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from armed_pyro._messages import listing
from armed_pyro.data.schema import Schema
from armed_pyro.engine.schedule import History, Schedule
from armed_pyro.families.reconstruction import Reconstruction
from armed_pyro.program.data_spec import Facts

__all__ = ["check_fields", "check_manifest"]

Label: TypeAlias = bool | int | float | str


class _Record(BaseModel):
    """An object of a manifest. Fields of other versions are ignored; types are not converted."""

    model_config = ConfigDict(
        strict=True, extra="ignore", protected_namespaces=(), allow_inf_nan=False
    )


class _Measured(_Record):
    """A record of measurements, such as r-hat, which need not be finite."""

    model_config = ConfigDict(allow_inf_nan=True)


class _Labels(_Record):
    dtype: str
    values: list[Label]


def _json_type(annotation: Any) -> Any:
    """The type of a dataclass's field as JSON: labels of an index, lists for tuples and tensors."""
    if annotation is pd.Index:
        return _Labels
    if annotation is Schema:
        return _record_of(Schema)
    if hasattr(annotation, "array_type"):  # a jaxtyping shape; all of them are counts
        return list[int]
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return Union[tuple(map(_json_type, parts))]  # noqa: UP007
    if origin is tuple:
        return list[_json_type(parts[0])]  # type: ignore[misc]
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return dict[parts[0], _json_type(parts[1])]  # type: ignore[misc,valid-type]
    if origin is list:
        return list[_json_type(parts[0])]  # type: ignore[misc]
    plain = origin is Literal or annotation in (str, int, float, bool, type(None))
    return annotation if plain else Any  # such as a covariance, which has an entry of its own


@cache
def _record_of(kind: type, *, finite: bool = True) -> type[BaseModel]:
    """The record of a dataclass; fields with a default may be absent."""
    hints = get_type_hints(kind)
    if kind is Facts:
        hints["classes"] = pd.Index | None
    columns: dict[str, Any] = {}
    for field in fields(kind):
        required = field.default is MISSING and field.default_factory is MISSING
        value = _json_type(hints[field.name])
        # Under an alias, as pydantic's own attributes, such as `schema`, must not be shadowed.
        content = Field(... if required else None, alias=field.name)
        columns[f"{field.name}_"] = (value, content)
    return create_model(kind.__name__, __base__=_Record if finite else _Measured, **columns)


class _Program(_Record):
    random: list[dict[str, Any]]
    family: str | dict[str, Any]
    priors: dict[str, Any]
    bayesian_head: bool
    dtype: str = "float32"
    fixed_weight: float = Field(allow_inf_nan=False)
    linear_effects: bool | None = None
    output: list[int | str] = []
    adversaries: list[dict[str, Any]]
    others: list[dict[str, Any]] = []


class _MadeBy(_Record):
    name: str
    arguments: dict[str, Any]


class _Network(_Record):
    made_by: _MadeBy | None
    dtype: str
    parameters: dict[str, list[int]]


class _Training(_Record):
    schedule: _record_of(Schedule)  # type: ignore[valid-type]
    history: _record_of(History, finite=False)  # type: ignore[valid-type]
    seed: int
    stopped: Literal["converged", "validation", "steps", "diverged", "interrupted"]


class _Data(_Record):
    continuous: list[bool]
    slope_continuous: list[bool] = []
    levels: dict[str, _Labels]
    row_dtype: str | None
    row_name: str | None
    rows: int | None = Field(None, ge=0)


class _Refined(_Measured):
    method: str
    quality: dict[str, float]


class _Classifier(_Measured):
    factor: str
    temperature: float = Field(gt=0, allow_inf_nan=False)
    pooling: float = Field(allow_inf_nan=False)
    report: dict[str, float]


class _Manifest(_Record):
    """A whole manifest; checksums and the probe are absent in fits of earlier versions."""

    model: _Program
    network: _Network
    training: _Training
    facts: _record_of(Facts)  # type: ignore[valid-type]
    guide: str
    data: _Data
    refined: _Refined | None = None
    classifiers: list[_Classifier] = []
    prob: float = Field(0.9, gt=0, lt=1)
    checksums: dict[str, str] = {}
    probe: list[float] | None = None


def check_manifest(manifest: Mapping[str, Any], path: Path) -> None:
    """Raise ValueError, with file and field, if a field is missing or of the wrong type or size."""
    _check(_Manifest, manifest, path, "")
    facts = manifest["facts"]
    _check_lengths(facts, path)
    for name, levels in facts["levels"].items():
        if len(facts["counts"].get(name, ())) != len(levels["values"]):
            raise _wrong(path, f"facts.counts.{name}", f"{len(levels['values'])} numbers")
    for name in ("feature_scale", "slope_scale"):
        if not all(0 < scale < float("inf") for scale in facts.get(name, ())):
            raise _wrong(path, f"facts.{name}", "positive finite numbers")
    if not facts["spread"] > 0:
        raise _wrong(path, "facts.spread", "a positive number")


def check_fields(kind: type, entry: Mapping[str, Any], path: Path, place: str) -> None:
    """Raise ValueError, with file and field, unless an entry has the fields of a dataclass."""
    if unknown := sorted(entry.keys() - {field.name for field in fields(kind)}):
        raise _wrong(path, f"{place}.{unknown[0]}", f"a field of {kind.__name__}")
    if kind is not Reconstruction:  # its prior is an entry, not an object
        _check(_record_of(kind), entry, path, place)


def _check(record: type[BaseModel], values: Any, path: Path, place: str) -> None:
    try:
        record.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(filter(None, [place, *map(str, first["loc"])]))
        found = "" if first["type"] == "missing" else f", found {listing([first['input']])[:80]}"
        raise ValueError(
            f"{path} is damaged or was changed: the field {where!r}: {first['msg']}{found}. Save "
            "the fit again, or put a copy of the file back"
        ) from None


def _check_lengths(facts: Mapping[str, Any], path: Path) -> None:
    """Raise ValueError unless lists that describe the same columns are equally long."""
    features, slopes = len(facts["feature_names"]), len(facts.get("slope_names", ()))
    expected = {
        **dict.fromkeys(("sources", "feature_mean", "feature_scale", "feature_average"), features),
        **dict.fromkeys(("slope_sources", "slope_mean", "slope_scale"), slopes),
        "center": len(facts["columns"]),
    }
    for name, length in expected.items():
        # Features that are not standardised, such as images, have no means and scales.
        allowed = {length, 0} if name.startswith("feature_") else {length}
        if len(facts.get(name, ())) not in allowed:
            raise _wrong(path, f"facts.{name}", f"{length} values")


def _wrong(path: Path, field: str, expected: str) -> ValueError:
    return ValueError(
        f"{path} is damaged or was changed: the field {field!r}: expected {expected}. Save the fit "
        "again, or put a copy of the file back"
    )
