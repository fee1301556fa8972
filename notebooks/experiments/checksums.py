"""Checksums of all that an answer depends on: settings, weights, and code.

An edit of a docstring, a comment or a table changes none of them.
"""

import ast
import contextlib
import functools
import importlib.util
import inspect
import json
import sys
import types
import zlib
from pathlib import Path
from typing import Callable

SIX = ("clip_text", "ddim", "erase", "sample", "unet", "vae")


def crc(value: object) -> str:
    """Returns a checksum of bytes, or of what is JSON."""
    data = value if isinstance(value, bytes) else json.dumps(value, sort_keys=True).encode()
    return f"{zlib.crc32(data):08x}"


def without_docstrings(source: str) -> str:
    """Returns what a source does; how it is laid out and commented isn't in it."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            if isinstance(body[0].value, ast.Constant):
                body[0] = ast.Pass()
    return ast.dump(tree)


def is_a_methods(module: types.ModuleType, of: types.ModuleType) -> bool:
    """Whether a module that a method's module imports counts as code of the method.

    Those of methods/ do, and for a method in a file of its own, other files in its folder.
    Libraries don't, nor do our six files, which tests compare with the reference.
    """
    if module.__name__.startswith("notebooks.methods."):
        return True
    if of.__name__.startswith("notebooks.") or module.__name__ in SIX:
        return False
    files = [getattr(each, "__file__", None) or "" for each in (module, of)]
    return Path(files[0]).parent == Path(files[1]).parent


def imported_by(module: types.ModuleType) -> list[types.ModuleType]:
    """Returns the modules that a module's code imports, including inside functions."""
    names = set()
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.Import):
            names |= {each.name for each in node.names}
        if isinstance(node, ast.ImportFrom):
            package = node.module or ""
            if node.level and module.__package__:
                package = importlib.util.resolve_name("." * node.level + package,
                                                      module.__package__)
            names |= {package, *(f"{package}.{each.name}" for each in node.names)}

    for name in names - {*sys.modules}:  # by a function that hasn't been called yet
        if Path(module.__file__).with_name(f"{name.rpartition('.')[2]}.py").exists():
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
    return [sys.modules[name] for name in sorted(names & {*sys.modules})]


def modules_used(
    module: types.ModuleType, found: dict[str, types.ModuleType] | None = None
) -> dict[str, types.ModuleType]:
    """Returns a module and the method's modules that it imports, and they import, by name.

    found: those that are known already.
    """
    found = {**(found or {}), module.__name__: module}
    for other in imported_by(module):
        if other.__name__ not in found and is_a_methods(other, of=module):
            found = modules_used(other, found)
    return found


@functools.cache  # as all below: an edit during a run doesn't pass for what was run
def code_of(*modules: types.ModuleType) -> str:
    """Returns a checksum of the code of modules, and of the methods' that they import."""
    used = {}
    for module in modules:
        used |= modules_used(module)
    sources = {name: inspect.getsource(used[name]) for name in sorted(used)}
    return crc({name: without_docstrings(source) for name, source in sources.items()})


def sources_used(function: types.FunctionType, found: dict | None = None) -> dict[str, str]:
    """Returns, by name, what a function does, and the functions and constants of its module.

    Only those that it uses; what it imports isn't followed. found: what is known already.
    """
    names = vars(inspect.getmodule(function))
    source = inspect.getsource(function)
    found = {**(found or {}), function.__name__: without_docstrings(source)}
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Name) or node.id in found or node.id not in names:
            continue
        value = inspect.unwrap(names[node.id])  # of a cache
        if inspect.isfunction(value):
            if value.__module__ == function.__module__:
                found = sources_used(value, found)
        else:
            with contextlib.suppress(TypeError):  # a constant is JSON; a module isn't
                found[node.id] = json.dumps(value)
    return found


@functools.cache
def code_of_method(method: Callable) -> str:
    """Returns a checksum of all of a method's module, with the methods that it imports.

    A method in an experiment's own file doesn't depend on the rest of the experiment.
    """
    module = sys.modules[method.__module__]
    if not module.__name__.startswith("notebooks.experiments."):
        return code_of(module)
    imported = [each for each in modules_used(module).values() if each is not module]
    return crc([sources_used(method), code_of(*imported)])


@functools.cache
def code_of_answer(function: Callable) -> str:
    """Returns a checksum of a function and of what it uses in its module."""
    return crc(sources_used(function))


@functools.cache
def code_of_functions(functions: tuple[Callable, ...]) -> str:
    """Returns a checksum of the code of functions; of those in methods/, of their files."""
    sources = []
    for function in functions:
        module = sys.modules[function.__module__]
        if module.__name__.startswith("notebooks.methods."):
            sources.append(code_of(module))
        else:
            sources.append(sources_used(function))
    return crc(sources)
