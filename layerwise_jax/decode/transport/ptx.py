"""Peer-store kernel in PTX: a device stores its message into its receiver's memory and polls its
own mailbox.

Every device runs the kernel once a tick. It copies a message in pieces of 16 bytes, a piece a
thread:

    sender    x[piece] = a b c d   ->   slot[piece] of the receiver = (a t)(b t)(c t)(d t)
    receiver  polls its own slot[piece] until all four turn numbers are t, then y[piece] = a b c d

Note [turns]: every 8-byte store is atomic and holds 4 bytes of data and the 4-byte number t of the
turn. Data needs no sentinel and no fence. Turns count from 1, and a mailbox starts as zeros.

Note [slots]: a mailbox has as many slots as the ring has stages, R; turn t uses slot t mod R. A
device that starts turn t + R has finished turn t + R - 1, so its sender has started that turn, the
sender's sender turn t + R - 2, and so on round the ring. Its receiver has started turn t + 1 and
has therefore read turn t. No acknowledgement is needed.

Note [failure]: a wait is bounded. A device that waits too long reports its turn to the host, stops
itself and its receiver, and from then on neither sends nor waits. The program ends, and the host
raises (see `Mailboxes.check`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

PIECE_BYTES = 16
# A piece in a slot: its data and as many bytes of turn numbers.
SLOT_PIECE_BYTES = 2 * PIECE_BYTES
# Bytes between words that different blocks write, so that they share no cache line.
CONTROL_STRIDE = 64
BLOCK_THREADS = 256
MAX_BLOCKS = 32
# Polls between two looks at the clock and at the failure flag; a power of two.
POLLS_BETWEEN_CHECKS = 256


@dataclass(frozen=True)
class MailboxLayout:
    """Sizes of a message, of its mailbox and of its control words.

    Attributes:
      pieces: 16-byte pieces of every array that is not empty.
      num_slots: messages that a mailbox holds: the stages of the ring, see Note [slots].
      block_threads: CUDA threads of a block.
    """

    pieces: tuple[int, ...]
    num_slots: int
    block_threads: int = BLOCK_THREADS

    @classmethod
    def of(
        cls, sizes: Sequence[int], num_stages: int, block_threads: int = BLOCK_THREADS
    ) -> MailboxLayout:
        """The layout for arrays of these sizes in bytes."""
        pieces = tuple(-(-size // PIECE_BYTES) for size in sizes if size)
        return cls(pieces, num_stages, block_threads)

    @property
    def offsets(self) -> tuple[int, ...]:
        """First byte of each array in a slot."""
        return tuple(SLOT_PIECE_BYTES * sum(self.pieces[:k]) for k in range(len(self.pieces)))

    @property
    def slot_bytes(self) -> int:
        """Bytes of one message in a mailbox."""
        return SLOT_PIECE_BYTES * sum(self.pieces)

    @property
    def mailbox_bytes(self) -> int:
        """Bytes of all slots."""
        return self.num_slots * self.slot_bytes

    @property
    def num_blocks(self) -> int:
        """Blocks of the kernel. Each counts its own turns, so blocks need not synchronise."""
        return max(1, min(MAX_BLOCKS, -(-max(self.pieces, default=0) // self.block_threads)))

    @property
    def control_bytes(self) -> int:
        """The failure flag, then a turn counter for every block; one stride each."""
        return CONTROL_STRIDE * (1 + self.num_blocks)


# The table holds five addresses: own mailbox, receiver's mailbox, own control words, receiver's
# control words, own report in host memory.
TABLE_ADDRESSES = 5

_OPENING = """{{
.reg .pred p, q;
.reg .b32 thread, block, first, piece, turn, slot, failed, polls, due;
.reg .b32 a, b, c, d, ta, tb, tc, td;
.reg .b64 own, peer, control, peer_control, report, counter, offset, source, target;
.reg .b64 x0, x1, x2, x3, started, now;
mov.u32 thread, %tid.x;
mov.u32 block, %ctaid.x;
ld.global.b64 own, [{table}];
ld.global.b64 peer, [{table}+8];
ld.global.b64 control, [{table}+16];
ld.global.b64 peer_control, [{table}+24];
ld.global.b64 report, [{table}+32];
mad.wide.u32 counter, block, {stride}, control;
ld.relaxed.sys.global.u32 turn, [counter+{stride}];
ld.relaxed.sys.global.u32 failed, [control];
add.u32 turn, turn, 1;
mad.lo.u32 first, block, {threads}, thread;
mov.u32 polls, 0;
setp.ne.u32 p, failed, 0;
@p bra DONE;
rem.u32 slot, turn, {slots};
mul.wide.u32 offset, slot, {slot_bytes};
add.s64 own, own, offset;
add.s64 peer, peer, offset;
"""

# One loop an array: thread i copies the pieces i, i + all threads, and so on.
_SEND = """mov.u32 piece, first;
SEND{k}:
setp.ge.u32 p, piece, {pieces};
@p bra SENT{k};
mad.wide.u32 source, piece, 16, {sent};
mad.wide.u32 target, piece, 32, peer;
ld.global.v4.b32 {{a, b, c, d}}, [source];
mov.b64 x0, {{a, turn}};
mov.b64 x1, {{b, turn}};
mov.b64 x2, {{c, turn}};
mov.b64 x3, {{d, turn}};
st.relaxed.sys.global.v2.b64 [target+{low}], {{x0, x1}};
st.relaxed.sys.global.v2.b64 [target+{high}], {{x2, x3}};
add.u32 piece, piece, {all_threads};
bra SEND{k};
SENT{k}:
"""

# A failure flag that is set while this device polls was set by its sender: see Note [failure].
_TAKE = """mov.u32 piece, first;
TAKE{k}:
setp.ge.u32 p, piece, {pieces};
@p bra TAKEN{k};
mad.wide.u32 source, piece, 32, own;
mad.wide.u32 target, piece, 16, {taken};
POLL{k}:
ld.relaxed.sys.global.v2.b64 {{x0, x1}}, [source+{low}];
ld.relaxed.sys.global.v2.b64 {{x2, x3}}, [source+{high}];
mov.b64 {{a, ta}}, x0;
mov.b64 {{b, tb}}, x1;
mov.b64 {{c, tc}}, x2;
mov.b64 {{d, td}}, x3;
setp.ne.u32 p, ta, turn;
setp.ne.or.u32 p, tb, turn, p;
setp.ne.or.u32 p, tc, turn, p;
setp.ne.or.u32 p, td, turn, p;
@!p bra HAVE{k};
add.u32 polls, polls, 1;
and.b32 due, polls, {poll_mask};
setp.ne.u32 q, due, 0;
@q bra POLL{k};
ld.relaxed.sys.global.u32 failed, [control];
setp.ne.u32 q, failed, 0;
@q bra DONE;
mov.u64 now, %globaltimer;
sub.u64 now, now, started;
setp.lt.u64 q, now, {wait_ns};
@q bra POLL{k};
bra FAIL;
HAVE{k}:
st.global.v4.b32 [target], {{a, b, c, d}};
add.u32 piece, piece, {all_threads};
bra TAKE{k};
TAKEN{k}:
"""

# The barrier: all threads have read their block's turn counter before thread 0 writes it.
_CLOSING = """bra DONE;
FAIL:
st.relaxed.sys.global.u32 [report], turn;
mov.u32 failed, 1;
st.relaxed.sys.global.u32 [control], failed;
st.relaxed.sys.global.u32 [peer_control], failed;
DONE:
barrier.sync 15, {threads};
setp.eq.u32 p, thread, 0;
@p st.relaxed.sys.global.u32 [counter+{stride}], turn;
}}"""


def exchange_ptx(layout: MailboxLayout, wait_seconds: float) -> str:
    """The kernel as inline PTX. Its operands are pointers: the arrays to send, the arrays to take,
    the table of addresses.
    """
    count = len(layout.pieces)
    common = {
        "table": f"${2 * count}",
        "stride": CONTROL_STRIDE,
        "threads": layout.block_threads,
        "all_threads": layout.block_threads * layout.num_blocks,
        "slots": layout.num_slots,
        "slot_bytes": layout.slot_bytes,
        "poll_mask": POLLS_BETWEEN_CHECKS - 1,
        "wait_ns": round(wait_seconds * 1e9),
    }

    def for_arrays(template: str) -> str:
        parts = []
        for k, (pieces, low) in enumerate(zip(layout.pieces, layout.offsets, strict=True)):
            own = {"k": k, "pieces": pieces, "sent": f"${k}", "taken": f"${count + k}"}
            parts.append(template.format(low=low, high=low + PIECE_BYTES, **own, **common))
        return "".join(parts)

    opening = _OPENING.format(**common)
    # Everything is sent before anything is waited for: two devices never wait for each other.
    send = for_arrays(_SEND)
    take = "mov.u64 started, %globaltimer;\n" + for_arrays(_TAKE)
    return opening + send + take + _CLOSING.format(**common)
