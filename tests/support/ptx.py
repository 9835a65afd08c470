"""An interpreter of the PTX that the peer-store kernel uses: threads of several devices over one
memory, interleaved at random.

Memory is a flat address space of 4-byte words. A vector access is several accesses of its elements,
as in the PTX memory model, so that another thread may run between them.
"""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

MASK = {"32": 2**32 - 1, "64": 2**64 - 1}


@dataclass
class Memory:
    """Words by address; reading what was never allocated is an error."""

    words: dict[int, int] = field(default_factory=dict)
    next_address: int = 2**33  # beyond 32 bits, as device memory lies

    def allocate(self, size: int) -> int:
        address = self.next_address
        self.next_address += -(-size // 256) * 256 + 256
        self.words.update(dict.fromkeys(range(address, address + size, 4), 0))
        return address

    def load(self, address: int, size: int) -> int:
        assert address % size == 0, "misaligned"
        return sum(self.words[address + 4 * i] << (32 * i) for i in range(size // 4))

    def store(self, address: int, size: int, value: int) -> None:
        assert address % size == 0, "misaligned"
        for i in range(size // 4):
            assert address + 4 * i in self.words, "outside of an allocation"
            self.words[address + 4 * i] = (value >> (32 * i)) & MASK["32"]


@dataclass(frozen=True)
class Instruction:
    guard: str  # "p", "!p" or ""
    opcode: str
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class Kernel:
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]

    @classmethod
    def parse(cls, text: str) -> "Kernel":
        instructions, labels = [], {}
        body = text.strip().removeprefix("{").removesuffix("}")
        for statement in re.findall(r"\w+:|[^;:]+;", body):
            statement = statement.strip().rstrip(";")
            if statement.endswith(":"):
                assert statement[:-1] not in labels, "a label twice"
                labels[statement[:-1]] = len(instructions)
            elif not statement.startswith(".reg"):
                guard, opcode, rest = re.fullmatch(
                    r"(?:@(!?\w+) )?(\S+) ?(.*)", statement, re.DOTALL
                ).groups()
                arguments = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest)
                instructions.append(Instruction(guard or "", opcode, tuple(arguments)))
        return cls(tuple(instructions), labels)


class Thread:
    """One thread. `run` yields before every access to memory, and "barrier" at a barrier."""

    def __init__(
        self,
        kernel: Kernel,
        memory: Memory,
        operands: Sequence[int],
        thread: int,
        block: int,
        clock: Callable,
    ):
        self.kernel, self.memory, self.clock = kernel, memory, clock
        self.registers = {f"${i}": value for i, value in enumerate(operands)}
        self.registers |= {"%tid.x": thread, "%ctaid.x": block}

    def read(self, name: str) -> int:
        if name == "%globaltimer":
            return self.clock()
        return int(name) if re.fullmatch(r"\d+", name) else self.registers[name]

    def address(self, argument: str) -> int:
        base, _, offset = argument.strip("[]").partition("+")
        return self.read(base) + int(offset or 0)

    def run(self) -> Iterator[str]:
        at = 0
        while at < len(self.kernel.instructions):
            instruction = self.kernel.instructions[at]
            at += 1
            guard = instruction.guard
            if guard and self.registers[guard.lstrip("!")] == guard.startswith("!"):
                continue
            kind = instruction.opcode.split(".")[0]
            if kind == "bra":
                at = self.kernel.labels[instruction.arguments[0]]
            elif kind == "barrier":
                yield "barrier"
            elif kind in ("ld", "st"):
                yield from self._access(kind, instruction)
            else:
                self._compute(instruction)

    def _access(self, kind: str, instruction: Instruction) -> Iterator[str]:
        size = int(instruction.opcode[-2:]) // 8
        values, place = instruction.arguments if kind == "ld" else instruction.arguments[::-1]
        for i, name in enumerate(_elements(values)):
            yield "memory"
            if kind == "ld":
                self.registers[name] = self.memory.load(self.address(place) + i * size, size)
            else:
                self.memory.store(self.address(place) + i * size, size, self.read(name))

    def _compute(self, instruction: Instruction) -> None:
        opcode, (target, *sources) = instruction.opcode, instruction.arguments
        if opcode.startswith("mov") and target.startswith("{"):
            low, high = _elements(target)
            value = self.read(sources[0])
            self.registers[low], self.registers[high] = value & MASK["32"], value >> 32
            return
        if opcode.startswith("mov") and sources[0].startswith("{"):
            low, high = _elements(sources[0])
            self.registers[target] = self.read(low) | self.read(high) << 32
            return
        values = [self.read(name) for name in sources]
        if opcode.startswith("setp"):
            self.registers[target] = COMPARISONS[opcode.split(".")[1]](*values[:2])
            if ".or." in opcode:
                self.registers[target] |= values[2]
            return
        width = "64" if ".wide" in opcode or opcode.endswith("64") else "32"
        self.registers[target] = ARITHMETIC[opcode.split(".")[0]](*values) & MASK[width]


COMPARISONS = {"ge": int.__ge__, "ne": int.__ne__, "eq": int.__eq__, "lt": int.__lt__}
ARITHMETIC = {
    "mov": lambda x: x,
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "mad": lambda x, y, z: x * y + z,
    "rem": lambda x, y: x % y,
    "and": lambda x, y: x & y,
}


def _elements(argument: str) -> list[str]:
    return [name.strip() for name in argument.strip("{}").split(",")]


def launches(
    kernel: Kernel,
    memory: Memory,
    calls: Sequence[Sequence[int]],
    shape: tuple[int, int],
    clock: Callable,
):
    """The calls of one device, one after another: a generator that is sent the thread to step and
    yields those that can be stepped next.
    """
    blocks, threads = shape
    for operands in calls:
        running = {
            (b, t): Thread(kernel, memory, operands, t, b, clock).run()
            for b in range(blocks)
            for t in range(threads)
        }
        waiting: set[tuple[int, int]] = set()
        while running:
            key = yield sorted(set(running) - waiting)
            event = next(running[key], None)
            if event == "barrier":
                waiting.add(key)
                block = {(key[0], t) for t in range(threads)}
                if block <= waiting:
                    waiting -= block
            elif event is None:
                del running[key]


def interleave(devices: Sequence[Any], choose: random.Random, weights: Sequence[float]) -> None:
    """Run all devices' calls to their ends; each step is a random thread's, of a device drawn by
    weight.
    """
    ready = {}
    for d, device in enumerate(devices):
        keys = next(device, None)
        if keys is not None:
            ready[d] = keys
    while ready:
        (d,) = choose.choices(list(ready), [weights[d] for d in ready])
        try:
            ready[d] = devices[d].send(choose.choice(ready[d]))
        except StopIteration:
            del ready[d]
