"""Traffic between processes, worked out by hand for two processes of four devices each."""

import numpy as np

from layerwise_jax.stage.hosts import host_traffic

SENDS, WEIGHTS = [10, 20, 30, 0], [100, 100, 100, 100]


def test_stages_across_processes_send_activations() -> None:
    """Both replicas cross once, after stage 1: 2 replicas x 20 bytes x 8 microbatches."""
    traffic = host_traffic(np.array([[0, 0, 1, 1]] * 2), range(4), SENDS, WEIGHTS, 8)
    assert (traffic.activations, traffic.gradients) == (320, 0)


def test_replicas_across_processes_send_gradients() -> None:
    """A ring of two replicas: each sends 2 x 1/2 of 4 x 100 bytes to the other process."""
    traffic = host_traffic(np.array([[0] * 4, [1] * 4]), range(4), SENDS, WEIGHTS, 8)
    assert (traffic.activations, traffic.gradients) == (0, 800)


def test_stages_that_share_devices_cross_more_often() -> None:
    """Round-robin over two devices of two processes: every boundary crosses."""
    traffic = host_traffic(np.array([[0, 1]]), [0, 1, 0, 1], SENDS, WEIGHTS, 2)
    assert traffic.activations == 2 * (10 + 20 + 30)
    assert "120 B" in str(traffic)
