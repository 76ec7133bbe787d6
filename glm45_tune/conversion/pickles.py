"""Pickles of others, read without Python's pickle machine: no class is looked up, no function of a library is called.

A caller names every global that may stand there, each with what it gives here: a plain value, or a Maker, whose function is
ours and only keeps what it is handed. So a pickle can build nothing but plain values and Records, at a cost bounded by its size.
"""

import struct
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass


class PickleError(ValueError):
    """A pickle that is damaged or holds what has no place in it."""


@dataclass(slots=True, eq=False, repr=False)
class Record:
    """What stands for an object: what was called, with which arguments, and the state it was given."""

    kind: str
    arguments: tuple
    state: object = None

    def __repr__(self) -> str:
        return f"a {self.kind}"  # its content may name itself again and again


@dataclass(frozen=True, slots=True)
class Maker:
    """Stands for a class or a function of others that a pickle may call."""

    make: Callable[[tuple], object]


def record(kind: str) -> Maker:
    """A Maker of Records of this kind."""
    return Maker(lambda arguments: Record(kind, arguments))


def load(data: bytes, names: Mapping[tuple[str, str], object], stored: Callable | None = None) -> object:
    """What the pickle holds. names: (module, name) → what it gives; stored: what a persistent id gives. Raises PickleError."""
    machine = _Machine(data, names, stored)
    try:
        return machine.run()
    except PickleError:
        raise
    except (IndexError, ValueError, TypeError, KeyError, struct.error) as error:
        raise PickleError(f"it is damaged near byte {machine.at}") from error


class _Machine:
    def __init__(self, data: bytes, names: Mapping, stored: Callable | None):
        self.data, self.at, self.names, self.stored = data, 0, names, stored
        self.stack: list = []
        self.marks: list[list] = []
        self.memo: list = []
        # containers take many times the byte that makes one: what torch writes has one in nine bytes
        self.room = 1000 + len(data) // 4

    def run(self) -> object:
        data, steps = self.data, _STEPS
        while True:
            code = data[self.at]
            self.at += 1
            if code == 0x2E:  # STOP
                (result,) = self.stack
                if self.marks:
                    raise PickleError("it ends in the middle of a list")
                return result
            step = steps[code]
            if step is None:
                raise PickleError(f"instruction {bytes([code])!r} at byte {self.at - 1} has no place in it")
            step(self)

    def take(self, count: int) -> bytes:
        start = self.at
        self.at += count
        if count < 0 or self.at > len(self.data):
            raise PickleError("it ends too early")
        return self.data[start : self.at]

    def number(self, code: str) -> int:
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def text(self, size: int) -> str:
        return self.take(size).decode("utf-8", "surrogatepass")

    def push(self, value: object) -> None:
        """A new container."""
        self.room -= 1
        if self.room < 0:
            raise PickleError("it holds more containers than bytes of content")
        self.stack.append(value)

    def marked(self) -> list:
        found, self.stack = self.stack, self.marks.pop()
        return found

    def top(self, count: int) -> tuple:
        found = tuple(self.stack[-count:])
        if len(found) < count:
            raise IndexError
        del self.stack[-count:]
        return found


def _mark(machine: _Machine) -> None:
    machine.marks.append(machine.stack)
    machine.stack = []
    machine.room -= 1
    if machine.room < 0:
        raise PickleError("it holds more containers than bytes of content")


def _put(machine: _Machine, index: int) -> None:
    if index > len(machine.memo):
        raise PickleError("its memo is out of order")
    if index == len(machine.memo):
        machine.memo.append(machine.stack[-1])
    else:
        machine.memo[index] = machine.stack[-1]


def _long(machine: _Machine, size: int) -> None:
    if size > 9:
        raise PickleError(f"it holds a number of {size} bytes")
    machine.stack.append(int.from_bytes(machine.take(size), "little", signed=True))


def _global(machine: _Machine, module: object, name: object) -> None:
    if not isinstance(module, str) or not isinstance(name, str):
        raise TypeError
    if (module, name) not in machine.names:
        raise PickleError(f"{f'{module}.{name}'[:200]!r} has no place in it")
    machine.stack.append(machine.names[module, name])


