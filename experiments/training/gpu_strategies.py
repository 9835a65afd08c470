"""Training strategy: placement of the parameters, and the step over them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Sharding as ArraySharding

OPTIMIZER = optax.adamw(3e-4, b2=0.95, weight_decay=0.1)

State = tuple[Any, Any]


@dataclass(frozen=True, eq=False)
class Strategy:
    """One way to train a model over devices.

    Attributes:
      name: what it is called in results.
      how: how it is done, in a sentence.
      devices: how many devices compute.
      shapes: types of the parameters as this strategy holds them.
      place: from parameters that every device has to this strategy's.
      value_and_grad: (parameters, tokens) to (loss, gradients), to be jitted.
      shardings: of the parameters, a tree like `shapes`.
      whole: the sharding of what every device has (the loss, counts).
      tokens: the sharding of the global batch.
      options: XLA options of its program.
      figures: what else there is to say in results.
    """

    name: str
    how: str
    devices: int
    shapes: Any
    place: Callable[[Any], Any]
    value_and_grad: Callable[[Any, jax.Array], tuple[jax.Array, Any]]
    shardings: Any
    whole: ArraySharding
    tokens: ArraySharding
    options: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def state_shardings(self) -> State:
        """Shardings of parameters and optimizer state; moments are sharded as the parameters."""
        moments = optax.tree_utils.tree_map_params(
            OPTIMIZER,
            lambda _, sharding: sharding,
            jax.eval_shape(OPTIMIZER.init, self.shapes),
            self.shardings,
            transform_non_params=lambda _: self.whole,
        )
        return self.shardings, moments

    def start(self, params: Any) -> State:
        """Placed parameters, and moments of zero."""
        placed = self.place(params)
        return placed, jax.jit(OPTIMIZER.init, out_shardings=self.state_shardings[1])(placed)

    def step(self, state: State, tokens: jax.Array) -> tuple[State, jax.Array]:
        """One step of AdamW: (state, loss)."""
        params, moments = state
        loss, grads = self.value_and_grad(params, tokens)
        updates, moments = OPTIMIZER.update(grads, moments, params)
        return (optax.apply_updates(params, updates), moments), loss

    def lower(self, tokens_shape: tuple[int, ...]) -> Any:
        """The step for a global batch, lowered; parameters and moments are overwritten."""
        types = self.shapes, jax.eval_shape(OPTIMIZER.init, self.shapes)
        state = jax.tree.map(
            lambda aval, sharding: jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=sharding),
            types,
            self.state_shardings,
        )
        tokens = jax.ShapeDtypeStruct(tokens_shape, jnp.int32, sharding=self.tokens)
        out = (self.state_shardings, self.whole)
        return jax.jit(self.step, donate_argnums=0, out_shardings=out).lower(state, tokens)
