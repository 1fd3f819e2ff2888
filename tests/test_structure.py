"""The import direction: a file imports only from lower levels of the table, and in no circle.

An import inside a function or under TYPE_CHECKING counts as one at the top does: when it runs is
another matter than what a file must know.
"""

import ast
import re
from pathlib import Path

import pytest

import vlm_jax

PACKAGE = Path(__file__).parents[1] / "vlm_jax"

# Lowest first; a module may import from strictly lower rows and from its own folder's files.
# docs/DESIGN.md explains the order.
LEVELS = [
    ("errors",),
    ("distributed",),
    ("files",),
    ("trees", "config", "hardware"),
    ("weights", "batch", "positions"),
    ("models",),
    ("model", "nf4"),
    ("names", "sharding"),
    ("quantization", "generation"),
    ("adapters",),
    ("data",),
    ("hub",),
    ("evals", "linen"),
    ("train",),
    ("plan",),
    ("preview",),
    ("cli",),
]
ROOT = ""  # vlm_jax/__init__.py, which only names things, lazily
FREE = {ROOT, "__main__"}
FILE = re.compile(r"`([\w./]+/[\w.]+\.py)`")


def modules() -> dict[str, Path]:
    """Return {dotted name below vlm_jax: file}; a folder's name stands for its __init__.py."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts).removesuffix("__init__").removesuffix(".")] = path
    return found


MODULES = modules()


def level(module: str) -> int:
    top = module.split(".")[0]
    found = [i for i, names in enumerate(LEVELS) if top in names]
    assert found, f"vlm_jax/{module} is in no level: add it to LEVELS and docs/DESIGN.md"
    return found[0]


def home(package: str, name: str) -> str:
    """Return the module that `from vlm_jax[.package] import name` reads."""
    module = f"{package}.{name}".removeprefix(".")
    if module in MODULES:
        return module
    return package or vlm_jax._HOMES.get(name, ROOT)


def imports(text: str) -> set[str]:
    """Return the vlm_jax modules that a file's text imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"a relative import: {ast.unparse(node)}"
            top, _, rest = (node.module or "").partition(".")
            if top == "vlm_jax":
                found |= {home(rest, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            names = [alias.name.partition(".") for alias in node.names]
            found |= {rest for top, _, rest in names if top == "vlm_jax"}
    return found


ARROWS = {
    (module, other)
    for module, path in MODULES.items()
    if module not in FREE
    for other in imports(path.read_text()) - {module}
}


def wrong_way(arrow: tuple[str, str]) -> bool:
    module, other = arrow
    if other in FREE or module.split(".")[0] == other.split(".")[0]:
        return False
    return level(other) >= level(module)


def circles(arrows: set[tuple[str, str]]) -> set[str]:
    """Return the modules that stand in or between circles."""
    left = set(arrows)
    while True:
        sources, targets = {a for a, _ in left}, {b for _, b in left}
        kept = {(a, b) for a, b in left if a in targets and b in sources}
        if kept == left:
            return sources | targets
        left = kept


def test_every_import_is_seen():
    text = """
import vlm_jax.trees
from vlm_jax.weights import nf4, dense
from vlm_jax import errors, merge, __version__
if TYPE_CHECKING:
    from vlm_jax.model import Model
def late():
    def later():
        from vlm_jax.hub.base import read
"""
    seen = {"trees", "weights.nf4", "weights", "errors", "linen.adapt", ROOT, "model", "hub.base"}
    assert imports(text) == seen


def test_imports_point_downward():
    upward = sorted(arrow for arrow in ARROWS if wrong_way(arrow))
    assert not upward, f"imports that point upward: {upward}"


def test_no_files_import_one_another_in_a_circle():
    assert circles({("a", "b"), ("b", "c"), ("c", "a"), ("d", "a")}) == {"a", "b", "c"}
    assert not circles({("a", "b"), ("b", "c"), ("a", "c")})
    assert not circles(ARROWS)


def test_the_diagram_in_the_design_is_current(monkeypatch):
    monkeypatch.syspath_prepend(str(PACKAGE.parent / "scripts"))
    import import_diagram

    assert import_diagram.reduced({("a", "b"), ("b", "c"), ("a", "c")}) == {("a", "b"), ("b", "c")}
    assert import_diagram.page() == import_diagram.PAGE.read_text(), (
        "docs/DESIGN.md is out of date: run python scripts/import_diagram.py"
    )


# What a stranger has to look through, in files beside each other, folders, and lines of a file.
MOST = {"": (14, 13), "train": (24, 0), "linen": (8, 0)}
LINES = 400


@pytest.mark.parametrize("folder", MOST)
def test_a_folder_holds_few_things(folder):
    inside = [path for path in (PACKAGE / folder).iterdir() if path.name != "__pycache__"]
    files = [path.name for path in inside if path.suffix == ".py"]
    folders = [path.name for path in inside if path.is_dir()]
    most_files, most_folders = MOST[folder]
    assert len(files) <= most_files, sorted(files)
    assert len(folders) <= most_folders, sorted(folders)


def test_no_file_is_long():
    lengths = {name: path.read_text().count("\n") for name, path in MODULES.items()}
    assert not {name: lines for name, lines in lengths.items() if lines > LINES}


def libraries(path: Path) -> set[str]:
    """Return the top names of all that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return {name.split(".")[0] for name in names}


def test_no_torch_at_run_time():
    banned = {"torch", "peft", "bitsandbytes", "trl"}
    assert not {path for path in MODULES.values() if libraries(path) & banned}


# Host side: what makes batches imports no JAX at any depth, so that workers start without.
WITHOUT_JAX = ("data", "batch", "positions", "files", "config", "errors", "trees")


def test_data_imports_no_jax():
    reached: set[str] = set()
    left = {module for module in MODULES if module.split(".")[0] in WITHOUT_JAX}
    while left:
        reached |= left
        # A module's package is imported with it.
        packages = {module.rpartition(".")[0] for module in left}
        found = {other for module in left for other in imports(MODULES[module].read_text())}
        left = (packages | found) - reached
    assert {"models", "models.family", "models.qwen2_vl", "data.loader"} <= reached
    banned = {"jax", "jaxlib", "flax", "optax", "orbax"}
    assert not {module for module in reached if libraries(MODULES[module]) & banned}


def test_pages_name_files_that_exist():
    roots = (PACKAGE.parent, *(PACKAGE.parent / name for name in ("vlm_jax", "tests", "scripts")))
    pages = [*PACKAGE.parent.glob("*.md"), *PACKAGE.parent.glob("docs/*.md")]
    named = {(page.name, name) for page in pages for name in FILE.findall(page.read_text())}
    gone = [(page, name) for page, name in named if not any((r / name).exists() for r in roots)]
    assert len(named) > 50 and not gone
