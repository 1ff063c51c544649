"""The digest of the code that a step can run, independent of how that code is written down.

A step's code is its modules and everything that they import from bwsk, directly or not. Each module counts as its
syntax tree without what cannot change a result: comments, docstrings, type hints, the text of messages. It does not
matter which file code is in, because an imported name counts by the content of the module that it comes from.

Only the standard library is used here, and the digest is the same under every Python that bwsk supports.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

# Decorators that ignore annotations; under any other decorator, annotations count.
_PLAIN = {"abstractmethod", "cache", "classmethod", "contextmanager", "property", "staticmethod"}
# Functions whose text arguments are for people to read, as are those of every class whose name ends in Error.
_TELLS = {"print", "progress", "say", "_say", "warn"}
_ABOUT = {"description", "title"}  # arguments of a field of params.yaml that only document it
_MESSAGE = "a message"
Imported = tuple[str, str, str | None]  # local name, module, attribute of it


@dataclass(eq=False)
class Source:
    """The source of the package in folder `package`, as it was when first read."""

    package: Path
    _modules: dict[Path, _Module] = field(default_factory=dict)

    def digest(self, modules: Collection[str], without: Collection[str] = ()) -> str:
        """sha256 (hex) of the code of these modules; names are relative to the package, as "study.train".

        `without`: modules (all those of a package) that do not count, nor what only they import.
        """
        cut = self._cut(without)
        found = {self._digest(path, cut) for path in self.files(modules, without) if self._module(path).counts}
        return hashlib.sha256("\n".join(sorted(found)).encode()).hexdigest()

    def files(self, modules: Collection[str], without: Collection[str] = ()) -> list[Path]:
        """The files of these modules and, transitively, of all modules of the package that they import, sorted."""
        cut = self._cut(without)
        found: set[Path] = set()
        waiting = {path for module in modules for path in self._loaded(module.split("."))} - cut
        while waiting:
            found.add(path := waiting.pop())
            waiting |= self._imported(self._module(path).imports) - found - cut
        return sorted(found)

    def imported(self, code: str) -> set[Path]:
        """The files of the package's modules that running all of `code` imports."""
        return self._imported(_imports(ast.parse(code)))

    def _imported(self, names: list[Imported]) -> set[Path]:
        split = [[*module.split("."), *([attribute] if attribute else [])] for _, module, attribute in names]
        return {path for first, *rest in split if first == self.package.name for path in self._loaded(rest)}

    def _loaded(self, parts: list[str]) -> Iterator[Path]:
        """The files of a module and of the packages it is in. bwsk's own `__init__` forwards names, no more."""
        for end in range(1, len(parts) + 1):
            if path := self._file(parts[:end]):
                yield path

    def _file(self, parts: list[str]) -> Path | None:
        if not parts:
            return None
        path = self.package.joinpath(*parts)
        return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)

    def _cut(self, without: Collection[str]) -> set[Path]:
        found = {path for module in without if (path := self._file(module.split(".")))}
        return found.union(*(path.parent.rglob("*.py") for path in found if path.name == "__init__.py"))

    def _module(self, path: Path) -> _Module:
        if path not in self._modules:
            self._modules[path] = _Module(ast.parse(path.read_bytes(), path))
        return self._modules[path]

    def _digest(self, path: Path, cut: set[Path]) -> str:
        """Digest of a module's content and of the origin of each imported name.

        Without the origins, importing a function of the same name from another module would change nothing if both
        modules are part of the source anyway.
        """
        module = self._module(path)
        bound = [(body, local, *self._origin(name, attribute, cut)) for body, local, name, attribute in module.bound]
        return _sha256((module.content, *sorted(bound, key=ascii)))

    def _origin(self, module: str, attribute: str | None, cut: set[Path]) -> tuple[str, str | None]:
        """A module of the package by its content, which does not depend on its path; any other by its name."""
        first, *parts = module.split(".")
        if first != self.package.name:
            return module, attribute
        if attribute and (file := self._file([*parts, attribute])):  # a module of that package, not a name in it
            attribute = None
        elif not (file := self._file(parts)):
            return module, attribute
        return "not counted" if file in cut else self._module(file).content, attribute


