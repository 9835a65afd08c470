"""Worker threads and mailboxes: failures and Ctrl-C end every column."""

import _thread
import threading
import time

import jax
import pytest

from layerwise_jax.host.workers import Key, Mailboxes, StoppedError, Workers

KEYS = [Key("activation", 0, stage, 0) for stage in (1, 2)]


def test_a_message_goes_from_thread_to_thread() -> None:
    workers, mail, got = Workers(2), Mailboxes(KEYS), []
    failures = workers.run(
        [lambda: mail.put(KEYS[0], "x"), lambda: got.append(mail.get(KEYS[0], wait=True))],
        mail.stop,
    )
    assert failures == [None, None]
    assert got == ["x"]


def test_a_failure_wakes_the_others() -> None:
    workers, mail = Workers(3), Mailboxes(KEYS)

    def fail() -> None:
        raise RuntimeError("broken")

    jobs = [fail, *(lambda key=key: mail.get(key, wait=True) for key in KEYS)]
    first, *others = workers.run(jobs, mail.stop)
    assert isinstance(first, RuntimeError)
    assert all(isinstance(error, StoppedError) for error in others)
    assert workers.run([lambda: None] * 3, mail.stop) == [None] * 3, "the threads go on"


def test_an_interrupt_ends_the_step_once_all_columns_have_stopped() -> None:
    workers, mail, ended = Workers(2), Mailboxes(KEYS), []

    def wait(key: Key) -> None:
        try:
            mail.get(key, wait=True)
        finally:
            time.sleep(0.05)
            ended.append(key)

    threading.Timer(0.3, _thread.interrupt_main).start()
    with pytest.raises(KeyboardInterrupt):
        workers.run([lambda key=key: wait(key) for key in KEYS], mail.stop)
    assert sorted(ended) == KEYS


def test_an_order_that_one_thread_cannot_run_is_our_own_fault() -> None:
    with pytest.raises(AssertionError, match="read before it is written"):
        Mailboxes(KEYS).get(KEYS[0], wait=False)


def test_threads_compute_in_the_callers_precision() -> None:
    with jax.enable_x64(True):
        seen: list[bool] = []
        workers = Workers(1)
        workers.run([lambda: seen.append(bool(jax.config.read("jax_enable_x64")))], lambda: None)
    assert seen == [True]
