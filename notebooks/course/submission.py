"""Reads submitted notebooks: which statements of a notebook does a function need?

    read = submission.read(Path("2_erasing.ipynb"))
    submission.statements_for(read.cells, "my_method")     # sources, in the notebook's order
"""

import ast
import json
import re
import symtable
from pathlib import Path
from typing import NamedTuple

from sample import UsageError

HEADING = re.compile(r"^#\s+(\d)\.", re.MULTILINE)  # "# 2. Erasing a concept"
SHELL = re.compile(  # IPython's lines: %time f(), !ls, files = !ls, f?
    r"^(\s*)(?=%%?[a-z]|!(?!=)|[\w.,\s]+=\s*(?:%[a-z]|!)|\?|[\w.]+\?+\s*$)"
)
TIMERS = ("%%time", "%%timeit", "%%capture", "%%prun")  # what follows is Python


class Submission(NamedTuple):
    number: str  # of the notebook by its heading, or ""
    cells: list[str]  # the sources of its code cells


class Statement(NamedTuple):
    """A statement at the top level of a cell."""

    code: str
    binds: set[str]
    needs: set[str]  # the global names that it refers to, functions' bodies included


def read(file: Path) -> Submission:
    """Returns a notebook's code. Raises UsageError for another file."""
    try:
        notebook = json.loads(file.read_text(encoding="utf-8"))
        sources = {"code": [], "markdown": []}
        for cell in notebook["cells"]:
            source = "".join(cell.get("source", ""))
            sources.setdefault(cell.get("cell_type"), []).append(source)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"{file} isn't a notebook: {type(error).__name__}: {error}") from error

    numbers = HEADING.findall("\n".join(sources["markdown"]))
    return Submission(numbers[0] if numbers else "", sources["code"])


# ---- Python out of cells


def compiles(code: str) -> bool:
    """Whether it is Python."""
    try:
        compile(code, "cell", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def python_of(cell: str) -> str:
    """Returns a cell without IPython's lines, each replaced by `pass`: line numbers stay."""
    if cell.startswith("%%") and not cell.startswith(TIMERS):
        return ""  # a cell in another language
    if compiles(cell):
        return cell

    lines = []
    for line in cell.splitlines():
        lines.append(SHELL.sub(r"\1pass  # ", line))
    return "\n".join(lines)


def binds(code: str, name: str) -> bool:
    """Whether a cell binds a name, as far as one can see if it isn't Python."""
    if compiles(code):
        return any(name in statement.binds for statement in statements_of(code))
    return bool(re.search(rf"^\s*(?:def\s+{name}\b|{name}\s*=)", code, re.MULTILINE))


def statements_of(code: str) -> list[Statement]:
    """Returns the statements of a cell; none if it isn't Python."""
    if not compiles(code):
        return []
    return [statement_of(node) for node in ast.parse(code).body]


def statement_of(node: ast.stmt) -> Statement:
    """Returns a node's source, the names that it binds, and those that it needs."""
    code = ast.unparse(node)
    module = symtable.symtable(code, "cell", "exec")
    bound = set()
    needed = set()
    for symbol in module.get_symbols():
        if symbol.is_assigned() or symbol.is_imported():
            bound.add(symbol.get_name())
        if symbol.is_referenced():
            needed.add(symbol.get_name())

    inside = module.get_children()
    while inside:
        table = inside.pop()
        needed |= {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global()}
        inside += table.get_children()

    for target in getattr(node, "targets", []):  # a[0] = 1 and a.b = 1 change a
        while isinstance(target, (ast.Attribute, ast.Subscript)):
            target = target.value
        if isinstance(target, ast.Name):
            bound.add(target.id)
    return Statement(code, bound, needed)


# ---- what a function needs


def statements_for(cells: list[str], name: str) -> list[str]:
    """Returns the statements that bind a name, and those that they need; none if none does.

    The last cell that binds it is taken whole, down to the name; of the cells above and of what
    comes below in this cell, only what is needed. Raises SyntaxError if this cell isn't Python.
    """
    codes = [python_of(cell) for cell in cells]
    binding = [i for i, code in enumerate(codes) if binds(code, name)]
    if not binding:
        return []

    own = codes[binding[-1]]
    compile(own, "the cell", "exec")  # raises SyntaxError
    above = []
    for code in codes[: binding[-1]]:
        above += statements_of(code)
    whole = statements_of(own)
    end = max(i for i, statement in enumerate(whole) if name in statement.binds) + 1

    chosen = set(range(len(above), len(above) + end))
    everything = above + whole
    needed = set()
    while True:
        newly = set().union(*(everything[i].needs for i in chosen))
        if newly <= needed:
            return [everything[i].code for i in sorted(chosen)]
        needed |= newly
        for i, statement in enumerate(everything):
            stars = "import *" in statement.code
            if statement.binds & needed or stars:
                chosen.add(i)
