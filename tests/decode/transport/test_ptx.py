"""The peer-store kernel's PTX, interpreted: threads of all devices interleaved at random over one
memory.
"""

import random

import numpy as np
import pytest

from layerwise_jax.decode.transport.ptx import CONTROL_STRIDE, MailboxLayout, exchange_ptx
from tests.support.ptx import Kernel, Memory, interleave, launches

# Of a clock that advances at every look, which is once in 256 polls: longer than any device lags.
WAIT_NS = 1000


class Ring:
    """Devices with their mailboxes in one memory, and the arrays that each sends and takes.

    `sent[device][turn]` and `taken[device][turn]` are lists of addresses, one an array.
    """

    def __init__(self, layout: MailboxLayout, turns: int, num_devices: int):
        self.memory, self.layout, self.turns, self.num_devices = (
            Memory(),
            layout,
            turns,
            num_devices,
        )
        self.time = 0
        devices = range(num_devices)
        self.boxes = [self.memory.allocate(layout.mailbox_bytes) for _ in devices]
        self.control = [self.memory.allocate(layout.control_bytes) for _ in devices]
        self.reports = [self.memory.allocate(4) for _ in devices]
        self.tables = [self.memory.allocate(40) for _ in devices]
        self.sent = [[self._arrays() for _ in range(turns)] for _ in devices]
        self.taken = [[self._arrays() for _ in range(turns)] for _ in devices]
        for d in devices:
            self._write_table(d)
        self._draw(np.random.default_rng(0))

    def _arrays(self):
        return [self.memory.allocate(16 * pieces) for pieces in self.layout.pieces]

    def _write_table(self, d):
        after = (d + 1) % self.num_devices
        boxes, control = (self.boxes[d], self.boxes[after]), (self.control[d], self.control[after])
        for i, address in enumerate((*boxes, *control, self.reports[d])):
            self.memory.store(self.tables[d] + 8 * i, 8, address)

    def _draw(self, rng):
        """Any bits are data: ones, zeros and numbers of turns among them."""
        for addresses in (arrays for of_device in self.sent for arrays in of_device):
            for address, pieces in zip(addresses, self.layout.pieces, strict=True):
                for i in range(4 * pieces):
                    word = rng.choice([0, 1, 2, 2**32 - 1, int(rng.integers(2**32))])
                    self.memory.store(address + 4 * i, 4, int(word))

    def run(self, seed, silent=(), wait_ns=WAIT_NS):
        """All turns of all devices but the silent ones, at speeds that differ 30 times."""
        choose = random.Random(seed)
        kernel = Kernel.parse(exchange_ptx(self.layout, wait_ns / 1e9))
        shape = (self.layout.num_blocks, self.layout.block_threads)
        devices = []
        for d in sorted({*range(self.num_devices)} - {*silent}):
            calls = [
                (*self.sent[d][t], *self.taken[d][t], self.tables[d]) for t in range(self.turns)
            ]
            devices.append(launches(kernel, self.memory, calls, shape, self.clock))
        interleave(devices, choose, [choose.choice([1, 1, 30]) for _ in devices])

    def clock(self):
        self.time += 1
        return self.time

    def words(self, addresses):
        return [
            [self.memory.load(address + 4 * i, 4) for i in range(4 * pieces)]
            for address, pieces in zip(addresses, self.layout.pieces, strict=True)
        ]

    def is_right(self):
        return all(
            self.words(self.taken[d][t]) == self.words(self.sent[d - 1][t])
            for d in range(self.num_devices)
            for t in range(self.turns)
        )

    def reported(self):
        return [self.memory.load(address, 4) for address in self.reports]


@pytest.mark.parametrize(
    ("num_devices", "pieces"), [(2, (5, 1)), (3, (1, 2)), (4, (1,)), (5, (1,)), (8, (1,))]
)
def test_every_device_takes_what_its_sender_sent(num_devices, pieces):
    layout = MailboxLayout(pieces, num_devices, block_threads=2)
    ring = Ring(layout, turns=num_devices + 2, num_devices=num_devices)
    ring.run(seed=num_devices)
    assert ring.is_right()
    assert ring.reported() == [0] * num_devices


@pytest.mark.slow
@pytest.mark.parametrize("num_devices", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("seed", range(5))
def test_every_device_takes_what_its_sender_sent_in_long_runs(num_devices, seed):
    layout = MailboxLayout((7, 1), num_devices, block_threads=3)
    ring = Ring(layout, turns=3 * num_devices + 1, num_devices=num_devices)
    ring.run(seed)
    assert ring.is_right()


def test_fewer_slots_than_stages_lose_messages():
    """The control of the tests above: a message is overwritten before it is read."""

    def is_right(slots, seed):
        ring = Ring(MailboxLayout((1,), slots, block_threads=1), turns=6, num_devices=3)
        ring.run(seed, wait_ns=20)
        return ring.is_right()

    assert not all(is_right(2, seed) for seed in range(8))
    assert all(is_right(3, seed) for seed in range(8))


@pytest.mark.parametrize("num_devices", [2, 3])
def test_a_silent_device_ends_the_others_and_the_first_report_names_it(num_devices):
    ring = Ring(MailboxLayout((2,), num_devices, block_threads=2), 4, num_devices)
    ring.run(seed=1, silent=[0], wait_ns=2)
    assert ring.reported()[1] == 1  # device 1 waits for device 0, in the first turn
    assert all(report != 1 for report in ring.reported()[2:])
    for d in range(1, num_devices):  # none hangs: each has counted all turns
        assert ring.memory.load(ring.control[d] + CONTROL_STRIDE, 4) == ring.turns
    assert ring.memory.load(ring.control[1], 4) == 1  # and has stopped


def test_sizes_of_a_message():
    layout = MailboxLayout.of([0, 1, 16, 16384 * 2 + 1], num_stages=3)
    assert layout.pieces == (1, 1, 2049)
    assert layout.offsets == (0, 32, 64)
    assert layout.slot_bytes == 32 * 2051
    assert layout.mailbox_bytes == 3 * layout.slot_bytes
    assert layout.num_blocks == 9  # 256 pieces each
