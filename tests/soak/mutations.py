"""Mutated plans, device specs, buffer assignments and checkpoints: read, or refused in words.

A reader may accept a mutated text (a number became another number), but then the value can be
written and read again. Any exception but the reader's own is a finding.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layerwise_jax.checkpoint.files import read_step, write_step
from layerwise_jax.checkpoint.leaves import CheckpointError
from layerwise_jax.cost.device import DeviceSpec
from layerwise_jax.cost.devices import H100
from layerwise_jax.cost.layer_cost import LayerCost
from layerwise_jax.plan import LoopFigures, Plan, Sizes, make_plan
from layerwise_jax.xla.aot import compile_for
from layerwise_jax.xla.buffers import AssignmentError, decode_buffer_assignment

MIN_WORDS = 5  # of a message that says what is expected, what was given and what to do


def check(seed: int, index: int) -> str:
    """Mutate one of the subjects and read it."""
    rng = np.random.default_rng([seed, index])
    subject = (_plan, _spec, _assignment, _checkpoint)[index % 4]
    return f"{subject.__name__[1:]} {subject(rng)}"


def _plan(rng: np.random.Generator) -> str:
    return _read_text(Plan, _plan_text(), rng)


def _spec(rng: np.random.Generator) -> str:
    return _read_text(DeviceSpec, H100.to_json(), rng)


def _read_text(kind: Any, text: str, rng: np.random.Generator) -> str:
    mutated = _mutated_json(text, rng) if rng.random() < 0.7 else _mutated_text(text, rng)
    try:
        value = kind.from_json(mutated)
    except ValueError as error:
        return _refused(error)
    str(value)
    assert kind.from_json(value.to_json()) == value or _has_nan(value.to_json())
    return "read"


def _refused(error: Exception) -> str:
    assert not isinstance(error, UnicodeError | json.JSONDecodeError), f"raw: {error!r}"
    assert len(str(error).split()) >= MIN_WORDS, f"no sentence: {error!r}"
    return "refused"


def _has_nan(text: str) -> bool:
    return "NaN" in text


def _assignment(rng: np.random.Generator) -> str:
    data = mutated_bytes(_serialized_assignment(), rng)
    try:
        assignment = decode_buffer_assignment(data)
    except AssignmentError as error:
        return _refused(error)
    assert 0 <= assignment.peak_bytes <= assignment.total_bytes
    assert assignment.alias_bytes <= assignment.bytes_of("argument")
    return "read"


def _checkpoint(rng: np.random.Generator) -> str:
    """A damaged file, or another tree asked for: the saved values, or a CheckpointError."""
    tree = _saved_tree()
    asked = tree
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder, "saved")
        shutil.copytree(_saved_step(), directory)
        if rng.random() < 0.3:
            asked = _mutated_tree(tree, rng)
        else:
            files = sorted(path for path in directory.rglob("*") if path.is_file())
            _spoil(files[rng.integers(len(files))], rng)
        try:
            found = read_step(directory, 1, {"params": asked})["params"]
        except CheckpointError as error:
            return _refused(error)
        except FileNotFoundError as error:
            raise AssertionError(f"raw: {error!r}") from error
    assert jax.tree.structure(found) == jax.tree.structure(tree), "another tree was read"
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(tree), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)
    return "read"


def _spoil(file: Path, rng: np.random.Generator) -> None:
    if rng.random() < 0.2:
        file.unlink()
    else:
        file.write_bytes(mutated_bytes(file.read_bytes(), rng))


def mutated_bytes(data: bytes, rng: np.random.Generator) -> bytes:
    """Bytes after one to three edits: change, removal, repetition, truncation or insertion."""
    out = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(len(out))) if out else 0
        end = at + int(rng.integers(1, 12))
        edits: list[Callable[[], Any]] = [
            lambda a=at: out.__setitem__(slice(a, a + 1), rng.bytes(1)),
            lambda a=at, e=end: out.__delitem__(slice(a, e)),
            lambda a=at, e=end: out.__setitem__(slice(a, a), out[a:e]),
            lambda a=at: out.__delitem__(slice(a, None)),
            lambda a=at: out.__setitem__(slice(a, a), rng.bytes(4)),
            lambda a=at, e=end: out.__setitem__(slice(a, e), b"\xff" * (e - a)),
        ]
        edits[rng.integers(len(edits))]()
    return bytes(out)


def _mutated_text(text: str, rng: np.random.Generator) -> str:
    return mutated_bytes(text.encode(), rng).decode("utf-8", errors="replace")


NUMBERS = [True, -1, 0, 1, 10**30, 1.5, -0.5, math.nan, math.inf]
VALUES: list[Any] = [None, *NUMBERS, "", "x", [], {}, [[]], [None]]


def _mutated_json(text: str, rng: np.random.Generator) -> str:
    """JSON text with one to three entries replaced, removed, renamed or repeated."""
    value = json.loads(text)
    for _ in range(rng.integers(1, 4)):
        places = list(_places(value))
        if not places:
            break
        holder, key = places[rng.integers(len(places))]
        edit = rng.integers(4)
        if edit == 0:
            del holder[key]
        elif edit == 1 and isinstance(holder, dict):
            holder[f"{key}_"] = holder.pop(key)
        elif edit == 2 and isinstance(holder, list):
            holder.append(copy.deepcopy(holder[key]))
        else:
            holder[key] = copy.deepcopy(VALUES[rng.integers(len(VALUES))])
    return json.dumps(value)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every entry of nested lists and dicts."""
    keys = value.keys() if isinstance(value, dict) else range(len(value))
    found = [(value, key) for key in keys]
    for _, key in list(found):
        if isinstance(value[key], dict | list):
            found += _places(value[key])
    return found


