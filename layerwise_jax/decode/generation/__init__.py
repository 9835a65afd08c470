"""Generation: requests in the places of a ring, streamed or whole."""

from layerwise_jax.decode.generation.requests import Request
from layerwise_jax.decode.generation.result import Chunk, Generation
from layerwise_jax.decode.generation.run import GenerationRun, generate

__all__ = ["Chunk", "Generation", "GenerationRun", "Request", "generate"]
