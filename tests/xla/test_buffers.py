"""XLA's buffer assignments are decoded as XLA means them, and anything else is refused, never
crashed on.
"""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerwise_jax.xla.buffers import (
    Allocation,
    AssignmentError,
    Buffer,
    decode_buffer_assignment,
    decode_hlo,
    has_assignment,
)
from layerwise_jax.xla.protobuf import DELIMITED, FIXED32, FIXED64, VARINT, Message, WireError

MUTATIONS = 10_000


def varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def field(number: int, value: int | bytes | str) -> bytes:
    """One field: a varint for an int, else length-delimited."""
    if isinstance(value, int):
        return varint(number << 3 | VARINT) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | DELIMITED) + varint(len(data)) + data


def message(*fields: tuple[int, int | bytes | str]) -> bytes:
    return b"".join(field(number, value) for number, value in fields)


def buffer(id: int, size: int, instruction: int = 0) -> bytes:
    return message((1, id), (2, size), (3, message((4, instruction))))


def assigned(id: int, offset: int, size: int) -> bytes:
    return message((1, id), (2, offset), (3, size))


def event(kind: int, id: int, shares_with: int = 0) -> bytes:
    return message((1, kind), (2, id), (5, shares_with))


def mlp(weights, x):
    return jnp.tanh(x @ weights[0]) @ weights[1]


MLP_SHAPES = [
    jax.ShapeDtypeStruct((64, 256), jnp.float32),
    jax.ShapeDtypeStruct((256, 64), jnp.float32),
]


@pytest.fixture(scope="module")
def compiled():
    return jax.jit(mlp).lower(MLP_SHAPES, jax.ShapeDtypeStruct((8, 64), jnp.float32)).compile()


@pytest.fixture(scope="module")
def serialized(compiled) -> bytes:
    return compiled.memory_analysis().serialized_buffer_assignment_proto


