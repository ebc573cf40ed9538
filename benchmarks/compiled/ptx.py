"""PTX text → its instructions. Knows the syntax (PTX ISA, "Syntax" and "Directives"), not what instructions
mean."""

import re
from dataclasses import dataclass, field


class UnsupportedError(Exception):
    """PTX that the machine does not know; with the line and the instruction."""


@dataclass(frozen=True)
class Instruction:
    opcode: str
    operands: tuple[str, ...]
    guard: str  # "%p1", "!%p1" or nothing: the lanes that execute it
    line: int
    text: str


@dataclass
class Kernel:
    name: str
    text: str
    parameters: list[tuple[str, str]] = field(default_factory=list)  # name, type
    threads: int | None = None  # of a program, where the text says
    register_bytes: dict[str, int] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, list[int]] = field(
        default_factory=dict
    )  # → instructions before it, in each block that has it
    places: dict[int, str] = field(default_factory=dict)  # line → "kernels.py:104:16 @[ table_kernels.py:111:54 ]"

    def where(self, instruction: Instruction) -> str:
        """An instruction as errors name it."""
        place = self.places.get(instruction.line)
        words = " ".join(instruction.text.split())[:120]
        return f"line {instruction.line} of {self.name}'s PTX, '{words}'" + (f", from {place}" if place else "")


_IGNORED_DIRECTIVES = (".loc", ".file", ".pragma", ".reqntid", ".maxnreg", ".minnctapersm", ".maxntid")


def parse(text: str) -> Kernel:
    """The one kernel in the text."""
    plain = re.sub(r"/\*.*?\*/", lambda comment: "\n" * comment.group().count("\n"), text, flags=re.S)
    head = re.search(r"\.entry\s+([\w$]+)\s*\((.*?)\)", plain, re.S)
    if head is None:
        raise UnsupportedError("no .entry in this PTX: it holds no kernel")
    kernel = Kernel(head.group(1), text)
    for parameter in re.findall(r"\.param\s+([^,]+)", head.group(2)):
        words = parameter.split()
        kernel.parameters.append((words[-1].partition("[")[0], words[0][1:]))
    if threads := re.search(r"\.reqntid\s+(\d+)", plain):
        kernel.threads = int(threads.group(1))
    place = begun = ""
    for number, raw in enumerate(plain[head.end() :].split("\n"), plain[: head.end()].count("\n") + 1):
        if ".section" in raw:
            break
        if found := re.search(r"\.loc\s.*?//\s*(.*)", raw):
            place = found.group(1)
        *statements, begun = f"{begun} {raw.partition('//')[0].strip()}".split(";")
        # What needs no semicolon, and what goes on in the next line.
        if _is_complete(begun):
            statements, begun = [*statements, begun], ""
        for statement in statements:
            _statement(kernel, _without_block(statement), number, place)
    return kernel


def _is_complete(text: str) -> bool:
    """Of directives, braces and labels, which end with their line."""
    return re.fullmatch(r"\s*([{}\s]*|\.(?!reg\b).*|[$\w]+:\s*)", text) is not None


def _without_block(statement: str) -> str:
    """Braces around statements are scopes, which need no care; those around registers are vectors."""
    return re.sub(r"^\s*[{}]\s*(?!%)", "", statement.strip()).strip()


def _statement(kernel: Kernel, statement: str, line: int, place: str) -> None:
    while label := re.match(r"([$\w]+):\s*", statement):
        kernel.labels.setdefault(label.group(1), []).append(len(kernel.instructions))
        statement = _without_block(statement[label.end() :])
    statement = _without_block(statement)
    if not statement or statement in "{}" or statement.startswith(_IGNORED_DIRECTIVES):
        return
    if declaration := re.match(r"\.reg\s+\.(\w+)\s+(.*)", statement):
        _declare(kernel, *declaration.groups())
        return
    guard = ""
    if guarded := re.match(r"@(!?%?[\w$]+)\s+", statement):
        guard, statement = guarded.group(1), statement[guarded.end() :]
    parts = re.match(r"([a-z][\w.:]*)\s*(.*)", statement, re.S)
    if parts is None:
        raise UnsupportedError(f"line {line} of {kernel.name}'s PTX: {statement!r}")
    kernel.places[line] = place
    kernel.instructions.append(Instruction(parts.group(1), _operands(parts.group(2)), guard, line, statement))


def _declare(kernel: Kernel, kind: str, names: str) -> None:
    size = 1 if kind == "pred" else int(re.sub(r"\D", "", kind)) // 8
    for name in names.split(","):
        if numbered := re.match(r"\s*(%?[\w$]+)<(\d+)>", name):
            stem, count = numbered.groups()
            kernel.register_bytes |= {f"{stem}{i}": size for i in range(int(count))}
        else:
            kernel.register_bytes[name.strip()] = size


def _operands(text: str) -> tuple[str, ...]:
    """Split at commas outside braces and brackets."""
    found, depth, start = [], 0, 0
    for at, character in enumerate(text):
        depth += (character in "{[") - (character in "}]")
        if character == "," and depth == 0:
            found.append(text[start:at].strip())
            start = at + 1
    return (*found, text[start:].strip()) if text.strip() else ()


def elements(operand: str) -> list[str]:
    """Of "{%r1, %r2}", or of one register."""
    return [name.strip() for name in operand.strip("{} ").split(",")]


def address(operand: str) -> tuple[str, int]:
    """Register and offset of "[ %rd1 + 16 ]"."""
    parts = re.fullmatch(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\w+)\s*)?\]", operand)
    if parts is None:
        raise UnsupportedError(f"address {operand}")
    return parts.group(1), int(parts.group(2) or "0", 0)
