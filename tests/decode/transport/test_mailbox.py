"""Mailboxes over a CUDA driver in Python: addresses, freeing, failures, one ring at a time."""

import ctypes
import gc
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from layerwise_jax.decode.transport.mailbox import Mailboxes, TransportError, exclusive
from layerwise_jax.decode.transport.ptx import MailboxLayout
from layerwise_jax.xla.cuda_driver import CudaDriver, CudaDriverError
from tests.support.fake_cuda import FakeCuda

LAYOUT = MailboxLayout((3,), num_slots=3)


def make(library=None, ordinals=((0,), (1,), (2,))):
    library = library or FakeCuda()
    return Mailboxes(CudaDriver(library), np.array(ordinals), LAYOUT), library


def addresses(boxes):
    """int[stages, replicas, 5]."""
    return boxes.table().view(np.uint64)


def report(boxes, stage, turn):
    ctypes.c_uint32.from_address(int(addresses(boxes)[stage, 0, 4])).value = turn


def test_every_device_is_given_its_receivers_mailbox():
    boxes, library = make()
    own, peer, control, peer_control, reports = np.moveaxis(addresses(boxes)[:, 0], -1, 0)
    assert list(peer) == list(np.roll(own, -1))
    assert list(peer_control) == list(np.roll(control, -1))
    assert len({*own, *control}) == 6
    assert len(set(reports)) == 3
    assert [len(library.memory[int(x)]) for x in own] == [LAYOUT.mailbox_bytes] * 3
    assert all(library.memory[int(x)].raw == bytes(LAYOUT.mailbox_bytes) for x in own)
    assert library.peers == {(0, 1), (1, 2), (2, 0)}
    assert library.current == []  # no context is left behind


def test_replicas_are_rings_of_their_own():
    boxes, library = make(ordinals=((0, 2), (1, 3)))
    own, peer = addresses(boxes)[..., 0], addresses(boxes)[..., 1]
    assert (peer == own[::-1]).all()
    assert library.peers == {(0, 1), (1, 0), (2, 3), (3, 2)}


def test_memory_is_freed_with_the_mailboxes():
    boxes, library = make()
    assert len(library.memory) == 7  # a mailbox and control words each, and the reports
    del boxes
    gc.collect()
    assert library.memory == {}


def test_a_failed_allocation_frees_what_came_before():
    library = FakeCuda(limit=2 * LAYOUT.mailbox_bytes)
    with pytest.raises(CudaDriverError, match="cuMemAlloc_v2 failed with CUDA error 2"):
        make(library)
    gc.collect()
    assert library.memory == {}


def test_the_first_stage_that_waited_names_the_silent_one_and_the_next_run_is_clean():
    boxes, library = make()
    boxes.begin()
    report(boxes, stage=2, turn=8)
    report(boxes, stage=1, turn=7)
    own = int(addresses(boxes)[1, 0, 0])
    ctypes.memset(own, 7, LAYOUT.mailbox_bytes)
    with pytest.raises(TransportError, match="Stage 1 got no message from stage 0") as caught:
        boxes.check(wait_seconds=2)
    assert (caught.value.waiting, caught.value.silent, caught.value.turn) == (1, 0, 7)
    boxes.begin()
    assert library.memory[own].raw == bytes(LAYOUT.mailbox_bytes)
    boxes.check(wait_seconds=2)  # its report was cleared


def test_a_run_that_ended_otherwise_leaves_nothing_either():
    boxes, library = make()
    boxes.begin()  # and no check follows: the program raised
    control = int(addresses(boxes)[0, 0, 2])
    ctypes.memset(control, 1, LAYOUT.control_bytes)
    boxes.begin()
    assert library.memory[control].raw == bytes(LAYOUT.control_bytes)


def test_a_good_run_is_followed_by_one_without_a_reset():
    boxes, library = make()
    boxes.begin()
    boxes.check(1)
    library.calls.clear()
    boxes.begin()
    assert library.calls == []


def test_a_silenced_stage_has_its_failure_flag_set():
    boxes, library = make()
    boxes.silence(1)
    flags = [library.memory[int(x)].raw[:4] for x in addresses(boxes)[:, 0, 2]]
    assert flags == [bytes(4), b"\x01\0\0\0", bytes(4)]


def test_rings_that_share_a_device_take_turns():
    devices = [SimpleNamespace(id=1000 + i) for i in range(3)]
    inside, order = threading.Event(), []

    def other():
        inside.wait()
        with exclusive(devices[1:]):
            order.append("second")

    thread = threading.Thread(target=other)
    thread.start()
    with exclusive(devices[1::-1]):
        inside.set()
        thread.join(timeout=0.2)  # it waits for the shared device
        assert thread.is_alive()
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
