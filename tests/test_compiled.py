"""Compiled programs that are kept from one run to the next."""

import os
import stat

import jax
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from runs import make_base, make_data, write_recipe

from vlm_jax import UserError
from vlm_jax.cli import main
from vlm_jax.config.specs import RunSpec
from vlm_jax.files.compiled import KEY, directory
from vlm_jax.train import compile as compiling
from vlm_jax.train.fingerprint import settings_of

SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_enable_compilation_cache",
    "jax_persistent_cache_min_compile_time_secs",
)


@pytest.fixture
def caches(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    return tmp_path / "caches" / "vlm_jax" / "compiled"


@pytest.fixture
def restored():
    """Leave JAX's settings as they were."""
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    reset_cache()


def test_a_directory_of_the_users_own_on_accelerators(caches):
    assert directory("auto", "cpu") is directory(None, "tpu") is None
    assert not caches.exists()
    assert directory("auto", "tpu") == directory("auto", "gpu") == str(caches)
    assert stat.S_IMODE(caches.stat().st_mode) == 0o700
    assert directory("gs://bucket/compiled", "cpu") == "gs://bucket/compiled"


def test_a_home_without_a_setting_of_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for given in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", given)
        assert directory("auto", "tpu") == str(tmp_path / ".cache/vlm_jax/compiled")


def test_what_others_may_write_to_is_refused(tmp_path, monkeypatch):
    place = tmp_path / "open"
    place.mkdir()
    place.chmod(0o777)
    with pytest.raises(UserError, match="every user may write"):
        directory(str(place), "cpu")
    place.chmod(0o755)
    assert directory(str(place), "cpu") == str(place)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="compilation_cache_dir"):
        directory(str(tmp_path / "file"), "cpu")
    with pytest.raises(UserError, match="kept in '~nobody-at-all/x': "):
        directory("~nobody-at-all/x", "cpu")
    monkeypatch.setattr(os, "getuid", lambda: place.stat().st_uid + 1)
    with pytest.raises(UserError, match="belongs to another user"):
        directory(str(place), "cpu")


def test_a_run_goes_on_where_its_usual_place_is_refused(restored, caches, monkeypatch):
    caches.mkdir(parents=True)
    caches.chmod(0o777)
    jax.config.update("jax_compilation_cache_dir", None)
    assert "not kept" in compiling.keep_programs("auto", "tpu")
    assert jax.config.jax_compilation_cache_dir is None


def test_each_process_may_have_a_place_of_its_own():
    assert KEY not in settings_of(RunSpec()) and "training.remat_policy" in settings_of(RunSpec())


def test_what_jax_was_given_already_stays(restored, caches):
    given = jax.config.jax_compilation_cache_dir  # of all tests
    assert given and compiling.keep_programs("auto", "tpu") is None
    assert jax.config.jax_compilation_cache_dir == given and not caches.exists()


def test_a_run_keeps_its_programs_up_to_a_size(restored, tmp_path, monkeypatch, capsys):
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    monkeypatch.setattr(compiling, "MOST_KEPT", 1 << 22)
    place, base = tmp_path / "programs", make_base(tmp_path / "base")
    recipe = write_recipe(tmp_path, base, make_data(tmp_path / "data"), "training.max_steps=1")
    setting = f"--config.training.compilation_cache_dir={place}"
    assert main(["train", "--config", str(recipe), setting]) == 0
    assert f"compiled programs: kept in '{place}'" in capsys.readouterr().out
    files = list(place.glob("*-cache"))
    assert any("jit_step" in file.name for file in files)
    assert sum(file.stat().st_size for file in files) <= 1 << 22


def looked_up(times: int) -> list[str]:
    """Return what JAX says of the cache as it compiles one program so many times."""
    seen: list[str] = []

    def note(event: str, **_: object) -> None:
        seen.append(event.rpartition("/")[2])

    jax.monitoring.register_event_listener(note)
    for _ in range(times):
        jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((3,), "int32")).compile()
    jax.monitoring.unregister_event_listener(note)
    return [one for one in seen if one in ("cache_hits", "cache_misses")]


def test_programs_that_are_kept_are_taken_from_there(restored, tmp_path):
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    (tmp_path / "of_another_run-cache").write_bytes(b"kept without a bound, or killed at it")
    compiling.keep_programs(str(tmp_path), "cpu")
    assert looked_up(2) == ["cache_misses", "cache_hits"]


def test_none_keeps_nothing_and_a_later_run_may_keep_again(restored, tmp_path):
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compiling.keep_programs(str(tmp_path), "cpu")
    looked_up(1)
    assert compiling.keep_programs(None, "cpu") is None and looked_up(1) == []
    compiling.keep_programs(str(tmp_path), "cpu")
    assert looked_up(1) == ["cache_hits"]


def test_a_cache_that_is_switched_off_stays_so(restored, caches):
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", False)
    assert compiling.keep_programs("auto", "tpu") is None and not caches.exists()
