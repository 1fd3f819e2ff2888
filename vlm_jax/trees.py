"""Paths over parameter trees, the one regex-table matcher, split and join.

A parameter tree is a nested dict whose leaves are arrays or weight formats such as `NF4`. A path
is its keys joined by "/". A table is an ordered sequence of `(regex, value)` rows: a regex must
match a whole path, and the first row that does gives the value.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from vlm_jax.errors import UserError, explained
from vlm_jax.files.limits import check_patterns

Tree = Mapping[str, Any]
Table = Sequence[tuple[str, Any]]


def flatten(tree: Tree, prefix: str = "") -> dict[str, Any]:
    """Return `{path: leaf}` in the tree's own order; whatever is not a mapping is a leaf."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        flat |= flatten(value, f"{path}/") if isinstance(value, Mapping) else {path: value}
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
    used: set[int] = set()
    for path in paths:
        hits = [i for i, (pattern, _) in enumerate(rows) if pattern.fullmatch(path)]
        if not hits:
            raise UserError(
                f"No row of the {what} matches the parameter '{path}'. Its rows are "
                f"{[pattern for pattern, _ in table]}, each matched against the whole path. "
                f"Add a row for it, for example a last row '.*'."
            )
        used.update(hits)
        result[path] = rows[hits[0]][1]
    if unused == "raise":
        for i, (pattern, _) in enumerate(table):
            if i not in used:
                raise UserError(
                    f"The row {pattern!r} of the {what} matches no parameter. A row must match "
                    f"the whole path of at least one; paths look like "
                    f"{', '.join(repr(p) for p in paths[:: max(1, len(paths) // 3)][:3])}. "
                    f"Correct the row or delete it."
                )
    return result


FROZEN = "frozen"
_NUMBERS = r"\s*[\d.e+-]+(?:\*\d+)?\s*"
_GROUP = re.compile(
    rf"(frozen|full|lora|adapter)(?:\(([^;)]*)(?:; layers ({_NUMBERS}(?:,{_NUMBERS})*))?\))?"
)


@dataclasses.dataclass(frozen=True)
class Group:
    """How leaves train: a training table's "frozen", "full", "lora(2.0)" as a value.

    Its string is what a table says, as "full(0.1; layers 0*8, 1*24)"; `Group.parse` reads it.

    kind: "frozen", "full", "lora" or "adapter".
    scale: of the learning rate, above 0.
    layers: the factor of the learning rate of each layer of a stack, lowest first, where layers
        differ; those of factor 0 are frozen.
    """

    kind: str = FROZEN
    scale: float = 1.0
    layers: tuple[float, ...] | None = None

    @classmethod
    def parse(cls, text: str, row: str = "") -> "Group":
        """Return the group of its string; raise `UserError` for anything else, naming its row."""
        found = _GROUP.fullmatch(str(text))
        with explained(
            (AssertionError, ValueError),
            lambda _: (
                f"The training table has the group {text!r}; expected 'frozen', 'full', 'lora', "
                f"'adapter', or one of the last three with a positive learning-rate scale, as in "
                f"'full(0.1)', and maybe a factor for each layer of a stack, as in "
                f"'full(0.1; layers 0*8, 1*24)'.{row and f' It stands in the row {row!r}.'}"
            ),
        ):
            assert found is not None
            kind, scale, listed = found.groups()
            assert kind != FROZEN or scale is None
            runs = [run.partition("*") for run in listed.split(",")] if listed else []
            factors = [float(value) for value, _, count in runs for _ in range(int(count or 1))]
            group = cls(kind, 1.0 if scale is None else float(scale), tuple(factors) or None)
            assert group.scale > 0 and math.isfinite(group.scale)
        return group

    def __str__(self) -> str:
        if self.layers is not None:
            runs = [(factor, len(list(same))) for factor, same in itertools.groupby(self.layers)]
            words = (f"{value:g}*{count}" if count > 1 else f"{value:g}" for value, count in runs)
            return f"{self.kind}({self.scale!r}; layers {', '.join(words)})"
        return self.kind if self.scale == 1 else f"{self.kind}({self.scale!r})"

    @property
    def frozen(self) -> bool:
        return self.kind == FROZEN


def groups_of(table: Table, paths: Iterable[str], unused: str = "raise") -> dict[str, Group]:
    """Return `{path: Group}` by a training table of (regex, string) rows, as `match` does.

    Raises `UserError` for a string that is no group, naming its row.
    """
    rows = [(pattern, Group.parse(text, row=pattern)) for pattern, text in table]
    return match(rows, paths, "training table", unused)


def split(params: Tree, table: Table) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return `(trainable, frozen)`: two trees that together hold every leaf of `params` once.

    `table` is ordered `(regex, group)` rows; the group "frozen" goes to the second tree, "full",
    "lora" and "adapter", with or without a scale as in "full(0.1)", to the first. Leaves are not
    copied. `join` undoes it. Raises `UserError` for an unknown group, naming its row, and as
    `match` does.
    """
    flat = flatten(params)
    groups = groups_of(table, flat)
    trainable = {path: leaf for path, leaf in flat.items() if not groups[path].frozen}
    frozen = {path: leaf for path, leaf in flat.items() if groups[path].frozen}
    return unflatten(trainable), unflatten(frozen)


def join(trainable: Tree, frozen: Tree) -> dict[str, Any]:
    """Return the one tree that `split` divided. Raises `ValueError` where both hold a path."""
    left, right = flatten(trainable), flatten(frozen)
    both = left.keys() & right.keys()
    if both:
        raise ValueError(f"Both trees hold {sorted(both)[:3]}: a parameter trains or it does not.")
    return unflatten({**right, **left})
