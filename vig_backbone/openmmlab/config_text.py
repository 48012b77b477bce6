"""Configs out of checkpoints, read without running them: what a file from elsewhere says is no reason to execute it."""

import ast
from typing import Any

from mmengine.config import Config
from mmengine.utils import import_modules_from_strings

from ..checkpoint import CheckpointError


def config_from_text(text: str, source: str) -> Config:
    """The config whose text mmengine put into a checkpoint: assignments of numbers, strings, lists, tuples and dicts.

    Modules that it names in `custom_imports` are imported.

    Args:
        source: the file, for errors.

    Raises:
        CheckpointError: for anything else in it.
    """
    try:
        fields = {}
        for statement in ast.parse(text).body:
            match statement:
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    fields[name] = _literal(value)
                case _:
                    raise ValueError(f"{ast.unparse(statement)[:60]!r} is no assignment to a name")
    except (SyntaxError, ValueError) as error:
        raise CheckpointError(f"the config in {source} is not understood: {error}") from error
    cfg = Config(fields)
    if imports := cfg.get("custom_imports"):
        import_modules_from_strings(**imports)
    return cfg


def _literal(node: ast.expr) -> Any:
    match node:
        case ast.List(elts=items):
            return [_literal(item) for item in items]
        case ast.Tuple(elts=items):
            return tuple(_literal(item) for item in items)
        case ast.Dict(keys=keys, values=values) if None not in keys:
            return {_literal(key): _literal(value) for key, value in zip(keys, values)}
        case ast.Call(func=ast.Name(id="dict"), args=[], keywords=keywords) if all(k.arg for k in keywords):
            return {k.arg: _literal(k.value) for k in keywords}
        case ast.Call(func=ast.Name(id="dict"), args=[ast.Dict() as mapping], keywords=[]):
            return _literal(mapping)
        case ast.Name(id="inf" | "nan" as name):
            return float(name)
        case ast.Call(func=ast.Name(id="float"), args=[ast.Constant(value=str() as name)], keywords=[]):
            return float(name)
        case _:
            return ast.literal_eval(node)  # of numbers and strings; ValueError for the rest