def _mutated_tree(tree: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """The tree with one leaf of another name, shape, dtype or container, or without it."""
    name = sorted(tree)[rng.integers(len(tree))]
    rest = {key: leaf for key, leaf in tree.items() if key != name}
    leaf = np.asarray(jax.tree.leaves(tree[name])[0])
    others: list[Any] = [
        {f"{name}_": tree[name]},
        {name: leaf[..., None]},
        {name: leaf.astype(np.float16)},
        {name: [leaf, leaf]},
        {name: {"0": leaf}},
        {},
    ]
    return {**rest, **others[rng.integers(len(others))]}


@functools.cache
def _plan_text() -> str:
    costs = [LayerCost(f"layer{i}", 2048, 1024, 512) for i in range(4)]
    sizes = Sizes(costs, "a device", "its compiler", 20_000)
    return make_plan(
        (0, 2, 4),
        sizes,
        LoopFigures(
            send_bytes=[1024, 0],
            num_devices=2,
            num_microbatches=6,
            num_ticks=8,
            padding_bytes=0,
            common_layers=1,
            has_branch=True,
        ),
    ).to_json()


@functools.cache
def _serialized_assignment() -> bytes:
    shapes = [jax.ShapeDtypeStruct((64, 64), jnp.float32)] * 2
    compiled = (
        jax.jit(lambda w, x: jnp.tanh(x @ w[0]) @ w[1])
        .lower(shapes, shapes[0])
        .compile()
        .memory_analysis()
    )
    assert compile_for(None, jnp.tanh, [shapes[0]]).peak_bytes > 0
    return compiled.serialized_buffer_assignment_proto


def _saved_tree() -> dict[str, Any]:
    random = np.random.default_rng(0)
    return {
        "list": [random.normal(size=(2, 3)).astype(np.float32)] * 2,
        "matrix": random.normal(size=(40, 40)),
        "number": np.int32(3),
    }


@functools.cache
def _saved_step() -> Path:
    directory = Path(tempfile.mkdtemp(prefix="soak-"))
    write_step(directory, 1, {"params": _saved_tree()}, None)
    return directory
