"""Policies of flattening: the equations that `flatten` inlines, and what becomes a weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
from jax import lax
from jax.extend.core import jaxpr_as_fun

from layerwise_jax import _jax
from layerwise_jax._jax import Jaxpr, JaxprEqn, is_key
from layerwise_jax.trace.primitives import REMATS
from layerwise_jax.trace.program import nbytes

CAPTURED_BYTES = 1024
"""Arrays of fewer bytes are constants of the compiled programs instead of weights."""


@dataclass(frozen=True)
class FlattenPolicy:
    """Choice of the equations to inline beyond calls and scans over layers.

    Attributes:
      is_differentiable: gradients are taken of the program, so custom derivative rules and
        `jax.checkpoint` keep their meaning. Otherwise both are inlined without a mark, and slices
        of arrays that the program stacks are the stacked values.
      inlines_branches: both branches of a `cond` are inlined, followed by a selection.
      inlines_placed_calls: `jit` calls with shardings are inlined, dropping the shardings.
      keeps_barriers: an inlined `jax.checkpoint` with `prevent_cse` leaves an optimization barrier
        on what it reads, as JAX's own lowering does: its operations are not merged with others, and
        wait for all that they read.
      captures: arrays that the function closes over are weights. Small ones stay constants.
    """

    is_differentiable: bool = True
    inlines_branches: bool = False
    inlines_placed_calls: bool = False
    keeps_barriers: bool = False
    captures: bool = False

    def body(self, eqn: JaxprEqn) -> Jaxpr:
        """The jaxpr of an equation that is inlined, behind its barrier if that is kept."""
        inner = _jax.inner_jaxpr(eqn)
        is_remat = eqn.primitive.name in REMATS
        if not (self.keeps_barriers and is_remat and eqn.params["prevent_cse"]):
            return inner

        def waiting(*arrays: Any) -> Any:
            return jaxpr_as_fun(inner)(*lax.optimization_barrier(arrays))

        return jax.make_jaxpr(waiting)(*_jax.avals_of(eqn.invars))

    def is_weight(self, aval: Any) -> bool:
        """True if a captured array of this type becomes a weight: `CAPTURED_BYTES` or more."""
        is_array = bool(aval.shape) and not is_key(aval)
        return self.captures and is_array and nbytes(aval) >= CAPTURED_BYTES


FOR_GRADIENTS = FlattenPolicy()
FOR_STAGES = FlattenPolicy(captures=True)
FORWARD_ONLY = FlattenPolicy(is_differentiable=False)
BACKWARD = FlattenPolicy(is_differentiable=False, keeps_barriers=True)
"""A backward pass, in which `jax.checkpoint` computes again what forward did not keep."""
OPTIMIZER = FlattenPolicy(is_differentiable=False, inlines_branches=True, inlines_placed_calls=True)
"""Optimizers are cut leaf by leaf, so no operation may hide the leaves that it combines."""
