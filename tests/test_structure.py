"""The import direction: a file imports only from lower levels of the table."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "vlm_jax"

# Lowest first; a module may import from strictly lower rows and from its own folder's files that
# stand in the same row or lower. docs/DESIGN.md explains the order.
LEVELS = [
    ("errors", "values", "config_tables", "from_pytorch"),
    ("trees", "config_files", "config_checks", "cli_options", "hardware", "processes"),
    ("config", "weights", "batch", "positions", "together"),
    ("layers",),
    ("models", "methods"),
    ("model", "nf4"),
    ("names", "sharding", "vocabulary"),
    ("quantization", "targets", "starts"),
    ("saved",),
    ("adapters",),
    ("lora",),
    ("hub", "data", "generation"),
    ("evals", "survey", "linen"),
    ("train",),
    ("plan",),
    ("preview", "recommend"),
    ("cli",),
]
FREE = {"__init__", "__main__"}  # they only name things, lazily


def level(module: str) -> int:
    top = module.split(".")[0]
    found = [i for i, names in enumerate(LEVELS) if top in names]
    assert found, f"vlm_jax/{module} is in no level: add it to LEVELS and docs/DESIGN.md"
    return found[0]


def imports(path: Path) -> set[str]:
    """Return the vlm_jax modules a file imports when it is imported (not inside functions)."""
    tree = ast.parse(path.read_text())
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in inside:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vlm_jax"):
            if node.module == "vlm_jax":
                found |= {alias.name for alias in node.names}
            else:
                found.add(node.module.removeprefix("vlm_jax."))
        if isinstance(node, ast.Import):
            found |= {
                alias.name.removeprefix("vlm_jax.")
                for alias in node.names
                if alias.name.startswith("vlm_jax.")
            }
    return found


def test_imports_point_downward():
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if module in FREE:
            continue
        for other in imports(path):
            same_folder = module.split(".")[0] == other.split(".")[0] and "." in module
            if not same_folder and level(other) >= level(module):
                wrong.append(f"{module} imports {other}")
    assert not wrong, wrong


def test_no_torch_at_run_time():
    banned = {"torch", "peft", "bitsandbytes", "trl"}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not {name.split(".")[0] for name in names} & banned, path
