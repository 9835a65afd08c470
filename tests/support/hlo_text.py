"""Just enough of a reader of XLA's HLO text to see what a loop does in every iteration."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

_COMPUTATION = re.compile(r"^(?:ENTRY )?%([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%[\w.-]+ = (.*?) ([a-z][a-z0-9-]*)\((.*)$")
_ARRAY = re.compile(r"\b[a-z]+[0-9a-z]*\[([0-9,]*)\]")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%([\w.-]+)"
)
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")


@dataclass(frozen=True)
class Instruction:
    """An instruction: its result's type as printed, and the computations that it runs."""

    opcode: str
    type: str
    called: tuple[str, ...]

    @property
    def num_elements(self) -> int | None:
        """Number of elements of the result; None for a tuple."""
        if self.type.startswith("("):
            return None
        (dimensions,) = _ARRAY.findall(self.type)
        return math.prod(int(d) for d in dimensions.split(",") if d)


Module = dict[str, list[Instruction]]


def read_module(text: str) -> Module:
    """The instructions of every computation, by its name."""
    module: Module = {}
    inside: list[Instruction] = []
    for line in text.splitlines():
        if start := _COMPUTATION.match(line):
            inside = module.setdefault(start[1], [])
        elif found := _INSTRUCTION.match(line):
            type_, opcode, rest = found.groups()
            branches = [
                name.strip().lstrip("%")
                for group in _BRANCHES.findall(rest)
                for name in group.split(",")
            ]
            inside.append(Instruction(opcode, type_, (*_CALLED.findall(rest), *branches)))
    return module


def loop_bodies(module: Module) -> list[list[Instruction]]:
    """For every loop that is in no other: the instructions of its body, and of all that the body
    runs.
    """
    (entry,) = module.keys() - {name for body in module.values() for i in body for name in i.called}
    return list(_loops(module, entry))


def _loops(module: Module, computation: str) -> Iterator[list[Instruction]]:
    for instruction in module[computation]:
        if instruction.opcode == "while":
            yield [i for name in instruction.called for i in _within(module, name)]
        else:
            for name in instruction.called:
                yield from _loops(module, name)


def _within(module: Module, computation: str) -> Iterator[Instruction]:
    for instruction in module[computation]:
        yield instruction
        for name in instruction.called:
            yield from _within(module, name)
