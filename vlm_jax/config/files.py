"""Config files as trees of sections: YAML, JSON, and Python with get_config()."""

import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from vlm_jax.config.parse import TREE
from vlm_jax.errors import UserError, explained
from vlm_jax.files.limits import CONFIG_BYTES, parse_json, parse_yaml, read_text


def read_file(path: str | Path) -> tuple[Path, Mapping[str, Any]]:
    """Return a config file, without the argument of "file.py:arg", and the sections in it.

    Raises `UserError` where it is not there, is of no kind that is known, or cannot be read.
    """
    text, _, argument = str(path).partition(".py:")
    file = Path(f"{text}.py" if argument else text).expanduser()
    if not file.is_file():
        raise UserError(
            f"There is no config file '{file}'. Expected a Python file with get_config() or a "
            f"YAML file; ready ones are in configs/."
        )
    if file.suffix == ".py":
        return file, _read_python(file, argument or None)
    if file.suffix in (".yaml", ".yml", ".json"):
        return file, _read_text(file)
    raise UserError(f"The config file '{file}' must end in .py, .yaml, .yml or .json.")


def _read_text(path: Path) -> Mapping[str, Any]:
    """Return the sections of a YAML or JSON file."""
    kind = "JSON" if path.suffix == ".json" else "YAML"
    with explained(
        (yaml.YAMLError, ValueError, OSError),
        lambda error: f"'{path}' is not valid {kind}: {error}",
    ):
        text = read_text(path, CONFIG_BYTES, "a config")
        tree = parse_json(text, path) if kind == "JSON" else parse_yaml(text, path)
    if not isinstance(tree, Mapping):
        raise UserError(f"'{path}' holds no sections; expected 'model:', 'lora:', 'training:' ...")
    return tree


def _read_python(path: Path, argument: str | None) -> Mapping[str, Any]:
    try:
        get_config = runpy.run_path(str(path)).get("get_config")
        if get_config is None:
            raise UserError(f"'{path}' defines no function get_config().")
        tree = get_config() if argument is None else get_config(argument)
    except UserError:
        raise
    except Exception as error:  # it is the user's own code; ml_collections names the nearest key
        raise UserError(
            f"The config file '{path}' raised {type(error).__name__}: {error}"
        ) from error
    if not isinstance(tree, TREE):
        raise UserError(
            f"get_config() in '{path}' returned {type(tree).__name__}; expected the config: a "
            f"ConfigDict or a dict of sections."
        )
    return tree
