"""The compiled programs of all stages; equal stages share one jitted function and one name."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from layerwise_jax._jax import Literal, is_key
from layerwise_jax.host.compiled import KINDS, StageCalls, StageSignature, jit_stage
from layerwise_jax.trace.canonical import canonicalize
from layerwise_jax.trace.program import Operand

COMPILE_THREADS = 8

# (programs compiled so far, programs in all, the last one's name)
Progress = Callable[[int, int, str], None]


@dataclass(eq=False)
class Library:
    """Compiled stage programs, by stage and kind.

    Attributes:
      calls: every stage.
      options: XLA options of all programs.
      programs: what is compiled.
    """

    calls: Sequence[StageCalls]
    options: Mapping[str, Any] = field(default_factory=dict)
    programs: dict[tuple[int, str], Any] = field(default_factory=dict)
    _jitted: dict[Hashable, Any] = field(default_factory=dict)
    _fingerprints: dict[int, Hashable] = field(default_factory=dict)

    @property
    def num_distinct(self) -> int:
        """Number of jitted functions; equal stages share one."""
        return len(self._jitted)

    def compile(self, wanted: Iterable[tuple[int, str]], progress: Progress | None = None) -> None:
        """Compile the programs that are missing.

        Tracing and lowering happen here, in the caller's thread and its config contexts, XLA's part
        in several threads.

        Args:
          wanted: (stage, kind) pairs.
          progress: called after every program.
        """
        missing = [key for key in dict.fromkeys(wanted) if key not in self.programs]
        with ThreadPoolExecutor(COMPILE_THREADS) as threads:
            jobs = []
            for stage, kind in missing:
                # Equal stages share the jitted function and its trace; each is lowered by itself.
                lowered = self._jit(stage, kind).lower(*StageSignature(self.calls[stage]).of(kind))
                jobs.append(
                    threads.submit(lowered.compile, compiler_options=dict(self.options) or None)
                )
            for done, ((stage, kind), job) in enumerate(zip(missing, jobs, strict=True), start=1):
                self.programs[stage, kind] = job.result()
                if progress is not None:
                    progress(done, len(missing), f"stage {stage}, {KINDS[kind]}")

    def _jit(self, stage: int, kind: str) -> Any:
        calls = self.calls[stage]
        key = (kind, self._key(calls))
        if key not in self._jitted:
            self._jitted[key] = jit_stage(calls, kind, f"lw_{KINDS[kind]}_{len(self._jitted)}")
        return self._jitted[key]

    def _key(self, calls: StageCalls) -> Hashable:
        """Cache key: equal for stages whose programs differ only in their operands.

        Values are counted in the order of first use, so that the same layers of two stages look
        alike; literals, which
        are compiled in, must be equal.
        """
        functions = calls.functions
        program, stage = functions.program, functions.stage
        shape = canonicalize(program, stage.ops, self._fingerprints)
        numbers: dict[Any, Hashable] = {}
        for kind, values in (
            ("weight", shape.weights),
            ("read", shape.reads),
            ("made", shape.made),
        ):
            numbers.update((x, (kind, j)) for j, x in enumerate(values))

        def name(x: Operand) -> Hashable:
            if isinstance(x, Literal):
                return _plain(x.val)
            # Number by order of first use: equal for layers at another place of the model.
            return numbers.setdefault(x, ("passed", len(numbers))), str(program.avals[x])

        inputs = [
            (name(program.inputs[j]), str(functions.inputs_avals[j]), calls.in_axes[j])
            for j in stage.inputs
        ]
        groups = (
            stage.prepared,
            stage.live_in,
            stage.state,
            stage.trained,
            stage.differentiated,
            stage.results,
        )
        return (
            shape.key,
            tuple(map(_plain, shape.literals)),
            tuple(inputs),
            tuple(tuple(map(name, values)) for values in groups),
            tuple((name(x), len(readers)) for x, readers in stage.pulled.items()),
            (
                len(stage.live_out),
                tuple(map(self._role(calls), stage.outputs)),
                len(stage.new_state),
            ),
            (stage.makes_loss, functions.seed, functions.remat, functions.widens),
            calls.num_microbatches,
            # shard_map closes over its mesh; a plain jit takes its devices from the arguments.
            calls.mesh if calls.replicas > 1 else None,
        )

    def _role(self, calls: StageCalls) -> Callable[[int], Hashable]:
        # Output 0 may be the loss, whose cotangent is the seed.
        return lambda position: (calls.roles[position], position == 0)


def _plain(literal: Any) -> Hashable:
    # Keys have no bytes to compare: equal only to themselves.
    if is_key(literal) if hasattr(literal, "dtype") else False:
        return id(literal)
    array = np.asarray(literal)
    return str(array.dtype), array.shape, array.tobytes()