def _global_line(machine: _Machine) -> None:
    ends = []
    for _ in range(2):
        end = machine.data.index(b"\n", machine.at)
        ends.append(machine.text(end - machine.at))
        machine.at = end + 1
    _global(machine, *ends)


def _call(machine: _Machine) -> None:
    maker, arguments = machine.top(2)
    if not isinstance(maker, Maker) or not isinstance(arguments, tuple):
        raise PickleError("it calls what cannot be called")
    machine.push(maker.make(arguments))


def _build(machine: _Machine) -> None:
    (state,) = machine.top(1)
    made = machine.stack[-1]
    if not isinstance(made, Record) or made.state is not None:
        raise PickleError("it gives a state to what has none")
    made.state = state


def _persistent(machine: _Machine) -> None:
    if machine.stored is None:
        raise PickleError("it points outside itself")
    machine.push(machine.stored(machine.stack.pop()))


def _append(machine: _Machine, values: list) -> None:
    if type(target := machine.stack[-1]) is not list:
        raise TypeError
    target.extend(values)


def _set_items(machine: _Machine, items: list) -> None:
    if type(target := machine.stack[-1]) is not dict or len(items) % 2:
        raise TypeError
    for key, value in zip(items[::2], items[1::2]):
        target[_plain(key)] = value


def _plain(key: object) -> Hashable:
    """A key: Python hashes a tuple as deep as it is, without a limit."""
    if not isinstance(key, str | int | Record):
        raise PickleError(f"a {type(key).__name__} is a key in it")
    return key


_STEPS: list[Callable[[_Machine], None] | None] = [None] * 256


def _fill() -> None:
    def pushes(value: object) -> Callable:
        return lambda m: m.stack.append(value)

    steps: dict[bytes, Callable[[_Machine], object]] = {
        b"\x80": lambda m: m.take(1),  # PROTO
        b"\x95": lambda m: m.take(8),  # FRAME
        b"(": _mark,
        b"N": pushes(None),
        b"\x88": pushes(True),
        b"\x89": pushes(False),
        b")": pushes(()),
        b"]": lambda m: m.push([]),
        b"}": lambda m: m.push({}),
        b"t": lambda m: m.push(tuple(m.marked())),
        b"\x85": lambda m: m.push(m.top(1)),
        b"\x86": lambda m: m.push(m.top(2)),
        b"\x87": lambda m: m.push(m.top(3)),
        b"K": lambda m: m.stack.append(m.take(1)[0]),
        b"M": lambda m: m.stack.append(int.from_bytes(m.take(2), "little")),
        b"J": lambda m: m.stack.append(m.number("<i")),
        b"\x8a": lambda m: _long(m, m.take(1)[0]),
        b"G": lambda m: m.stack.append(m.number(">d")),
        b"\x8c": lambda m: m.stack.append(m.text(m.take(1)[0])),
        b"X": lambda m: m.stack.append(m.text(m.number("<I"))),
        b"q": lambda m: _put(m, m.take(1)[0]),
        b"r": lambda m: _put(m, m.number("<I")),
        b"\x94": lambda m: m.memo.append(m.stack[-1]),  # MEMOIZE
        b"h": lambda m: m.stack.append(m.memo[m.take(1)[0]]),
        b"j": lambda m: m.stack.append(m.memo[m.number("<I")]),
        b"c": _global_line,
        b"\x93": lambda m: _global(m, *m.top(2)),
        b"R": _call,
        b"\x81": _call,  # NEWOBJ
        b"b": _build,
        b"Q": _persistent,
        b"a": lambda m: _append(m, list(m.top(1))),
        b"e": lambda m: _append(m, m.marked()),
        b"s": lambda m: _set_items(m, list(m.top(2))),
        b"u": lambda m: _set_items(m, m.marked()),
    }
    for code, step in steps.items():
        _STEPS[code[0]] = step


_fill()
