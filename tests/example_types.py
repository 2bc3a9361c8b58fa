"""The types of the names in a Python example, as far as annotations of the code tell them: for tests of the documentation."""

from __future__ import annotations

import ast
import collections.abc
import inspect
import typing


def typed(annotation: object) -> object:
    """What an annotation says an object is: its class, or a generic such as list[Answer]; None if it does not say one class."""
    options = [option for option in typing.get_args(annotation) if option is not type(None)]
    if typing.get_origin(annotation) in (typing.Union, type(int | None)):
        return typed(options[0]) if len(options) == 1 else None
    return annotation


class Types:
    """The types of the names in an example, as far as the code's annotations tell them."""

    def __init__(self, where: str):
        self.where, self.names, self.values = where, {}, {}

    def read(self, tree: ast.Module) -> None:
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                exec(compile(ast.Module([node], []), self.where, "exec"), self.values)
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                self.names[node.targets[0].id] = self.of(node.value)
            elif isinstance(node, ast.For | ast.comprehension) and isinstance(node.target, ast.Name):
                self.names[node.target.id] = self.element(self.of(node.iter))
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute | ast.Call):
                self.of(node)

    def element(self, annotation: object) -> object:
        arguments = typing.get_args(annotation)
        iterable = isinstance(typing.get_origin(annotation), type) and issubclass(typing.get_origin(annotation), collections.abc.Iterable)
        return typed(arguments[0]) if arguments and iterable else None

    def of(self, node: ast.expr) -> object:
        """The type of an expression, or None; AssertionError for an attribute or an argument that the code does not have."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id)
        if isinstance(node, ast.Attribute):
            return self.attribute(node)
        if isinstance(node, ast.Call):
            function = self.function(node.func)
            if function is None:
                return None
            self.check_call(function, node)
            return function if isinstance(function, type) else typed(typing.get_type_hints(function).get("return"))
        return None

    def attribute(self, node: ast.Attribute) -> object:
        owner = self.of(node.value)
        if not isinstance(owner, type):
            return None
        assigned = f"self.{node.attr}" in inspect.getsource(owner)
        fields = typing.get_type_hints(owner)
        assert hasattr(owner, node.attr) or node.attr in fields or assigned, f"{self.where}: {owner.__name__} has no {node.attr}"
        return typed(fields.get(node.attr))

    def function(self, node: ast.expr) -> object:
        if isinstance(node, ast.Name):
            return self.values.get(node.id)
        if isinstance(node, ast.Attribute):
            owner = self.values.get(node.value.id) if isinstance(node.value, ast.Name) else None
            owner = owner or self.of(node.value)
            return getattr(owner, node.attr, None) if owner is not None and self.of(node) is None else None
        return None

    def check_call(self, function: object, node: ast.Call) -> None:
        if any(isinstance(argument, ast.Starred) for argument in node.args):
            return
        arguments = [None] * len(node.args)
        if inspect.isfunction(function) and "." in function.__qualname__:
            arguments.insert(0, None)  # self
        try:
            inspect.signature(function).bind(*arguments, **{keyword.arg: None for keyword in node.keywords})
        except TypeError as error:
            raise AssertionError(f"{self.where}: {ast.unparse(node)}: {error}") from None
