"""Paths over parameter trees, the one regex-table matcher, split and join.

A parameter tree is a nested dict whose leaves are arrays or weight formats such as `NF4`. A path
is its keys joined by "/". A table is an ordered sequence of `(regex, value)` rows: a regex must
match a whole path, and the first row that does gives the value.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from vlm_jax.errors import UserError
from vlm_jax.files.limits import check_patterns

Tree = Mapping[str, Any]
Table = Sequence[tuple[str, Any]]


def flatten(tree: Tree, prefix: str = "") -> dict[str, Any]:
    """Return `{path: leaf}` in the tree's own order; whatever is not a mapping is a leaf."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{path}/"))
        else:
            flat[path] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return the nested dict that `flatten` came from."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def map_leaves(function: Callable[[str, Any], Any], tree: Tree) -> dict[str, Any]:
    """Return the tree with each leaf replaced by `function(path, leaf)`."""
    return unflatten({path: function(path, leaf) for path, leaf in flatten(tree).items()})


def match(table: Table, paths: Iterable[str], what: str, unused: str = "raise") -> dict[str, Any]:
    """Return `{path: value}`, the value of the first row whose regex matches the whole path.

    `what` names the table in errors. Raises `UserError` for a path no row matches and, unless
    `unused` is "allow", for a row whose regex matches no path at all: a typo in a table must not
    silently freeze, replicate or skip anything.
    """
    paths = list(paths)
    check_patterns([pattern for pattern, _ in table], paths, f"row of the {what}")
    rows = [(re.compile(pattern), value) for pattern, value in table]
    result: dict[str, Any] = {}
    used = [False] * len(rows)
    for path in paths:
        hits = [i for i, (pattern, _) in enumerate(rows) if pattern.fullmatch(path)]
        if not hits:
            raise UserError(
                f"No row of the {what} matches the parameter '{path}'. Its rows are "
                f"{[pattern for pattern, _ in table]}, each matched against the whole path. "
                f"Add a row for it, for example a last row '.*'."
            )
        for i in hits:
            used[i] = True
        result[path] = rows[hits[0]][1]
    if unused == "raise":
        for (pattern, _), hit in zip(table, used, strict=True):
            if not hit:
                raise UserError(
                    f"The row {pattern!r} of the {what} matches no parameter. A row must match "
                    f"the whole path of at least one; paths look like "
                    f"{', '.join(repr(p) for p in paths[:: max(1, len(paths) // 3)][:3])}. "
                    f"Correct the row or delete it."
                )
    return result


FROZEN = "frozen"


def layer_words(factors: Iterable[float]) -> str:
    """Return the numbers of a stack's layers, lowest first, as a group writes them: "0*8, 1*24"."""
    runs = [(value, len(list(same))) for value, same in itertools.groupby(factors)]
    return ", ".join(f"{value:g}*{count}" if count > 1 else f"{value:g}" for value, count in runs)


def layer_factors(group: str) -> tuple[float, ...] | None:
    """Return what the rate of each layer is multiplied by, of "full(0.1; layers 0*8, 1*24)".

    Layers of factor 0 are frozen. None: the group has no such numbers.
    """
    parse_group(group)
    _, words, listed = group.rstrip(")").partition("; layers ")
    parts = [part.partition("*") for part in listed.split(",")] if words else []
    numbers = [float(value) for value, _, count in parts for _ in range(int(count or 1))]
    return tuple(numbers) or None


def parse_group(group: str) -> tuple[str, float]:
    """Return (method, learning-rate scale) of "frozen", "full", "lora", "adapter", "full(0.1)".

    The latter two may have numbers of layers too, see `layer_factors`. Raises `UserError` for
    anything else.
    """
    number = r"\s*[\d.e+-]+(?:\*\d+)?\s*"
    layers = rf"(?:; layers {number}(?:,{number})*)?"
    found = re.fullmatch(rf"(frozen|full|lora|adapter)(?:\(([^;)]*){layers}\))?", str(group))
    try:
        assert found is not None
        method, scale = found[1], 1.0 if found[2] is None else float(found[2])
        assert method != FROZEN or found[2] is None
        assert scale > 0 and math.isfinite(scale)
    except (AssertionError, ValueError):
        raise UserError(
            f"The training table has the group {group!r}; expected 'frozen', 'full', 'lora', "
            f"'adapter', or one of the last three with a positive learning-rate scale, as in "
            f"'full(0.1)', and maybe a factor for each layer of a stack, as in "
            f"'full(0.1; layers 0*8, 1*24)'."
        ) from None
    return method, scale


def split(params: Tree, table: Table) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return `(trainable, frozen)`: two trees that together hold every leaf of `params` once.

    `table` is ordered `(regex, group)` rows; the group "frozen" goes to the second tree, "full",
    "lora" and "adapter", with or without a scale as in "full(0.1)", to the first. Leaves are not
    copied. `join` undoes it. Raises `UserError` for an unknown group, naming its row, and as
    `match` does.
    """
    for pattern, group in table:
        try:
            parse_group(group)
        except UserError as error:
            raise UserError(f"{error} It stands in the row {pattern!r}.") from None
    groups = match(table, flatten(params), "training table")
    flat = flatten(params)
    trainable = {path: leaf for path, leaf in flat.items() if groups[path] != FROZEN}
    frozen = {path: leaf for path, leaf in flat.items() if groups[path] == FROZEN}
    return unflatten(trainable), unflatten(frozen)


def join(trainable: Tree, frozen: Tree) -> dict[str, Any]:
    """Return the one tree that `split` divided. Raises `ValueError` where both hold a path."""
    left, right = flatten(trainable), flatten(frozen)
    both = left.keys() & right.keys()
    if both:
        raise ValueError(f"Both trees hold {sorted(both)[:3]}: a parameter trains or it does not.")
    return unflatten({**right, **left})