@pytest.fixture(scope="module")
def dumped() -> bytes:
    """The HloProto of the same program, with names."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_proto": True}
        jax.jit(mlp).lower(MLP_SHAPES, jax.ShapeDtypeStruct((8, 64), jnp.float32)).compile(options)
        (path,) = Path(folder).glob("*after_optimizations.hlo.pb")
        return path.read_bytes()


def test_a_real_assignment_agrees_with_xla(compiled, serialized):
    memory, assignment = compiled.memory_analysis(), decode_buffer_assignment(serialized)
    assert (
        assignment.bytes_of("argument")
        == memory.argument_size_in_bytes
        == 4 * (2 * 64 * 256 + 8 * 64)
    )
    assert assignment.bytes_of("output") == memory.output_size_in_bytes == 4 * 8 * 64
    assert assignment.bytes_of("temporary") == memory.temp_size_in_bytes
    assert assignment.alias_bytes == 0
    sizes = {
        each.parameter: each.size for each in assignment.allocations if each.role == "argument"
    }
    assert sizes == {0: 4 * 64 * 256, 1: 4 * 256 * 64, 2: 4 * 8 * 64}


def test_a_dump_names_its_buffers(serialized, dumped):
    plain, named = decode_buffer_assignment(serialized), decode_hlo(dumped)
    assert [each.size for each in named.allocations] == [each.size for each in plain.allocations]
    assert all(buffer.instruction for each in named.allocations for buffer in each.buffers)
    assert all(not buffer.instruction for each in plain.allocations for buffer in each.buffers)


def test_a_donated_argument_is_counted_once():
    shape = jax.ShapeDtypeStruct((1000,), jnp.float32)
    donating = jax.jit(lambda x: x + 1, donate_argnums=0).lower(shape).compile().memory_analysis()
    assignment = decode_buffer_assignment(donating.serialized_buffer_assignment_proto)
    assert assignment.alias_bytes == assignment.total_bytes == assignment.peak_bytes == 4000
    assert assignment.bytes_of("output") == 0


def test_roles_names_and_sizes():
    data = message(
        (1, buffer(1, 100, instruction=7)),
        (1, buffer(2, 40)),
        (1, buffer(3, 60)),
        (3, message((1, 0), (2, 100), (5, 1), (6, 4), (9, assigned(1, 0, 100)))),
        (3, message((1, 1), (2, 100), (9, assigned(2, 0, 40)), (9, assigned(3, 40, 60)))),
        (3, message((1, 2), (2, 8), (12, 1))),
        (3, message((1, 3), (2, 16), (7, 1))),
        (3, message((1, 4), (2, 4), (3, 1))),
    )
    assignment = decode_buffer_assignment(data, {7: "weights"})
    assert [
        each.role for each in assignment.allocations
    ] == "argument,temporary,constant,output,thread local".split(",")
    assert assignment.allocations[0] == Allocation(
        0, 100, "argument", False, 4, (Buffer(1, 100, "weights"),), 100
    )
    assert assignment.largest_temporaries(1) == (Buffer(3, 60, ""),)
    assert assignment.total_bytes == assignment.peak_bytes == 100 + 100 + 8 + 16


ALLOC, FREE, SHARE = 0, 1, 2


@pytest.mark.parametrize(
    ("events", "peak"),
    [
        ([event(ALLOC, 1), event(ALLOC, 2), event(FREE, 1), event(FREE, 2)], 110),
        ([event(ALLOC, 1), event(FREE, 1), event(ALLOC, 2), event(FREE, 2)], 100),
        (
            [
                event(ALLOC, 1),
                event(SHARE, 2, 1),
                event(FREE, 1),
                event(ALLOC, 3),
                event(FREE, 2),
                event(FREE, 3),
            ],
            101,
        ),
        (
            [event(ALLOC, 1), event(SHARE, 2, 1), event(FREE, 1), event(FREE, 2), event(ALLOC, 3)],
            100,
        ),
    ],
)
def test_the_live_peak_follows_the_trace(events, peak):
    held = [(9, assigned(1, 0, 100)), (9, assigned(2, 100, 10)), (9, assigned(3, 110, 1))]
    buffers = [(1, buffer(1, 100)), (1, buffer(2, 10)), (1, buffer(3, 1))]
    trace = message(*[(1, each) for each in events])
    assignment = decode_buffer_assignment(
        message(*buffers, (3, message((1, 0), (2, 128), *held)), (4, trace))
    )
    assert (assignment.total_bytes, assignment.peak_bytes) == (128, peak)


def test_the_buffers_at_the_peak_count_before_the_trace():
    buffers = [(1, buffer(1, 100)), (1, buffer(2, 10))]
    allocation = message((1, 0), (2, 128), (9, assigned(1, 0, 100)), (9, assigned(2, 100, 10)))
    at_peak = message((1, 0), (2, varint(1) + varint(2)))
    assignment = decode_buffer_assignment(message(*buffers, (3, allocation), (5, at_peak)))
    assert assignment.peak_bytes == 110


def test_unknown_fields_are_skipped(serialized):
    unknown = (
        message((99, 5), (100, b"anything"))
        + varint(98 << 3 | FIXED64)
        + bytes(8)
        + varint(97 << 3 | FIXED32)
        + bytes(4)
    )
    assert decode_buffer_assignment(unknown + serialized + unknown) == decode_buffer_assignment(
        serialized
    )


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"\x0a", "got a longer one at byte 1 of 1"),
        (b"\x0a\x05abc", "got length 5 at byte 2 of 5"),
        (b"\x08" + b"\xff" * 11, "must end within 10 bytes"),
        (b"\x00\x01", "got 0 before byte 1"),
        (b"\x0b", "got 3 before byte 1"),
        (b"\x09" + bytes(7), "got length 8"),
        (message((1, 5)), "Field 1 must be bytes, got 5"),
        (message((1, message((2, 2**64 - 1)))), "Field 2 must be a number of at least 0, got -1"),
        (
            message((3, message((2, 10), (9, assigned(1, 0, 5))))),
            "got number 1",
        ),
        (
            message((1, buffer(1, 9)), (3, message((2, 10), (9, assigned(1, 5, 9))))),
            "of allocation 0, got 14",
        ),
        (message((4, message((1, event(ALLOC, 3))))), "got number 3"),
    ],
)
def test_what_is_broken_is_refused_in_words(data, complaint):
    with pytest.raises(AssignmentError, match=complaint):
        decode_buffer_assignment(data)


def test_a_module_without_an_assignment_is_refused(dumped):
    assert has_assignment(dumped)
    assert not has_assignment(message((1, message((1, "jit_f")))))
    with pytest.raises(AssignmentError, match="with a buffer assignment, got one"):
        decode_hlo(message((1, message((1, "jit_f")))))


@given(
    st.lists(
        st.tuples(st.integers(1, 2**29 - 1), st.integers(0, 2**63 - 1) | st.binary(max_size=20))
    )
)
def test_messages_are_read_as_they_were_written(fields):
    read = Message(message(*fields))
    for number in {number for number, _ in fields}:
        written = [value for other, value in fields if other == number]
        if all(isinstance(value, int) for value in written):
            assert read.integers(number) == written
            assert read.integer(number) == written[-1]
        elif isinstance(written[-1], bytes):
            assert read.text(number) == written[-1].decode("utf-8", errors="replace")
        else:
            with pytest.raises(WireError, match="must be bytes"):
                read.text(number)


@given(st.binary(max_size=300))
def test_any_bytes_are_decoded_or_refused(data):
    decode_or_refuse(decode_buffer_assignment, data)
    decode_or_refuse(decode_hlo, data)


def decode_or_refuse(decode, data: bytes) -> bool:
    """True if the bytes are decoded to an assignment with consistent sums."""
    try:
        assignment = decode(data)
    except AssignmentError:
        return False
    assert 0 <= assignment.peak_bytes <= assignment.total_bytes
    assert assignment.alias_bytes <= assignment.bytes_of("argument")
    return True


def mutated(data: bytes, draw: np.random.Generator) -> bytes:
    """The bytes with one to three of: changed, removed, doubled, cut short, with something put
    in.
    """
    out = bytearray(data)
    for _ in range(draw.integers(1, 4)):
        at = int(draw.integers(len(out))) if out else 0
        end = at + int(draw.integers(1, 12))
        match draw.integers(6):
            case 0:
                out[at : at + 1] = draw.bytes(1)
            case 1:
                del out[at:end]
            case 2:
                out[at:at] = out[at:end]
            case 3:
                del out[at:]
            case 4:
                out[at:at] = draw.bytes(4)
            case _:
                out[at:end] = b"\xff" * (end - at)
    return bytes(out)


def test_ten_thousand_mutated_assignments_are_decoded_or_refused(serialized):
    draw = np.random.default_rng(0)
    decoded = sum(
        decode_or_refuse(decode_buffer_assignment, mutated(serialized, draw))
        for _ in range(MUTATIONS)
    )
    assert 0 < decoded < MUTATIONS


def test_mutated_dumps_are_decoded_or_refused(dumped):
    draw = np.random.default_rng(1)
    decoded = sum(
        decode_or_refuse(decode_hlo, mutated(dumped, draw)) for _ in range(MUTATIONS // 20)
    )
    assert 0 < decoded < MUTATIONS // 20
