"""Buffer assignment of a compiled program: memory per allocation, decoded from XLA's protobuf.

    allocation   a range of device memory: an argument, an output, a constant, or temporary
    buffer       one array of the program, live in an allocation while it is needed

Buffers share a temporary allocation at different times or at different offsets. Field numbers are
those of OpenXLA's xla/service/hlo.proto. Unknown fields are skipped for newer compilers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from layerwise_jax.xla.protobuf import Message, WireError

AllocationRole = Literal["argument", "constant", "output", "thread local", "temporary"]

# The kinds of a trace's events, and the field of an HloProto that holds its buffer assignment.
ALLOC, FREE, SHARE = 0, 1, 2
ASSIGNMENT = 3


class AssignmentError(ValueError):
    """Bytes are malformed, or describe a contradictory buffer assignment."""


@dataclass(frozen=True)
class Buffer:
    """One array of the program.

    Attributes:
      id: XLA's number of the buffer.
      size: bytes.
      instruction: name of the instruction that computes it; empty if the bytes have none.
    """

    id: int
    size: int
    instruction: str


@dataclass(frozen=True)
class Allocation:
    """Range of device memory.

    Attributes:
      index: XLA's number of the allocation.
      size: bytes.
      role: kind of its contents. An argument that an output overwrites (donation) stays an
        argument.
      is_output: whether it holds an output when the program ends.
      parameter: the number of the program's parameter, for an argument.
      buffers: buffers that live in it at some time, largest first.
      live_bytes: the most bytes of its buffers live at once; its size if the bytes have no trace.
    """

    index: int
    size: int
    role: AllocationRole
    is_output: bool
    parameter: int | None
    buffers: tuple[Buffer, ...]
    live_bytes: int


@dataclass(frozen=True)
class BufferAssignment:
    """Memory of one device while the program runs. Sizes are bytes."""

    allocations: tuple[Allocation, ...]

    def bytes_of(self, role: AllocationRole) -> int:
        """Bytes of all allocations of one role."""
        assert role in get_args(AllocationRole), role
        return sum(allocation.size for allocation in self.allocations if allocation.role == role)

    @property
    def alias_bytes(self) -> int:
        """Bytes of arguments that outputs overwrite."""
        return sum(
            each.size for each in self.allocations if each.role == "argument" and each.is_output
        )

    @property
    def total_bytes(self) -> int:
        """Bytes of device memory of all allocations.

        Thread-local allocations are registers and stack, and not counted.
        """
        return sum(each.size for each in self.allocations if each.role != "thread local")

    @property
    def peak_bytes(self) -> int:
        """Peak memory in bytes: `total_bytes`, with temporaries counted as live at their peak."""
        temporaries = [each for each in self.allocations if each.role == "temporary"]
        return self.total_bytes - sum(each.size - each.live_bytes for each in temporaries)

    def largest_temporaries(self, count: int = 5) -> tuple[Buffer, ...]:
        """The largest temporary buffers, largest first."""
        buffers = [
            buffer
            for each in self.allocations
            if each.role == "temporary"
            for buffer in each.buffers
        ]
        return tuple(sorted(buffers, key=lambda buffer: -buffer.size)[:count])


def decode_buffer_assignment(
    data: bytes, instructions: Mapping[int, str] | None = None
) -> BufferAssignment:
    """Decodes a BufferAssignmentProto.

    `compiled.memory_analysis().serialized_buffer_assignment_proto` gives its bytes.

    Args:
      data: the serialized message.
      instructions: names of the module's instructions by id.

    Raises:
      AssignmentError: the bytes are malformed, truncated or contradictory.
    """
    try:
        return _assignment(Message(data), instructions or {})
    except WireError as error:
        raise AssignmentError(
            f"data must be a serialized BufferAssignmentProto, got {len(data)} other bytes: {error}"
        ) from error


def decode_hlo(data: bytes) -> BufferAssignment:
    """Decodes the buffer assignment of an HloProto, which XLA dumps with the optimized module.

    Raises:
      AssignmentError: the bytes are malformed, or hold no buffer assignment.
    """
    try:
        hlo = Message(data)
        assignments = hlo.messages(ASSIGNMENT)
        if not assignments:
            raise AssignmentError(
                f"data must be an HloProto with a buffer assignment, got one of {len(data)} bytes "
                "without. Dump the optimized module."
            )
        return _assignment(assignments[-1], _instruction_names(hlo.message(1)))
    except WireError as error:
        raise AssignmentError(
            f"data must be a serialized HloProto, got {len(data)} other bytes: {error}"
        ) from error


def has_assignment(data: bytes) -> bool:
    """True if an HloProto has a buffer assignment.

    Raises:
      AssignmentError: the bytes are malformed.
    """
    try:
        return bool(Message(data).messages(ASSIGNMENT))
    except WireError as error:
        raise AssignmentError(
            f"data must be a serialized HloProto, got {len(data)} other bytes: {error}"
        ) from error


def _not_hlo(data: bytes, error: WireError) -> AssignmentError:
    return AssignmentError(
        f"data must be a serialized HloProto, got {len(data)} other bytes: {error}"
    )


def _instruction_names(module: Message) -> dict[int, str]:
    """Instruction names by id of an HloModuleProto.

    Fields: computations (3), their instructions (2), the instructions' name (1) and id (35).
    """
    instructions = [each for computation in module.messages(3) for each in computation.messages(2)]
    return {each.integer(35): each.text(1) for each in instructions}


def _assignment(message: Message, names: Mapping[int, str]) -> BufferAssignment:
    """BufferAssignment of a BufferAssignmentProto.

    Fields: buffers (1), allocations (3), heap simulator traces (4), buffers live at the peak (5).
    """
    buffers = {
        buffer.id: buffer for buffer in (_buffer(each, names) for each in message.messages(1))
    }
    traced = [_live_bytes(trace, buffers) for trace in message.messages(4)]
    live = {buffer_id: peak for peak, ids in traced for buffer_id in ids}
    at_peak = {each.integer(1): each.integers(2) for each in message.messages(5)}
    return BufferAssignment(
        tuple(
            _allocation(each, buffers, live, at_peak.get(each.integer(1)))
            for each in message.messages(3)
        )
    )


def _buffer(message: Message, names: Mapping[int, str]) -> Buffer:
    """Buffer of a LogicalBufferProto.

    Fields: id (1), size (2), definition (3) with the instruction's name (2, before 2023) or id (4).
    """
    defined_at = message.message(3)
    name = defined_at.text(2) or names.get(defined_at.integer(4), "")
    return Buffer(message.integer(1), message.integer(2), name)


def _allocation(
    message: Message,
    buffers: Mapping[int, Buffer],
    live: Mapping[int, int],
    at_peak: Sequence[int] | None,
) -> Allocation:
    """Allocation of a BufferAllocationProto.

    Fields: index (1), size (2), flags (see `_role`), parameter number (6), assigned buffers (9).

    Raises:
      AssignmentError: an assigned buffer is undefined, or ends after the allocation.
    """
    index = message.integer(1)
    size = message.integer(2)
    held = []
    for assigned in message.messages(9):
        buffer = _known(assigned.integer(1), buffers)
        end = assigned.integer(2) + assigned.integer(3)  # offset + size
        if end > size:
            raise AssignmentError(
                f"Buffer {buffer.id} must end within the {size} bytes of allocation {index}, got "
                f"{end}."
            )
        held.append(buffer)
    if at_peak is not None:
        live_bytes = sum(_known(buffer_id, buffers).size for buffer_id in at_peak)
    else:
        live_bytes = max((live[buffer.id] for buffer in held if buffer.id in live), default=size)
    role = _role(message)
    return Allocation(
        index=index,
        size=size,
        role=role,
        is_output=message.flag(7),
        parameter=message.integer(6) if role == "argument" else None,
        buffers=tuple(sorted(held, key=lambda buffer: -buffer.size)),
        live_bytes=min(live_bytes, size),
    )


def _role(message: Message) -> AllocationRole:
    """Role of a BufferAllocationProto.

    Flags: thread local (3), entry parameter (5), maybe live out (7), constant (12); else temporary.
    """
    if message.flag(5):
        return "argument"
    if message.flag(12):
        return "constant"
    if message.flag(7):
        return "output"
    return "thread local" if message.flag(3) else "temporary"


def _known(buffer_id: int, buffers: Mapping[int, Buffer]) -> Buffer:
    if buffer_id not in buffers:
        raise AssignmentError(
            f"Used buffers must be among the {len(buffers)} defined ones, got number {buffer_id}."
        )
    return buffers[buffer_id]


def _live_bytes(trace: Message, buffers: Mapping[int, Buffer]) -> tuple[int, set[int]]:
    """The most bytes alive at once in a HeapSimulatorTrace, and the buffers that it is about.

    An event has a kind (1), a buffer (2) and, where memory is shared, the buffer that owns it (5).
    Shared memory is alive until all who share it are freed.
    """
    owner: dict[int, int] = {}
    holders: dict[int, int] = {}
    live = peak = 0
    for event in trace.messages(1):
        kind, buffer = event.integer(1), _known(event.integer(2), buffers)
        if kind == FREE:
            owned = owner.get(buffer.id, buffer.id)
            holders[owned] = holders.get(owned, 0) - 1
            live -= buffers[owned].size if holders[owned] == 0 else 0
        else:
            owned = _known(event.integer(5), buffers).id if kind == SHARE else buffer.id
            owner[buffer.id] = owned
            live += buffers[owned].size if holders.get(owned, 0) == 0 else 0
            holders[owned] = holders.get(owned, 0) + 1
            peak = max(peak, live)
    return peak, set(owner)
