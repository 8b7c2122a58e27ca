"""Small faults for C++ sources: a fixed list of operators, each a change inside one statement or of two neighbours.

Only functions that change something are mutated, and in them only code that stands on one line. This is no parser
of C++: it follows brackets, statements and conditions, as far as this repository's way of writing needs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

OPERATORS = {
    "drop": "a statement that counts, assigns or calls is left out",
    "swap": "two neighbouring statements that name the same thing change places",
    "negate": "the condition of an if or while is turned round",
    "always": "a condition is taken to be true",
    "unguard": "an if that leaves the function or loop is left out",
    "compare": "a comparison is off by one, or equal becomes unequal",
    "constant": "a number is off by one",
    "count": "an increment becomes a decrement, or the reverse",
    "keep": "a std::move or std::exchange leaves its source as it was",
    "answer": "true is returned for false, or the reverse",
}

COMPARED = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="}
COUNTED = {"++": "--", "--": "++", "+=": "-=", "-=": "+="}

DECLARES = re.compile(r"(?:const |static |constexpr )*[A-Za-z_][\w:]*(?:<[^;()]*>)?[\s&*]+\w+\s*(?:[=;:{(\[]|$)|auto\b")
DIRECTS = re.compile(r"(?:using|case|default|static_assert)\b")
LEAVES = re.compile(r"(?:return|continue|break|throw)\b")
CHANGES = re.compile(r"\+\+|--|[-+]=|\s=\s|\w\(")
CONTROL = re.compile(r"\b(if|while|for)\s*\(")
SCOPE = re.compile(r"\b(?:namespace|class|struct|enum|union|concept)\b")


@dataclass(frozen=True)
class Mutant:
    """`text[start:end]` of a file replaced. Offsets and lines count from the file's beginning, lines from 1."""

    file: str
    line: int
    operator: str
    start: int
    end: int
    before: str
    after: str

    def apply(self, text: str) -> str:
        assert text[self.start : self.end] == self.before
        return text[: self.start] + self.after + text[self.end :]


@dataclass(frozen=True)
class Span:
    start: int
    end: int


@dataclass
class Function:
    """The outermost body of one function, and what stands in it and in its lambdas."""

    body: Span
    statements: list[tuple[int, Span]] = field(default_factory=list)  # number of the block that it stands in
    conditions: list[Span] = field(default_factory=list)  # without their brackets
    guards: list[tuple[Span, Span]] = field(default_factory=list)  # a whole if and what it guards


@dataclass
class Block:
    number: int
    is_code: bool  # a body, a loop or a lambda; else a scope or a list in braces
    outer: int  # where the statement around it began
    parens: int


def blank(text: str) -> str:
    """The same text with comments, strings and preprocessor lines as spaces, so that offsets stay."""
    pattern = re.compile(r'//[^\n]*|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])\'|^#[^\n]*', re.MULTILINE)
    return pattern.sub(lambda found: " " * len(found[0]), text)


def closing(code: str, opening: int) -> int:
    """Where the bracket that opens at `opening` closes."""
    depth = 0
    for at in range(opening, len(code)):
        depth += (code[at] in "([{") - (code[at] in ")]}")
        if depth == 0:
            return at
    raise ValueError(f"a bracket at {opening} never closes")


def begins_code(head: str, inside: bool) -> bool:
    """Whether the brace after `head` opens a body, a loop or a lambda, and neither a scope nor a list."""
    head = head.strip()
    if inside and not head:  # after a condition
        return True
    if not inside and SCOPE.search(head):
        return False
    ends = r"[)\]}]|->\s*[\w:<>*&\s,]+|\b(?:else|do|try|const|noexcept|mutable)"
    return re.search(rf"(?:{ends})$", head) is not None