class _Module:
    """The parts of a module that count.

    `content`: sha256 of its syntax tree without imports. `bound`: (number of the block, name, module, attribute) of
    each import that counts. `imports`: everything that it imports. `counts`: whether anything counts.
    """

    def __init__(self, tree: ast.Module) -> None:
        self.names: set[str] = set()
        self.blocks = 0
        bound: list[tuple[int, str, str, str | None]] = []
        self.bound = bound
        code = self._body(tree.body)
        self.content = _sha256(code)
        self.imports = _imports(tree)
        # Names imported for type hints or messages alone, which appear in the file but nowhere that counts.
        unneeded = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} - self.names
        self.bound = [entry for entry in bound if entry[1] not in unneeded and entry[2] != "__future__"]
        self.counts = bool(code or self.bound)

    def _body(self, body: list[ast.stmt], of_class: bool = False) -> tuple[Any, ...]:
        """The statements of a block as nested tuples, because `ast.dump` differs between Python versions."""
        self.blocks += 1
        block = self.blocks
        counted: list[Any] = []
        for node in body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                self.bound += [(block, *name) for name in _names(node)]
            elif isinstance(node, ast.If) and _is_type_checking(node.test):
                counted += self._body(node.orelse, of_class) if node.orelse else ()
            elif not isinstance(node, ast.Pass) and not (
                isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)  # a docstring
            ):
                counted.append(self._statement(node, of_class))
        return tuple(counted)

    def _statement(self, node: ast.stmt, of_class: bool) -> tuple[Any, ...]:
        if _is_function(node):
            if all(_name(decorator) in _PLAIN for decorator in node.decorator_list):
                return self._node(node, leave={"returns"}, hints=False)
        elif isinstance(node, ast.AnnAssign) and not of_class:  # in a class they make its fields
            if node.value is None:
                return ("AnnAssign", self._value(node.target))
            return ("Assign", ("targets", (self._value(node.target),)), ("value", self._value(node.value)))
        elif isinstance(node, ast.Assert):
            return self._node(node, leave={"msg"})
        return self._node(node, of_class=of_class)

    def _node(
        self, node: ast.AST, leave: Collection[str] = (), hints: bool = True, of_class: bool = False
    ) -> tuple[Any, ...]:
        """(class, (field, value), …), without empty fields, because newer versions of Python add such fields."""
        counted: list[tuple[str, Any]] = []
        for name, value in ast.iter_fields(node):
            if value is None or value == [] or name in leave or name == "type_comment":
                continue
            if name in ("body", "orelse", "finalbody") and isinstance(value, list):
                shown: Any = self._body(value, (of_class and not _is_function(node)) or isinstance(node, ast.ClassDef))
                if not shown:
                    continue
            elif name == "args" and _is_function(node) and not hints:
                shown = self._arguments(value)
            else:
                shown = self._value(value)
            counted.append((name, shown))
        return (type(node).__name__, *counted)

    def _arguments(self, arguments: ast.arguments) -> tuple[Any, ...]:
        """The arguments of a function without their annotations."""
        kept = [
            (
                name,
                tuple(argument.arg for argument in value)
                if name in ("posonlyargs", "args", "kwonlyargs")
                else value.arg
                if isinstance(value, ast.arg)
                else self._value(value),
            )
            for name, value in ast.iter_fields(arguments)
            if value
        ]
        return ("arguments", *kept)

    def _value(self, value: Any) -> Any:
        if isinstance(value, list):
            return tuple(self._value(item) for item in value)
        if not isinstance(value, ast.AST):
            return value
        if isinstance(value, ast.Name):
            self.names.add(value.id)
        if isinstance(value, ast.Constant):
            return ("Constant", value.value)
        if isinstance(value, ast.JoinedStr):
            return ("JoinedStr", *self._pieces(value))
        if isinstance(value, ast.Call):
            return self._call(value)
        return self._node(value)

    def _call(self, node: ast.Call) -> tuple[Any, ...]:
        name = _name(node.func)
        keywords = node.keywords
        if name == "Field":
            keywords = [keyword for keyword in keywords if keyword.arg not in _ABOUT]
        tells = name.endswith("Error") or (name in _TELLS and not _writes(node))
        value = self._message if tells else self._value
        return (
            "Call",
            self._value(node.func),
            tuple(value(argument) for argument in node.args),
            tuple((keyword.arg, value(keyword.value)) for keyword in keywords),
        )

    def _message(self, node: ast.expr) -> Any:
        """An argument of a message, whose texts and interpolated values do not count."""
        if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str)):
            return _MESSAGE
        if isinstance(node, ast.BinOp):
            return ("BinOp", self._message(node.left), self._value(node.op), self._message(node.right))
        if isinstance(node, ast.IfExp):
            return ("IfExp", self._value(node.test), self._message(node.body), self._message(node.orelse))
        return self._value(node)

    def _pieces(self, node: ast.JoinedStr) -> Iterator[Any]:
        """The parts of an f-string; Python versions differ in how they split its literal text."""
        text = ""
        for piece in node.values:
            if isinstance(piece, ast.Constant):
                text += str(piece.value)
                continue
            if text:
                yield text
            text = ""
            yield self._value(piece)
        if text:
            yield text


def _sha256(code: tuple[Any, ...]) -> str:
    return hashlib.sha256(ascii(code).encode()).hexdigest()


def _imports(tree: ast.AST) -> list[Imported]:
    """All names that a tree imports, anywhere but below `if TYPE_CHECKING`."""
    found, waiting = [], [tree]
    while waiting:
        node = waiting.pop()
        found += _names(node)
        if isinstance(node, ast.If) and _is_type_checking(node.test):
            waiting += node.orelse
        else:
            waiting += ast.iter_child_nodes(node)
    return found


def _names(node: ast.AST) -> list[Imported]:
    """The names that an import statement binds; none for other nodes."""
    if isinstance(node, ast.ImportFrom):
        if node.level:
            raise ValueError(f"line {node.lineno}: a relative import; write the module's full name")
        return [(alias.asname or alias.name, node.module or "", alias.name) for alias in node.names]
    if isinstance(node, ast.Import):
        return [(alias.asname or alias.name.partition(".")[0], alias.name, None) for alias in node.names]
    return []


def _name(node: ast.expr) -> str:
    """The last part of a called or decorating name, "" for what has none."""
    if isinstance(node, ast.Call):
        return _name(node.func)
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _writes(node: ast.Call) -> bool:
    """Whether a call of `print` goes to a file."""
    return any(keyword.arg == "file" and _name(keyword.value) != "stderr" for keyword in node.keywords)


def _is_function(node: ast.AST) -> TypeGuard[ast.FunctionDef | ast.AsyncFunctionDef]:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def _is_type_checking(test: ast.expr) -> bool:
    return _name(test) == "TYPE_CHECKING"
