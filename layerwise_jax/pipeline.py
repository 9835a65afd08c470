"""`Pipeline`: a staged function as users hold it, run by one of two executors.

The loop is one `shard_map` program, which jit, grad and vmap accept. Executor `host` runs every
stage as separate programs (`layerwise_jax.host`). The layout of the placed parameters decides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import jax.numpy as jnp
from jax.sharding import Mesh

from layerwise_jax.batch.analysis import BatchAnalysis
from layerwise_jax.host.executor import HostExecutor
from layerwise_jax.host.optimizer import HostOptimizer, HostTrainStep, host_optimizer
from layerwise_jax.host.placement import HostPlacement, HostStaged, check_not_traced
from layerwise_jax.host.program import HostProgram
from layerwise_jax.options import Executor, PipelineOptions
from layerwise_jax.plan import Plan
from layerwise_jax.run.outputs import Outputs
from layerwise_jax.run.spmd import LoopExecutor
from layerwise_jax.run.tick import Backward
from layerwise_jax.schedule.table import Schedule
from layerwise_jax.stage.inputs import check_inputs, positional_inputs
from layerwise_jax.stage.placement import Placement, Staged
from layerwise_jax.stage.staged_program import StagedProgram
from layerwise_jax.trace.layers import LayerSequence
from layerwise_jax.train.optimizer import StagedOptimizer, stage_optimizer
from layerwise_jax.train.step import TrainStep
from layerwise_jax.verify import Verification, verify_pipeline
from layerwise_jax.xla.option_trials import CompiledPipeline, compile_pipeline


@dataclass(frozen=True, eq=False)
class Pipeline:
    """A function run layer-wise: contiguous groups of its layers, each on its own device.

    Calling it takes placed parameters and the full batch of inputs, and returns what the unstaged
    function returns.

    Attributes:
      layers: the traced function of one microbatch.
      mesh: the mesh, with an axis `stage` and possibly `data`.
      loop: the staged program.
      batching: how the outputs of microbatches combine.
      plan: stages, sizes and bounds, as a table.
      schedule: order of forwards and backwards in training.
      options: the options that the pipeline was built with, defaults filled in.
    """

    layers: LayerSequence
    mesh: Mesh
    loop: StagedProgram
    batching: BatchAnalysis
    plan: Plan
    schedule: Schedule
    options: PipelineOptions

    def __repr__(self) -> str:
        devices = self.mesh.devices
        return (
            f"Pipeline({self.loop.num_stages} stages, {self.loop.num_microbatches} microbatches, "
            f"{len(self.layers)} layers, {devices.size} x {devices.flat[0].platform} "
            f"{dict(self.mesh.shape)}, executor {self.options.executor!r})"
        )

    def __deepcopy__(self, memo: Any) -> Pipeline:
        """The pipeline itself: it is frozen, and its traced operations cannot be copied."""
        return self

    @property
    def placement(self) -> Placement:
        """Placement of the executor: the slot and the device of every weight."""
        return self.executor.placement

    @property
    def executor(self) -> LoopExecutor | HostExecutor:
        """The executor that parameters are placed for by default."""
        return self.host_executor if self.options.executor == "host" else self.loop_executor

    @cached_property
    def loop_executor(self) -> LoopExecutor:
        """Executor `loop`: all stages in one program."""
        options = self.options
        backward = Backward(
            self._seed,
            remat=options.remat,
            skips_bubbles=bool(options.skip_bubbles),
        )
        return LoopExecutor(self.loop, self._outputs, self.schedule, backward)

    @cached_property
    def host_executor(self) -> HostExecutor:
        """Executor `host`: every stage as separate programs."""
        program = HostProgram(
            self.loop,
            self.layers.signature,
            self._outputs,
            self.schedule,
            self._seed,
            self.options.remat,
            self.options.xla_options or {},
        )
        return HostExecutor(program)

    def _executor_of(self, staged: Any) -> LoopExecutor | HostExecutor:
        """The executor for which parameters were placed."""
        return self.host_executor if isinstance(staged, HostStaged) else self.loop_executor

    @property
    def _seed(self) -> float:
        """Cotangent of one microbatch's loss: 1 for a sum, its share of the batch for a mean and
        for a loss that all microbatches have in common.
        """
        adds = self.batching.outputs[0].combine == "sum"
        return 1.0 if adds else 1.0 / self.parts

    @property
    def trainable(self) -> tuple[bool, ...]:
        """For every leaf of the parameters, whether it is trained. Integers, state and frozen
        leaves are not.
        """
        # renewed state is among the frozen weights
        held_back = {weight.leaf for weight in (*self.loop.frozen, *self.loop.state.values())}
        avals = self.layers.signature.params_avals
        return tuple(
            i not in held_back and jnp.issubdtype(a.dtype, jnp.inexact) for i, a in enumerate(avals)
        )

    @property
    def parts(self) -> int:
        """Number of parts that the batch is split into: microbatches of all replicas."""
        return self._outputs.parts

    @cached_property
    def _outputs(self) -> Outputs:
        avals = tuple(self.layers.signature.outputs_avals)
        return Outputs(self.loop, self.batching.outputs, avals, self.mesh)

    def place(self, params: Any, executor: Executor | None = None) -> Staged:
        """Put every stage's weights on its own devices: see `Placement.place`.

        Args:
          params: the tree that was traced.
          executor: "loop" or "host", which is to run with them; None for the pipeline's own.
        """
        options = self.options if executor is None else self.options.updated(executor=executor)
        runs = self.host_executor if options.executor == "host" else self.loop_executor
        return runs.placement.place(params, self.mesh)

    def gather(self, staged: Staged, out_shardings: Any = None) -> Any:
        """Return the user's parameter tree, the inverse of `place`: see `Placement.gather`."""
        return self._executor_of(staged).placement.gather(staged, out_shardings)

    def __call__(self, staged: Staged, *inputs: Any, **named: Any) -> Any:
        """Run the function on a full batch.

        Derivatives of a call are the function's: after `gather`, `jax.grad`, `jax.vjp` and
        `jax.jacrev` are those of the parameters. Every copy of a tied weight has the whole
        gradient. `jax.jvp` takes tangents from `place`; `jax.jacfwd` has a tied weight's derivative
        in its first copy, which `gather` returns, and zeros in the others.

        Args:
          staged: placed parameters, from `place`.
          *inputs: the function's inputs at the full batch.
          **named: inputs by the names that they have in the function.

        Returns:
          The function's value. With state: (the function's value, with None in place of the new
          state; the placed parameters with the new state).

        Raises:
          ValueError: inputs or placed parameters have other types than were traced.
        """
        leaves = self._checked(staged, self._positional(inputs, named))
        return self._value(*self._executor_of(staged).evaluate(staged, leaves))

    def _positional(self, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[Any, ...]:
        """All inputs in the function's order."""
        return positional_inputs(self.layers.fn, inputs, named) if named else inputs

    def _checked(self, staged: Any, inputs: tuple[Any, ...]) -> list[Any]:
        """The inputs of the staged program, if they and the placed parameters are this pipeline's.

        Those are the leaves of `inputs`, and what is computed from them for the full batch.
        """
        self._executor_of(staged).placement.check_staged(staged)
        signature = self.layers.signature
        axes = self.loop.in_axes[: len(signature.inputs_avals)]
        leaves = self.batching.inputs(check_inputs(inputs, signature, axes, self.parts))
        if isinstance(staged, HostStaged):
            check_not_traced(staged, leaves)
        return leaves

    def _value(self, results: Sequence[Any], staged: Staged) -> Any:
        """The value of a call: the function's outputs, and the placed parameters if they have new
        state.
        """
        state = {*self.loop.state, *self.loop.renewed}
        outputs = [None if p in state else x for p, x in enumerate(results)]
        value = self.layers.signature.outputs(outputs)
        return (value, staged) if self.loop.has_state else value

    def value_and_grad(self, staged: Staged, *inputs: Any, **named: Any) -> tuple[Any, Staged]:
        """The loss and its gradients; the loss is the function's output, or the first of a tuple.

        Forward and backward run in the order of the pipeline's schedule; memory is bounded by the
        schedule's stash.

        Args:
          staged: placed parameters, from `place`.
          *inputs: the function's inputs at the full batch.
          **named: inputs by the names that they have in the function.

        Returns:
          (value, gradients): the value of calling the pipeline, and gradients placed as the
          parameters are. Every copy of a tied weight has the whole gradient, so that an optimizer
          that works leaf by leaf keeps the copies equal. Integers and frozen weights have gradients
          of dtype `float0`, as with `jax.grad(allow_int=True)`. State has zeros, and so has a
          frozen weight that shares a slot with trained ones.

        Raises:
          ValueError: the function's first output is not a floating-point scalar.
        """
        self._check_loss()
        leaves = self._checked(staged, self._positional(inputs, named))
        executor = self._executor_of(staged)
        results, grads, staged = executor.value_and_grad(staged, leaves)
        return self._value(results, staged), grads

    def verify(self, params: Any, *inputs: Any) -> Verification:
        """Hold the pipeline against the unstaged function, which must fit one device.

        Args:
          params: parameters in the user's tree, not placed.
          *inputs: the function's inputs at the full batch.

        Returns:
          For every output, gradient and state leaf the largest difference, the difference that
          rounding explains, and the first stage at which a difference appears; a table in print.
          Functions with `batch_statistics` or carried state are compared part by part.
        """
        return verify_pipeline(self, params, inputs)

    def optimizer(self, optimizer: Any, *, shard_over_data: bool = False) -> StagedOptimizer:
        """An optax optimizer for placed parameters, equal to optax on the user's tree: see
        `stage_optimizer`.
        """
        placement, trainable = self.placement, self.trainable
        if isinstance(placement, HostPlacement):
            return host_optimizer(
                placement, trainable, self.mesh, optimizer, shard_over_data=shard_over_data
            )
        return stage_optimizer(
            placement, trainable, self.mesh, optimizer, shard_over_data=shard_over_data
        )

    def train_step(
        self, optimizer: Any, *, shard_over_data: bool = False
    ) -> TrainStep | HostTrainStep:
        """A training step with an optax optimizer, to be called without `jit`: see `TrainStep`."""
        staged = self.optimizer(optimizer, shard_over_data=shard_over_data)
        if isinstance(staged, HostOptimizer):
            return HostTrainStep(self, staged)
        return TrainStep(self, staged)

    def compile(
        self,
        staged: Any,
        *inputs: Any,
        options: Literal["auto"] | Mapping[str, Any] | None = "auto",
    ) -> CompiledPipeline:
        """Compile the pipeline with chosen XLA options: see `compile_pipeline`."""
        return compile_pipeline(self, self.mesh, staged, inputs, options)

    def _check_loss(self) -> None:
        aval = self.layers.signature.outputs_avals[0]
        if aval.shape or not jnp.issubdtype(aval.dtype, jnp.floating):
            raise ValueError(
                "The first output of the function must be a floating-point scalar (the loss), got "
                f"{aval.dtype}{list(aval.shape)}. Stage a loss function."
            )
        if self.batching.outputs[0].kind == "extreme":
            raise ValueError(
                "The first output of the function must be a sum or mean over the examples to be "
                f"differentiated, got a {self.batching.outputs[0].combine}. Put it after the loss."
            )
