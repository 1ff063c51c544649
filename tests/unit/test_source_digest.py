"""What of the source counts: the rows of the table in docs/versioning.md about code, in a copy of the package."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from bwsk.study.provenance import PACKAGE, STEPS, source_digest
from bwsk.study.source_digest import Source

TRAIN = {"train-conventional", "train-bwsk-analyzed", "train-bwsk-reversible"}
BEFORE = {step: source_digest(step) for step in STEPS}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return shutil.copytree(PACKAGE, tmp_path / "bwsk", ignore=shutil.ignore_patterns("__pycache__"))


def touched(package: Path) -> set[str]:
    """The steps whose code is another than that of the installed package."""
    source = Source(package)
    return {step for step in STEPS if source_digest(step, source) != BEFORE[step]}


def replace(path: Path, pattern: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    changed = re.sub(pattern, new, text, count=1, flags=re.MULTILINE)
    assert changed != text, pattern
    path.write_text(changed, encoding="utf-8")


def move(package: Path, old: str, new: str) -> None:
    """Move a module, and change all imports of it."""
    (package / new).parent.mkdir(exist_ok=True)
    shutil.move(package / old, package / new)
    before, after = (f"bwsk.{name.removesuffix('.py').replace('/', '.')}".rsplit(".", 1) for name in (old, new))
    for path in package.rglob("*.py"):
        text = re.sub(rf"\b{re.escape('.'.join(before))}\b", ".".join(after), path.read_text())
        path.write_text(text.replace("from {} import {}\n".format(*before), "from {} import {}\n".format(*after)))


def each_docstring(package: Path) -> None:
    """Other docstrings, also where there were none."""
    for path in package.rglob("*.py"):
        path.write_text(re.sub(r'^( *)"""[A-Z]', r'\1"""Otherwise', path.read_text(), flags=re.MULTILINE))


def each_comment(package: Path) -> None:
    for path in package.rglob("*.py"):
        path.write_text(f"# A remark.\n{path.read_text()}\n# And another one.\n")


NOTHING: dict[str, Callable[[Path], None]] = {
    "no change": lambda package: None,
    "a comment": each_comment,
    "a docstring": each_docstring,
    "blank lines, quotes": lambda package: replace(
        package / "study/train.py",
        r'^        if self\.mode == "bwsk-reversible":',
        "\n        if self.mode == 'bwsk-reversible':",
    ),
    "the text of an error": lambda package: replace(
        package / "study/train_step.py",
        r'BwskError\("train\.backend: found compile, which needs a C',
        r'BwskError("A C',
    ),
    "an error's text with other values in it": lambda package: replace(
        package / "study/train_inputs.py",
        r'BwskError\(f"\{file\}: is not the file',
        r'BwskError(f"{known}, {file}: no file',
    ),
    "what is said": lambda package: replace(package / "study/train.py", "resuming after step", "going on after"),
    "a label of a progress bar": lambda package: replace(
        package / "study/train.py", r'f"train \{self', 'f"training {self'
    ),
    "the description of a parameter": lambda package: replace(
        package / "study/params.py", 'description="Heading of the model card."', 'description="A heading."'
    ),
    "a type hint": lambda package: replace(
        package / "study/train.py", r"^def finished\(out: Path", "def finished(out: object"
    ),
    "a type hint and its import": lambda package: (
        replace(package / "study/schedule.py", r"^from __future__ import annotations$", "from typing import Any")
        or replace(package / "study/schedule.py", r"-> int:", "-> Any:")
    ),
    "the order of imports": lambda package: replace(
        package / "study/train.py", r"^(import math\n)(import time\n)", r"\2\1"
    ),
    "a moved file": lambda package: move(package, "study/schedule.py", "recipe/schedule.py"),
    "a renamed file": lambda package: move(package, "study/train_state.py", "study/progress_of_a_run.py"),
    "a moved file that others import": lambda package: move(package, "study/hub.py", "hub.py"),
    "progress bars": lambda package: replace(package / "study/progress.py", r"^INTERVAL = 5\.0", "INTERVAL = 9.0"),
    "the code that says what a step reads": lambda package: replace(
        package / "study/provenance.py", r"^UNCOUNTED", "MORE = 1\nUNCOUNTED"
    ),
    "the command line": lambda package: replace(package / "cli/study.py", r"^_PARAMS", "MORE = 1\n_PARAMS"),
}


@pytest.mark.parametrize("row", NOTHING)
def test_what_does_not_count(copy: Path, row: str) -> None:
    NOTHING[row](copy)
    assert touched(copy) == set()


def append(name: str) -> Callable[[Path], None]:
    return lambda package: (package / name).write_text((package / name).read_text() + "\nEDITED = True\n")


COUNTS: dict[str, tuple[Callable[[Path], None], Iterable[str]]] = {
    "a number in train.py": (
        lambda package: replace(package / "study/train.py", r"self\._lr\(0\)", "self._lr(1)"),
        TRAIN,
    ),
    "the schedule": (append("study/schedule.py"), TRAIN),
    "the engine": (
        append("reversible/dropout.py"),
        {"train-bwsk-reversible", "memory-bwsk-reversible"},
    ),
    "the erasure": (append("classification/erasure.py"), {"train-bwsk-analyzed"}),
    "the census": (append("classification/census.py"), {"classify"}),
    "the card": (append("study/card.py"), {"card", "check"}),
    "the claims": (append("study/claims.py"), {"results", "card", "check"}),
    "the corpus": (append("study/corpus.py"), {"corpus", "tokenizer", "tokens", "base", "evaluate", *TRAIN}),
    "what an exception carries that is no text": (
        lambda package: replace(
            package / "study/train.py",
            r"Interrupted\(self\.stop\.number, self\.saved, state",
            "Interrupted(9, self.saved, state",
        ),
        TRAIN,
    ),
    "a field's type in a class": (
        lambda package: replace(package / "study/params.py", r"^    batch_size: Positive", "    batch_size: int"),
        None,
    ),
}


@pytest.mark.parametrize("row", COUNTS)
def test_what_counts(copy: Path, row: str) -> None:
    change, expected = COUNTS[row]
    change(copy)
    if expected is None:  # every step that reads params.yaml
        expected = {step for step in STEPS if not step.startswith("memory") and step not in ("classify", "trace")}
    assert touched(copy) == set(expected)


def tiny(folder: Path, **modules: str) -> str:
    """The digest of the module `main` of a package of these modules."""
    package = folder / f"{len(list(folder.iterdir()))}" / "bwsk"
    package.mkdir(parents=True)
    for name, text in modules.items():
        (package / f"{name}.py").write_text(text)
    return Source(package).digest(["main"])


BOTH = {"one": "def f():\n    return 1\n", "two": "def f():\n    return 2\n"}
USE = "import bwsk.one, bwsk.two\n"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        # Both modules belong to the source either way; which of them a name is taken from counts.
        (f"{USE}from bwsk.one import f\nprint(f())\n", f"{USE}from bwsk.two import f\nprint(f())\n"),
        (
            f"{USE}if 1:\n    from bwsk.one import f\nelse:\n    from bwsk.two import f\nprint(f())\n",
            f"{USE}if 1:\n    from bwsk.two import f\nelse:\n    from bwsk.one import f\nprint(f())\n",
        ),
        # A library's function is known by its name alone.
        ("from math import floor as f\nx = f(1)\n", "from math import ceil as f\nx = f(1)\n"),
        ("from math import sqrt\nx = sqrt(1)\n", "from numpy import sqrt\nx = sqrt(1)\n"),
        # Imported for what importing it does.
        ("x = 1\n", "import readline\nx = 1\n"),
        ("x = 1\n", "x = 1.0\n"),
        ("x = 1\n", "x = True\n"),
        ("x = 'é'\n", "x = 'e'\n"),
        ("x = None\n", "x = ...\n"),
        ("x = f'{a}b'\n", "x = f'{a}c'\n"),
        ("x = f'{a:.2f}'\n", "x = f'{a:.3f}'\n"),
        ("x = f'{a!r}'\n", "x = f'{a!s}'\n"),
        ("x = {**a}\n", "x = {None: a}\n"),
        ("def f(a, /, b=1, *, c=2): pass\n", "def f(a, b=1, *, c=2): pass\n"),
        ("def f(*, c, d=2): pass\n", "def f(*, c=2, d): pass\n"),
        ("class A:\n    x: int = 1\n", "class A:\n    x: float = 1\n"),
        ("class A:\n    if 1:\n        x: int\n", "class A:\n    if 1:\n        x: float\n"),
        # A decorator may read the annotations of what it decorates.
        ("@register\ndef f(a: int): pass\n", "@register\ndef f(a: str): pass\n"),
        ("print('a', file=out)\n", "print('b', file=out)\n"),
        ("raise ValueError(1)\n", "raise ValueError(2)\n"),
        ("x = save('a')\n", "x = save('b')\n"),
        ("raise BwskError(save('a'))\n", "raise BwskError(save('b'))\n"),
        ("if x:\n    y()\n", "if x:\n    pass\nelse:\n    y()\n"),
    ],
)
def test_what_could_change_a_result_counts(tmp_path: Path, before: str, after: str) -> None:
    assert tiny(tmp_path, main=before, **BOTH) != tiny(tmp_path, main=after, **BOTH)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("def f(a, b=1): pass\n", "def f(a: int, b: int = 1) -> str: pass\n"),
        ("@property\ndef f(a): pass\n", "@property\ndef f(a) -> int: pass\n"),
        ("def f(*a, **b): pass\n", "def f(*a: int, **b: str): pass\n"),
        ("def f():\n    x = 1\n", "def f():\n    x: int = 1\n"),
        ("assert x\n", "assert x, 'what'\n"),
        ("x = 1\n", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from bwsk.one import f\nx = 1\n"),
        ("raise ValueError('a' if x else f'{b}')\n", "raise ValueError('c' if x else 'd')\n"),
        ("print('a', file=sys.stderr)\n", "print('b', file=sys.stderr)\n"),
        ("x = f'a' 'b' f'{c}' 'd'\n", "x = f'ab{c}d'\n"),
    ],
)
def test_what_could_not_does_not(tmp_path: Path, before: str, after: str) -> None:
    assert tiny(tmp_path, main=before, **BOTH) == tiny(tmp_path, main=after, **BOTH)


def test_the_package_that_a_module_lies_in_counts_if_it_does_anything(tmp_path: Path) -> None:
    package = tmp_path / "bwsk"
    (package / "room").mkdir(parents=True)
    (package / "room" / "one.py").write_text(BOTH["one"])
    (package / "main.py").write_text("from bwsk.room.one import f\nx = f()\n")
    found = []
    for text in ("", '"""A room."""\nfrom __future__ import annotations\n', "import bwsk.room.one\n"):
        (package / "room" / "__init__.py").write_text(text)
        found.append(Source(package).digest(["main"]))
    assert found[0] == found[1] == tiny(tmp_path, main="from bwsk.one import f\nx = f()\n", **BOTH)
    assert found[2] != found[0]


def test_a_cut_module_counts_nothing_nor_what_only_it_imports(tmp_path: Path) -> None:
    package = tmp_path / "bwsk"
    package.mkdir()
    (package / "main.py").write_text("def f():\n    from bwsk.one import g\n    return g()\n")
    (package / "one.py").write_text("import bwsk.two\n")
    (package / "two.py").write_text("x = 1\n")
    whole, cut = Source(package).digest(["main"]), Source(package).digest(["main"], ["one"])
    for name in ("one", "two"):
        (package / f"{name}.py").write_text((package / f"{name}.py").read_text() + "y = 2\n")
        assert Source(package).digest(["main"], ["one"]) == cut != whole
        assert Source(package).digest(["main"]) != whole


# What Pythons parse, or would print, differently.
SYNTAX = (
    """
