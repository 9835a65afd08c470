"""Tracing: a function's flat program and its layers."""

from layerwise_jax.trace.flops import Work, count_work
from layerwise_jax.trace.layer_search import Layer
from layerwise_jax.trace.layers import LayerSequence, trace_layers
from layerwise_jax.trace.program import Program

__all__ = ["LayerSequence", "trace_layers", "Layer", "Program", "Work", "count_work"]
