"""Forward and backward of a stage as functions of flat arrays, with an explicit stash between them.

The stage is linearized once, as a jaxpr; every leaf of its vjp is then one of

- an argument of forward: backward gets that array again, and forward does not return it;
- made from prepared values and constants only: backward recomputes it (transposed weights,
masks);
- anything else: stashed, each array once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun

from layerwise_jax.host.stage_program import StageProgram
from layerwise_jax.options import Remat
from layerwise_jax.run.linearize import recomputing_cheap
from layerwise_jax.trace.derivative import type_of
from layerwise_jax.trace.products import FlatBackward, flatten_backward
from layerwise_jax.trace.program import BatchSlice, Program, evaluate
from layerwise_jax.trace.vjp import Linearization, classify_leaves, run_part

Arrays = tuple[Any, ...]


# Arguments of backward that the column still holds when deferred products are made.
KEPT = ("live_in", "stash", "cotangents")


class StageArguments(NamedTuple):
    """Arguments of a stage for one microbatch, in the order of its `StageProgram`'s fields.

    `number` is the microbatch's index.
    """

    prepared: Arrays
    live_in: Arrays
    inputs: Arrays
    state: Arrays
    number: Any


@dataclass(frozen=True, eq=False)
class StageFunctions:
    """Forward and backward of a stage for one microbatch.

    Attributes:
      program: the program.
      stage: the stage.
      inputs_avals: the types of all input leaves of a microbatch.
      seed: the cotangent of the loss of one microbatch.
      remat: None stashes what the vjp keeps, "cheap" only products and the like, "stage" nothing.
      widens: whether weight gradients that are products are made in float32.
    """

    program: Program
    stage: StageProgram
    inputs_avals: Sequence[Any]
    seed: float
    remat: Remat | None
    widens: bool = False

    def run(self, arguments: StageArguments) -> list[Any]:
        """The stage's results."""
        return self._evaluate(arguments, arguments.prepared, arguments.live_in)

    def forward(self, arguments: StageArguments) -> tuple[list[Any], list[Any]]:
        """The stage's results, and the stash."""
        if self.remat == "stage" or not self.stage.has_backward:
            return self.run(arguments), []
        found = self.linearization
        # Results, then all leaves of the vjp; only the stashed leaves leave the program.
        made = jaxpr_as_fun(found.jaxpr)(*jax.tree.leaves(arguments))
        return list(made[: found.num_results]), [made[j] for j in found.stashed]

    def backward(
        self, arguments: StageArguments, stash: Sequence[Any], cotangents: Sequence[Any]
    ) -> tuple[list[Any], list[Any]]:
        """Gradients of the trained prepared values, cotangents of the differentiated live values.

        Args:
          arguments: those of forward.
          stash: what forward returned.
          cotangents: for every value of `stage.pulled`, one from each of its consumers.
        """
        flat = [*jax.tree.leaves(arguments), *stash, *cotangents]
        made = self.flat_backward.run(flat, widens=self.widens)
        # Order of the results: gradients of `trained`, then cotangents of `differentiated`.
        count = len(self.stage.trained)
        return made[:count], made[count:]

    def both(self, arguments: StageArguments) -> tuple[list[Any], list[Any], list[Any]]:
        """Results, gradients and cotangents at once, for a stage that sends nothing."""
        made = iter(self._flat_both.run(jax.tree.leaves(arguments), widens=self.widens))
        gradients = [next(made) for _ in self.stage.trained]
        of_live = [next(made) for _ in self.stage.differentiated]
        # After gradients and cotangents the rest are the stage's results.
        return list(made), gradients, of_live

    def input_gradients(
        self, arguments: StageArguments, stash: Sequence[Any], cotangents: Sequence[Any]
    ) -> tuple[list[Any], list[Any], list[Any]]:
        """Backward without weight-gradient products: other gradients, cotangents, the operands."""
        flat = [*jax.tree.leaves(arguments), *stash, *cotangents]
        made, operands = self.flat_backward.without_products(flat)
        # Without products: fewer gradients than `trained`, cotangents last.
        count = len(made) - len(self.stage.differentiated)
        return made[:count], made[count:], [operands[x] for x in self.flat_backward.computed]

    def weight_gradients(self, operands: Sequence[Any]) -> list[Any]:
        """Gradients that are products, given the operands in the order of `operand_sources`."""
        known = dict(zip(self.flat_backward.operands, operands, strict=True))
        return list(self.flat_backward.make(known, widens=self.widens).values())

    @property
    def products(self) -> tuple[int, ...]:
        """The trained values whose gradients are products, by place in `stage.trained`."""
        return tuple(self.flat_backward.products)

    @cached_property
    def operand_sources(self) -> tuple[tuple[str, int], ...]:
        """Source (group, place) of each operand of a product, once the input gradient is made.

        Groups: "computed" (results of `input_gradients`), "live_in", "stash", "cotangents".
        """
        # An operand is computed by the backward, or is one of its arguments.
        computed = {x: ("computed", j) for j, x in enumerate(self.flat_backward.computed)}
        given = dict(zip(self.flat_backward.program.inputs, self._argument_places, strict=True))
        return tuple(
            computed[x] if x in computed else given[x] for x in self.flat_backward.operands
        )

    @cached_property
    def operand_avals(self) -> tuple[Any, ...]:
        """The types of the products' operands."""
        avals = self.flat_backward.program.avals
        return tuple(avals[x] for x in self.flat_backward.operands)

    @cached_property
    def _argument_places(self) -> list[tuple[str, int]]:
        """(group, place) of every flat argument of backward."""
        groups = self.argument_avals._asdict() | {
            "stash": self.stash_avals,
            "cotangents": self._cotangent_avals,
        }
        return [
            (name, j)
            for name, group in groups.items()
            # `number` is a scalar, the other groups are tuples.
            for j in range(len(group) if isinstance(group, tuple) else 1)
        ]

    @cached_property
    def _cotangent_avals(self) -> tuple[Any, ...]:
        avals = self.program.avals
        readers = self.stage.pulled.items()
        return tuple(type_of(avals[x]) for x, consumers in readers for _ in consumers)

    @cached_property
    def flat_backward(self) -> FlatBackward:
        """Backward, with the gradients that are products found."""
        flat, tree = jax.tree.flatten(
            (self.argument_avals, tuple(map(type_of, self.stash_avals)), self._cotangent_avals)
        )

        def trace(*flat: Any) -> list[Any]:
            gradients, of_live = self._plain_backward(*jax.tree.unflatten(tree, flat))
            return [*gradients, *of_live]

        places = self._argument_places
        # Inputs and state are not held until W: backward returns such operands.
        kept = [j for j, (group, _) in enumerate(places) if group in KEPT]
        num_fixed = len(self.argument_avals.prepared)
        jaxpr = jax.make_jaxpr(trace)(*flat)
        return flatten_backward(jaxpr, len(self.stage.trained), num_fixed, kept)

    @cached_property
    def _flat_both(self) -> FlatBackward:
        flat, tree = jax.tree.flatten(self.argument_avals)

        def trace(*flat: Any) -> list[Any]:
            results, gradients, of_live = self._plain_both(jax.tree.unflatten(tree, flat))
            return [*gradients, *of_live, *results]

        num_fixed = len(self.argument_avals.prepared)
        return flatten_backward(jax.make_jaxpr(trace)(*flat), len(self.stage.trained), num_fixed)

    def _plain_both(self, arguments: StageArguments) -> tuple[list[Any], list[Any], list[Any]]:
        results, vjp_fn = self._linearize(arguments)
        return results, *self._pull(vjp_fn, [])

    def _plain_backward(
        self, arguments: StageArguments, stash: Sequence[Any], cotangents: Sequence[Any]
    ) -> tuple[list[Any], list[Any]]:
        """Gradients and cotangents as JAX's vjp makes them."""
        if self.remat == "stage":
            # remat='stage': backward linearizes again from the stage's inputs.
            return self._pull(self._linearize(arguments)[1], cotangents)
        found, flat = self.linearization, jax.tree.leaves(arguments)
        num_fixed = len(arguments.prepared)
        # From prepared values only, so the same for every microbatch.
        recomputed = run_part(found.jaxpr, found.recomputed, flat[:num_fixed])
        # Leaf by leaf: an argument again, recomputed, or stashed by forward.
        where = {"argument": flat, "recomputed": recomputed, "stashed": stash}
        vjp_fn = jax.tree.unflatten(
            found.tree, [where[leaf.kind][leaf.place] for leaf in found.leaves]
        )
        return self._pull(vjp_fn, cotangents)

    @property
    def stash_avals(self) -> tuple[Any, ...]:
        """The types of what forward stashes for one microbatch."""
        return (
            () if self.remat == "stage" or not self.stage.has_backward else self.linearization.avals
        )

    @cached_property
    def linearization(self) -> Linearization:
        """The stage's vjp, traced once."""
        shapes: dict[str, Any] = {}

        def trace(*flat: Any) -> list[Any]:
            results, vjp_fn = self._linearize(jax.tree.unflatten(tree, flat))
            # `vjp_fn` is a pytree of residuals; its structure leaves the trace by this dict.
            leaves, shapes["tree"] = jax.tree.flatten(vjp_fn)
            shapes["num_results"] = len(results)
            return [*results, *leaves]

        arguments = self.argument_avals
        flat, tree = jax.tree.flatten(arguments)
        jaxpr = jax.make_jaxpr(trace)(*flat)
        return classify_leaves(
            jaxpr, shapes["num_results"], shapes["tree"], len(arguments.prepared)
        )

    @property
    def argument_avals(self) -> StageArguments:
        """The types of a microbatch's arguments."""
        stage, avals = self.stage, self.program.avals

        def types(values: Sequence[int]) -> Arrays:
            return tuple(jax.ShapeDtypeStruct(avals[x].shape, avals[x].dtype) for x in values)

        inputs = tuple(
            jax.ShapeDtypeStruct(a.shape, a.dtype)
            for a in (self.inputs_avals[j] for j in stage.inputs)
        )
        number = jax.ShapeDtypeStruct((), jnp.int32)
        return StageArguments(
            types(stage.prepared), types(stage.live_in), inputs, types(stage.state), number
        )

    def _evaluate(
        self, arguments: StageArguments, prepared: Sequence[Any], live_in: Sequence[Any]
    ) -> list[Any]:
        stage = self.stage
        known = dict(zip(stage.prepared, prepared, strict=True)) | dict(
            zip(stage.live_in, live_in, strict=True)
        )
        known |= dict(
            zip((self.program.inputs[j] for j in stage.inputs), arguments.inputs, strict=True)
        )
        # State is read as the last microbatch left it.
        known |= dict(zip(stage.state, arguments.state, strict=True))
        # Draws are made for the full batch and sliced at part `number`.
        return evaluate(stage.ops, known, stage.results, BatchSlice(arguments.number))

    def _linearize(self, arguments: StageArguments) -> tuple[list[Any], Callable]:
        """The stage's results, and the vjp of those that have cotangents."""
        stage = self.stage
        # Positions in `results`: live_out first, then outputs.
        seeded = [stage.live_out.index(x) for x in stage.pulled]
        seeded += [len(stage.live_out) + stage.outputs.index(0)] if stage.makes_loss else []

        def run(
            trained: Sequence[Any], differentiated: Sequence[Any]
        ) -> tuple[list[Any], list[Any]]:
            prepared = _replaced(stage.prepared, arguments.prepared, stage.trained, trained)
            live_in = _replaced(
                stage.live_in, arguments.live_in, stage.differentiated, differentiated
            )
            results = self._evaluate(arguments, prepared, live_in)
            # Other results have no cotangent and come out as aux.
            return [results[j] for j in seeded], results

        if self.remat == "cheap":
            run = recomputing_cheap(run)
        trained = [arguments.prepared[stage.prepared.index(x)] for x in stage.trained]
        differentiated = [arguments.live_in[stage.live_in.index(x)] for x in stage.differentiated]
        _, vjp_fn, results = jax.vjp(run, trained, differentiated, has_aux=True)
        return results, vjp_fn

    def _pull(self, vjp_fn: Callable, cotangents: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """Gradients from the cotangents of all consumers, those of the last stage first, and from
        the loss.
        """
        left = iter(cotangents)
        seeds: list[Any] = [
            # A fixed order of summation, last consumer first: equal bits in every run.
            sum((next(left) for _ in consumers[1:]), start=next(left))
            for consumers in self.stage.pulled.values()
        ]
        if self.stage.makes_loss:
            loss = self.program.aval(self.program.outputs[0])
            seeds.append(jnp.full(loss.shape, self.seed, loss.dtype))
        trained, differentiated = vjp_fn(seeds)
        return trained, differentiated


def _replaced(
    values: Sequence[int], arrays: Sequence[Any], moving: Sequence[int], moved: Sequence[Any]
) -> list[Any]:
    """The arrays of `values`, with those of `moving` replaced."""
    new = dict(zip(moving, moved, strict=True))
    return [new.get(x, array) for x, array in zip(values, arrays, strict=True)]
