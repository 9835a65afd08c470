"""Token generation: a ring of stages with their caches."""

from layerwise_jax.decode.build import decode_ring
from layerwise_jax.decode.generation import Chunk, Generation, Request
from layerwise_jax.decode.options import DecodeOptions
from layerwise_jax.decode.ring import DecodeRing
from layerwise_jax.decode.sampling import Sampler
from layerwise_jax.decode.state import rotated
from layerwise_jax.decode.transport import Mailboxes, PeerStore, Permute, TransportError
from layerwise_jax.decode.values import RingState

__all__ = [
    "decode_ring",
    "Chunk",
    "DecodeOptions",
    "DecodeRing",
    "Generation",
    "Mailboxes",
    "PeerStore",
    "Permute",
    "Request",
    "RingState",
    "Sampler",
    "TransportError",
    "rotated",
]