def functions(text: str) -> list[Function]:
    """All function bodies of a file, in order."""
    code = blank(text)
    found: list[Function] = []
    stack: list[Block] = []
    begin = at = parens = blocks = 0
    while at < len(code):
        inside = any(block.is_code for block in stack)
        char = code[at]
        if char in "()":
            parens += 1 if char == "(" else -1
        elif char == "{":
            head = code[begin:at]
            is_code = begins_code(head, inside)
            if is_code and not inside:
                found.append(Function(Span(at, closing(code, at) + 1)))
            blocks += 1
            stack.append(Block(blocks, is_code, begin, parens))
            if is_code or SCOPE.search(head):
                begin, parens = at + 1, 0
        elif char == "}":
            block = stack.pop()
            parens = block.parens
            begin = at + 1 if parens == 0 and block.is_code else block.outer
            if not block.is_code and SCOPE.search(code[block.outer : at].split("{")[0]):
                begin = at + 1
        elif char == ";" and parens == 0:
            if inside and stack[-1].is_code:
                found[-1].statements.append((stack[-1].number, trimmed(code, begin, at + 1)))
            begin = at + 1
        elif inside and char in "iwf" and parens == 0 and (control := CONTROL.match(code, at)):
            end = closing(code, control.end() - 1)
            add_control(found[-1], code, Span(at, end + 1), Span(control.end(), end), control[1])
            begin = at = end + 1
            continue
        at += 1
    return found


def add_control(function: Function, code: str, whole: Span, condition: Span, kind: str) -> None:
    text = code[condition.start : condition.end]
    if kind == "for" or ";" in text or DECLARES.match(text):
        return
    function.conditions.append(condition)
    guarded = re.compile(r"[^{};]*;").match(code, whole.end)
    if kind == "if" and guarded:
        function.guards.append((whole, trimmed(code, guarded.start(), guarded.end())))


def trimmed(code: str, start: int, end: int) -> Span:
    skipped = re.compile(r"(?:\s|else\b)*").match(code, start)
    return Span(skipped.end() if skipped else start, end)


def mutants(file: str, text: str) -> list[Mutant]:
    """Every mutant of one file, in order of its places. A file without a function that changes something has none."""
    code = blank(text)
    made: dict[tuple[int, int, str], Mutant] = {}
    for function in functions(text):
        if not any(is_change(code[span.start : span.end]) for _, span in function.statements):
            continue
        for operator, start, end, after in changes(code, function):
            if "\n" in text[start:end] and operator != "swap":
                continue
            line = text.count("\n", 0, start) + 1
            made.setdefault((start, end, after), Mutant(file, line, operator, start, end, text[start:end], after))
    for start, end, after in kept(code):
        line = text.count("\n", 0, start) + 1
        made.setdefault((start, end, after), Mutant(file, line, "keep", start, end, text[start:end], after))
    return sorted(made.values(), key=lambda mutant: (mutant.start, mutant.end, mutant.operator))


def is_change(statement: str) -> bool:
    """Whether a statement does something that can be left out. Reserving memory does not."""
    if any(pattern.match(statement) for pattern in (LEAVES, DECLARES, DIRECTS)) or ".reserve(" in statement:
        return False
    return CHANGES.search(statement) is not None


def changes(code: str, function: Function) -> Iterator[tuple[str, int, int, str]]:
    """Operator, start, end and replacement of every mutant inside one function."""
    for _, span in function.statements:
        if is_change(code[span.start : span.end]):
            yield "drop", span.start, span.end, ";"
    yield from swaps(code, function)
    for span in function.conditions:
        condition = code[span.start : span.end]
        yield "negate", span.start, span.end, f"!({condition})"
    for whole, guarded in function.guards:
        if LEAVES.match(code, guarded.start):
            yield "unguard", whole.start, guarded.end, ";"
    leaving = {whole.start for whole, guarded in function.guards if LEAVES.match(code, guarded.start)}
    for span in function.conditions:
        opening = re.compile(r"if\s*\($").search(code[: span.start].rsplit("\n", 1)[-1])
        if opening and span.start - len(opening[0]) not in leaving:
            yield "always", span.start, span.end, "true"
    yield from tokens(code, function)


def swaps(code: str, function: Function) -> Iterator[tuple[str, int, int, str]]:
    for (block, first), (other, second) in zip(function.statements, function.statements[1:], strict=False):
        between = code[first.end : second.start]
        one, two = code[first.start : first.end], code[second.start : second.end]
        if block != other or between.strip() or between.count("\n") != 1 or LEAVES.match(one) or LEAVES.match(two):
            continue
        begins = code.rfind("\n", 0, first.start) + 1
        if code[begins : first.start].strip() or "\n" in one + two or ".reserve(" in one + two:
            continue
        if one != two and depend(one, two) and (is_change(one) or is_change(two)):
            yield "swap", first.start, second.end, two + between + one


