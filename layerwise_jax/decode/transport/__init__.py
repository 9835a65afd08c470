"""Transports of the ring's message: peer stores between CUDA devices, or `ppermute`."""

from layerwise_jax.decode.transport.choice import choose_transport
from layerwise_jax.decode.transport.interface import Channel, Permute, Transport
from layerwise_jax.decode.transport.mailbox import Mailboxes, TransportError
from layerwise_jax.decode.transport.peer_store import PeerStore

__all__ = [
    "choose_transport",
    "Channel",
    "Mailboxes",
    "Permute",
    "PeerStore",
    "Transport",
    "TransportError",
]
