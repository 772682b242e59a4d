"""The rules of the house, read off the source with `ast`: nothing is imported.

timescales < nested < worldmodel < agents < experiments; only experiments/ touches the world; files
and functions stay short; README's tree is the real one. Each failure lists every offender.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("timescales", "nested", "worldmodel", "agents", "experiments")
PURE = PACKAGES[:-1]
FILE_LINES, FUNCTION_LINES = 450, 60

# Tensors in, tensors out: all that the four lower packages may import besides each other.
PURE_IMPORTS = {
    *("__future__", "abc", "bisect", "collections", "contextlib", "copy", "dataclasses"),
    *("difflib", "enum", "fractions", "functools", "heapq", "itertools", "math", "numbers"),
    *("operator", "re", "string", "types", "typing", "warnings", "weakref", "numpy", "torch"),
}
WORLDLY_CALLS = {"print", "open", "input", "breakpoint", "exec", "eval"}
WORLDLY_ATTRIBUTES = {
    *("torch.save", "torch.load", "np.save", "np.load", "np.savez", "numpy.save", "numpy.load"),
    *("torch.manual_seed", "torch.seed", "np.random.seed", "torch.set_num_threads"),
}

DRAWS = {
    *("torch.rand", "torch.randn", "torch.randint", "torch.randperm", "torch.normal"),
    *("torch.multinomial", "torch.bernoulli", "torch.rand_like", "torch.randn_like"),
}


def files(packages: tuple[str, ...] = PACKAGES) -> list[Path]:
    return sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))


def short(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path, node: ast.AST) -> list[str]:
    """Dotted names that an import statement may load; `from a import b` gives a and a.b."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = node.module or ""
    if node.level:
        package = module_name(path).split(".")
        dropped = node.level - (path.name == "__init__.py")
        base = ".".join([*package[: len(package) - dropped], *filter(None, [node.module])])
    return [base, *(f"{base}.{alias.name}" for alias in node.names)]


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import in a file, inside functions too."""
    for node in ast.walk(parse(path)):
        for name in imported(path, node):
            yield getattr(node, "lineno", 0), name


def dotted(node: ast.expr) -> str:
    return re.sub(r"\s", "", ast.unparse(node))


def test_the_packages_are_there():
    for package in PACKAGES:
        assert (ROOT / package / "__init__.py").is_file(), package


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_what_stands_before_it(package: str):
    later = PACKAGES[PACKAGES.index(package) + 1 :]
    wrong = sorted(
        f"{short(path)}:{line} imports {name}"
        for path in files((package,))
        for line, name in imports(path)
        if name.split(".")[0] in (*later, "tests")
    )
    assert not wrong, "\n".join(wrong)


def test_only_experiments_imports_the_world():
    allowed = PURE_IMPORTS | set(PURE)
    wrong = sorted(
        f"{short(path)}:{line} imports {name}"
        for path in files(PURE)
        for line, name in imports(path)
        if name.split(".")[0] not in allowed
    )
    assert not wrong, "\n".join(wrong)


def test_only_experiments_prints_opens_saves_or_seeds():
    wrong = []
    for path in files(PURE):
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Call):
                name = dotted(node.func)
                if name in WORLDLY_CALLS | WORLDLY_ATTRIBUTES or name.endswith(".cuda"):
                    wrong.append(f"{short(path)}:{node.lineno} calls {name}")
    assert not wrong, "\n".join(wrong)


def test_draws_take_a_generator():
    """Initial weights excepted: torch.nn.init draws from torch's own."""
    wrong = [
        f"{short(path)}:{node.lineno} {dotted(node.func)} without generator="
        for path in files(PURE)
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Call)
        and dotted(node.func) in DRAWS
        and "generator" not in {keyword.arg for keyword in node.keywords}
    ]
    assert not wrong, "\n".join(wrong)


def test_no_hasattr():
    wrong = [
        f"{short(path)}:{node.lineno}"
        for path in files()
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Name) and node.id == "hasattr"
    ]
    assert not wrong, f"hasattr in {', '.join(wrong)}"


def test_files_and_functions_stay_short():
    wrong = []
    for path in files():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > FILE_LINES:
            wrong.append(f"{short(path)}: {lines} lines, at most {FILE_LINES}")
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > FUNCTION_LINES:
                    wrong.append(
                        f"{short(path)}:{node.lineno} {node.name}: {lines} lines, "
                        f"at most {FUNCTION_LINES}"
                    )
    assert not wrong, "\n".join(wrong)


def test_names_say_what_a_thing_is():
    vague = re.compile(r"manager|helper|utils?(?![a-z])", re.IGNORECASE)
    names = [(short(path), path.stem) for path in files()]
    for path in files():
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.append((f"{short(path)}:{node.lineno}", node.name))
    wrong = [f"{where} {name}" for where, name in names if vague.search(name)]
    assert not wrong, "\n".join(wrong)


def test_a_file_opens_with_what_it_is():
    wrong = [
        short(path) for path in files() if parse(path).body and not ast.get_docstring(parse(path))
    ]
    assert not wrong, f"no docstring opens {', '.join(wrong)}"


def load_time_nodes(path: Path) -> Iterator[ast.AST]:
    """What runs while the module loads: no function bodies, nothing for type checkers only."""
    pending: list[ast.AST] = list(parse(path).body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in dotted(node.test):
            pending.extend(node.orelse)
            continue
        yield node
        pending.extend(ast.iter_child_nodes(node))


def needed(path: Path, node: ast.AST, modules: dict[str, Path]) -> set[str]:
    """Modules that an import waits for: `from package import module` waits for the module only."""
    names = imported(path, node)
    if isinstance(node, ast.ImportFrom):
        base, *parts = names
        names = [part if part in modules else base for part in parts]
    return {name for name in names if name in modules} - {module_name(path)}


def test_no_circular_imports():
    modules = {module_name(path): path for path in files()}
    graph = {
        name: set[str]().union(*(needed(path, node, modules) for node in load_time_nodes(path)))
        for name, path in modules.items()
    }
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"circular import: {' -> '.join(error.args[1])}")


def readme_tree() -> dict[str, str]:
    """path -> description of the tree in README: two spaces of indent a folder."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = next(b for b in re.findall(r"```\w*\n(.*?)```", text, re.DOTALL) if "timescales/ " in b)
    tree: dict[str, str] = {}
    folders: list[str] = []
    for line in filter(str.strip, block.splitlines()):
        depth = (len(line) - len(line.lstrip())) // 2
        name, _, description = line.strip().partition(" ")
        folders[depth:] = [name] if name.endswith("/") else []
        parents = folders[:depth]
        tree["".join(parents) + name] = description.strip()
    return tree


def first_line(path: Path) -> str:
    return (ast.get_docstring(parse(path)) or "?").splitlines()[0]


def test_readme_tree_is_the_real_tree():
    tree = readme_tree()
    real = {short(path): path for path in files() if parse(path).body}
    gone = [path for path in tree if not (ROOT / path).exists()]
    missing = [f"{p}  {first_line(real[p])}" for p in real if p not in tree and "__init__" not in p]
    silent = [path for path, description in tree.items() if not description]
    assert not gone, "README's tree names what does not exist:\n" + "\n".join(gone)
    assert not missing, "README's tree does not name:\n" + "\n".join(missing)
    assert not silent, "README's tree says nothing of:\n" + "\n".join(silent)