import os.path as p
from collections.abc import Callable
class A[0]: pass
""".replace("[0]", "(B, metaclass=C)")
    + '''
@d(1)
async def f(a, /, b: int = 2, *c, d, e=None, **k) -> None:
    """Text."""
    async with a as x, b: yield
    return [i async for i in a if i] or {**k, 1: 2} or (lambda q: -q)(3) or a[1:2, ...] or a @ b
def g(a):
    match a:
        case {"x": [1, *rest], **k} | None: ...
        case P(1, y=True) if (n := 2): pass
    try: del a.b
    except* (E, F) as error: raise G from error
    else: x: int = 3
    finally: global z
    while True: break
    else: x += f"{a}{b!r:>{w}}{{}}{c=}" "\\N{BULLET}\\x00é" f'{"d"}'
    return 1_0, 0x10, 1e400, -0.0, 2j, b"\\xff", "\\ud800", 10**20, not a, *b
'''
)


def test_the_digest_is_the_same_in_every_python(tmp_path: Path) -> None:
    """Made with 3.11, and found with 3.12 and 3.13; the tests of any other say the rest."""
    assert tiny(tmp_path, main=SYNTAX) == "1cb9e829e3d38e33295715ac0bc67474b5712ef949449ef2e1e8eaccc7721a8b"