def written(statement: str) -> list[str] | None:
    """What a statement writes: the targets of an assignment or count, or the object of a call. None: not known."""
    body = statement.removesuffix(";")
    if counted := re.fullmatch(r"(?:\+\+|--)(.+)|(.+)(?:\+\+|--)", body):
        return [counted[1] or counted[2]]
    *targets, _ = re.split(r" [-+]?= ", body)
    if targets:  # of which each may be a choice of two
        choices = [re.fullmatch(r"\(.+? \? (.+) : (.+)\)", target) for target in targets]
        parts = [choice.groups() if choice else (target,) for choice, target in zip(choices, targets, strict=True)]
        return [name for names in parts for name in names]
    opening = body.find("(")
    while opening >= 0 and closing(body, opening) != len(body) - 1:
        opening = body.find("(", closing(body, opening))
    called = re.fullmatch(r"(.+)(?:\.|->)\w+(?:<[^<>]*>)?", body[: max(opening, 0)])
    return [called[1]] if called else None


def variables(text: str) -> set[str]:
    return set(re.findall(r"\b[a-z]\w*", text)) - {"std", "move", "this"}


def depend(one: str, two: str) -> bool:
    """Whether the order of two statements may matter: one writes what the other names.

    A call of a function, of which nothing is known here, may write whatever it names. A declaration whose name the
    second statement needs cannot come after it, which is no fault worth trying.
    """
    for mine, other in ((one, two), (two, one)):
        if DECLARES.match(mine):
            declared = re.split(r"\s*[=;({]", mine)[0].split()[-1].lstrip("&*")
            if re.search(rf"\b{declared}\b", other):
                return False
        elif (targets := written(mine)) is None:
            if variables(mine) & variables(other):
                return True
        elif any(concerns(target, other) for target in targets):
            return True
    return False


def concerns(target: str, statement: str) -> bool:
    """Whether a statement names what is written, or passes on the whole of which that is a part."""
    whole = re.split(r"\.|->|\[", target)[0]
    passed_on = not target.startswith("(") and re.search(rf"(?<![\w.]){re.escape(whole)}(?![\w.\[]|->)", statement)
    return bool(passed_on) or re.search(rf"(?<![\w.]){re.escape(target)}(?!\w)", statement) is not None


def tokens(code: str, function: Function) -> Iterator[tuple[str, int, int, str]]:
    simple = {at for span in function.conditions for at in range(span.start, span.end) if is_simple(code, span)}
    body = function.body
    for found in re.compile(r" (<=?|>=?|[=!]=) ").finditer(code, body.start, body.end):
        if found[1] not in {"==", "!="} or found.start() not in simple:
            yield "compare", found.start(1), found.end(1), COMPARED[found[1]]
    for found in re.compile(r"(?<![\w.])\d+(?![\w.])").finditer(code, body.start, body.end):
        is_sentinel = code[found.start() - 1] == "-"  # −1 stands for nothing, and so would −2
        yield "constant", found.start(), found.end(), "0" if is_sentinel else str(int(found[0]) + 1)
    for found in re.compile(r"\+\+|--|[-+]=").finditer(code, body.start, body.end):
        yield "count", found.start(), found.end(), COUNTED[found[0]]
    for found in re.compile(r"\breturn (true|false);").finditer(code, body.start, body.end):
        yield "answer", found.start(1), found.end(1), "false" if found[1] == "true" else "true"


def is_simple(code: str, condition: Span) -> bool:
    """A condition of one comparison: turning that round is what "negate" does."""
    return re.search(r"&&|\|\|", code[condition.start : condition.end]) is None


def kept(code: str) -> Iterator[tuple[int, int, str]]:
    """Every std::exchange, and every std::move of a state into an event or into another place."""
    for found in re.finditer(r"\bstd::exchange\(|(?:\bon|\bemplace<\w+>)\((std::move\()", code):
        start = found.start(1) if found[1] else found.start()
        end = closing(code, found.end() - 1)
        source = re.match(r"[^,()]*(?:\([^()]*\)[^,()]*)*", code[found.end() : end])
        if source and source[0]:
            yield start, end + 1, source[0]
