"""Forward and backward of a stage as functions of flat arrays, with an explicit stash between them.

The stage is linearized once, as a jaxpr; every leaf of its vjp is then one of

- an argument of forward: backward gets that array again, and forward does not return it;
- made from prepared values and constants alone: backward makes it again (transposed weights,
masks);
- anything else: stashed, each array once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun

from layerwise_jax import _jax
from layerwise_jax.host.stage_program import StageProgram
from layerwise_jax.options import Remat
from layerwise_jax.trace.program import BatchSlice, Program, evaluate

Arrays = tuple[Any, ...]

# Kept by remat="cheap": what costs much more to compute again than to read. Kernels hide behind the
# last three.
EXPENSIVE = frozenset(
    "dot_general conv_general_dilated ragged_dot ragged_dot_general scan while cond sort top_k fft "
    "cholesky lu qr eigh svd triangular_solve custom_partitioning pallas_call ffi_call".split()
)


class StageArguments(NamedTuple):
    """What a stage reads for one microbatch, each in the order of its `StageProgram`; `number` is
    the part's index.
    """

    prepared: Arrays
    live_in: Arrays
    inputs: Arrays
    state: Arrays
    number: Any


class Leaf(NamedTuple):
    """Where backward finds a leaf of the vjp: kind "argument", "remade" or "stashed", and the place
    there.
    """

    kind: Literal["argument", "remade", "stashed"]
    place: int


@dataclass(frozen=True, eq=False)
class Linearization:
    """A stage's forward and vjp as one jaxpr.

    Attributes:
      jaxpr: (stage arguments, flat) to (results, then leaves of the vjp, flat).
      num_results: how many of the jaxpr's results are the stage's.
      tree: the structure of the vjp.
      leaves: where backward finds each leaf of the vjp.
      stashed: the jaxpr's results that are stashed, by position.
      remade: the jaxpr's results that backward makes again.
      avals: the types of what is stashed.
    """

    jaxpr: Any
    num_results: int
    tree: Any
    leaves: tuple[Leaf, ...]
    stashed: tuple[int, ...]
    remade: tuple[int, ...]
    avals: tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class StageFunctions:
    """Forward and backward of a stage for one microbatch.

    Attributes:
      program: the program.
      stage: the stage.
      inputs_avals: the types of all input leaves of a microbatch.
      seed: the cotangent of the loss of one microbatch.
      remat: None stashes what the vjp keeps, "cheap" only products and the like, "stage" nothing.
    """

    program: Program
    stage: StageProgram
    inputs_avals: Sequence[Any]
    seed: float
    remat: Remat | None

    def run(self, arguments: StageArguments) -> list[Any]:
        """The stage's results."""
        return self._evaluate(arguments, arguments.prepared, arguments.live_in)

    def forward(self, arguments: StageArguments) -> tuple[list[Any], list[Any]]:
        """The stage's results, and the stash."""
        if self.remat == "stage" or not self.stage.has_backward:
            return self.run(arguments), []
        found = self.linearization
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
        if self.remat == "stage":
            return self._pull(self._linearize(arguments)[1], cotangents)
        found, flat = self.linearization, jax.tree.leaves(arguments)
        num_fixed = len(arguments.prepared)
        remade = _run_part(found.jaxpr, found.remade, flat[:num_fixed])
        where = {"argument": flat, "remade": remade, "stashed": stash}
        vjp_fn = jax.tree.unflatten(
            found.tree, [where[leaf.kind][leaf.place] for leaf in found.leaves]
        )
        return self._pull(vjp_fn, cotangents)

    def both(self, arguments: StageArguments) -> tuple[list[Any], list[Any], list[Any]]:
        """Results, gradients and cotangents at once, for a stage that sends nothing."""
        results, vjp_fn = self._linearize(arguments)
        return results, *self._pull(vjp_fn, [])

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
            leaves, shapes["tree"] = jax.tree.flatten(vjp_fn)
            shapes["num_results"] = len(results)
            return [*results, *leaves]

        arguments = self.argument_avals
        flat, tree = jax.tree.flatten(arguments)
        jaxpr = jax.make_jaxpr(trace)(*flat)
        return _classify(jaxpr, shapes["num_results"], shapes["tree"], len(arguments.prepared))

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
        known |= dict(zip(stage.state, arguments.state, strict=True))
        return evaluate(stage.ops, known, stage.results, BatchSlice(arguments.number))

    def _linearize(self, arguments: StageArguments) -> tuple[list[Any], Callable]:
        """The stage's results, and the vjp of those that have cotangents."""
        stage = self.stage
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
            return [results[j] for j in seeded], results

        if self.remat == "cheap":
            run = jax.checkpoint(run, policy=_is_expensive, prevent_cse=False)
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


def _is_expensive(primitive: Any, *_: Any, **params: Any) -> bool:
    del params
    return primitive.name in EXPENSIVE or "dot_product_attention" in primitive.name


def _classify(closed: Any, num_results: int, tree: Any, num_fixed: int) -> Linearization:
    """Sort the leaves of a vjp; the first `num_fixed` arguments are the same for every
    microbatch.
    """
    jaxpr = closed.jaxpr
    arguments = {x: j for j, x in enumerate(jaxpr.invars)}
    moving = set(jaxpr.invars[num_fixed:])
    for eqn in jaxpr.eqns:
        if any(not isinstance(x, _jax.Literal) and x in moving for x in eqn.invars):
            moving.update(eqn.outvars)
    stashed: dict[Any, int] = {}  # variable to its place in the stash
    positions: list[int] = []
    remade: list[int] = []
    leaves = []
    for position, x in enumerate(jaxpr.outvars[num_results:], start=num_results):
        if not isinstance(x, _jax.Literal) and x in arguments:
            leaves.append(Leaf("argument", arguments[x]))
        elif isinstance(x, _jax.Literal) or x not in moving:
            leaves.append(Leaf("remade", len(remade)))
            remade.append(position)
        else:
            if x not in stashed:
                stashed[x] = len(stashed)
                positions.append(position)
            leaves.append(Leaf("stashed", stashed[x]))
    avals = tuple(x.aval for x in stashed)
    return Linearization(
        closed, num_results, tree, tuple(leaves), tuple(positions), tuple(remade), avals
    )


def _run_part(closed: Any, wanted: Sequence[int], arguments: Sequence[Any]) -> list[Any]:
    """Some results of a jaxpr, which depend on its first arguments alone, by just the equations
    that make them.
    """
    jaxpr = closed.jaxpr
    outvars = [jaxpr.outvars[position] for position in wanted]
    needed = {x for x in outvars if not isinstance(x, _jax.Literal)}
    eqns = []
    for eqn in reversed(jaxpr.eqns):
        if not needed.isdisjoint(eqn.outvars):
            eqns.append(eqn)
            needed.update(x for x in eqn.invars if not isinstance(x, _jax.Literal))
    known = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    known |= dict(zip(jaxpr.invars[: len(arguments)], arguments, strict=True))

    def read(x: Any) -> Any:
        return x.val if isinstance(x, _jax.Literal) else known[x]

    for eqn in reversed(eqns):
        known.update(zip(eqn.outvars, _jax.bind(eqn, [read(x) for x in eqn.invars]), strict=True))
    return [read(x) for x in outvars]
