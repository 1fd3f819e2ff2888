"""Mixtures visit what their shares say, exactly, over one epoch and over many."""

import json
import pickle

import numpy as np
import pytest

from vlm_jax import config as configs
from vlm_jax.data.records.mixture import Mixture, Part, Records
from vlm_jax.data.records.sources import read_records
from vlm_jax.errors import UserError
from vlm_jax.train.fingerprint import sources_identity
from vlm_jax.train.setup import absolute_paths

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def records(n, name="f"):
    return Records([{"id": f"{name}{i}", "messages": TURNS} for i in range(n)], name, None)


def mixture(*parts):
    return Mixture([Part(f"s{i}", records(n), **share) for i, (n, share) in enumerate(parts)])


def counts(mix, epochs, seed=3, shuffle=True):
    orders = [mix.order(seed, epoch, shuffle) for epoch in epochs]
    return np.bincount(np.concatenate(orders), minlength=len(mix)), [len(o) for o in orders]


def test_one_source_is_permuted_by_seed_and_epoch():
    order = records(50).order(7, 2)
    np.testing.assert_array_equal(order, np.random.default_rng([7, 2]).permutation(50))
    assert order.dtype == np.int64
    np.testing.assert_array_equal(records(5).order(7, 2, shuffle=False), np.arange(5))
    # sources that are visited whole are as one file that holds them all
    np.testing.assert_array_equal(mixture((20, {}), (30, {})).order(7, 2), order)


def test_epochs_say_how_often_each_record_comes():
    mix = mixture((10, {"epochs": 2}), (7, {"epochs": 0.5}), (5, {}), (9, {"epochs": 1.5}))
    for epoch in range(4):
        got, lengths = counts(mix, [epoch])
        assert set(got[:10]) == {2} and set(got[17:22]) == {1}
        assert got[10:17].sum() == [3, 4][epoch % 2] and got[22:].sum() == [13, 14][epoch % 2]
        assert set(got[22:]) <= {1, 2}
        assert lengths == [got.sum()]
    # two halves make a whole: fractions go on where the last epoch stopped
    both, _ = counts(mix, [0, 1])
    assert set(both[10:17]) == {1} and set(both[22:]) == {3}
    tenth = mixture((30, {"epochs": 0.1}), (1, {}))
    assert set(counts(tenth, range(10))[0][:30]) == {1}
    assert not np.array_equal(tenth.order(3, 0), tenth.order(4, 0))
    np.testing.assert_array_equal(tenth.order(3, 5), tenth.order(3, 5))


def test_weights_are_shares_of_an_epoch():
    mix = mixture((100, {"weight": 3}), (20, {"weight": 1}))
    for epoch in range(5):
        got, lengths = counts(mix, [epoch])
        assert lengths == [120] and got[:100].sum() == 90 and got[100:].sum() == 30
        assert got[:100].max() <= 2 and set(got[100:]) <= {1, 2}
    assert set(counts(mix, range(10))[0][:100]) == {9} and set(counts(mix, range(2))[0][100:]) == {
        3
    }
    thirds = mixture((4, {"weight": 1}), (3, {"weight": 1}), (3, {"weight": 1}))
    assert counts(thirds, [0])[1] == [10]


def test_without_shuffling_sources_come_in_their_order():
    mix = mixture((4, {"epochs": 1.5}), (2, {}))
    assert mix.order(0, 0, shuffle=False).tolist() == [0, 1, 2, 3, 0, 1, 4, 5]
    assert mix.order(0, 1, shuffle=False).tolist() == [2, 3, 0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([(2, {"weight": 1, "epochs": 1})], "'s0' has a weight and epochs"),
        ([(2, {"weight": 1}), (2, {})], "'s0' has a weight and 's1' has none"),
        ([(2, {"weight": 1}), (2, {"epochs": 2})], "'s0' has a weight and 's1' has none"),
        ([(2, {"weight": 0})], "weight 0; expected a number above 0"),
        ([(2, {"epochs": -1})], "epochs -1"),
        (
            [(2, {"epochs": 0.3}), (1, {"epochs": 0.5})],
            r"not one whole record.*epochs \[0.3, 0.5\]",
        ),
        ([(2, {"epochs": float("nan")})], "epochs nan"),
    ],
)
def test_shares_that_do_not_go_together_are_refused(parts, message):
    with pytest.raises(UserError, match=message):
        mixture(*parts)


@pytest.fixture
def files(tmp_path):
    for name, rows in (("a", 3), ("b", 2)):
        lines = [json.dumps({"id": i, "q": "?", "messages": TURNS}) for i in range(rows)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    (tmp_path / "pictures").mkdir()
    return tmp_path


def test_a_list_of_files_is_one_sequence(files):
    a, b = str(files / "a.jsonl"), str(files / "b.jsonl")
    mix = read_records([a, {"path": b, "image_folder": str(files / "pictures")}, a])
    assert len(mix) == 8
    assert [r["id"] for r in mix] == ["a:0", "a:1", "a:2", "b:0", "b:1", "a#2:0", "a#2:1", "a#2:2"]
    assert [r["index"] for r in mix[2:5]] == [2, 0, 1] and mix[-1]["id"] == "a#2:2"
    assert mix[0]["folder"] == str(files) and mix[3]["folder"] == str(files / "pictures")
    assert mix.place(4) == f"'{b}', line 2"
    again = pickle.loads(pickle.dumps(mix))
    assert again[4] == mix[4] and again.fingerprint == mix.fingerprint
    assert mix.fingerprint != read_records([b, a, a]).fingerprint
    (files / "b.jsonl").write_text('{"messages": []}\n{')
    mix = read_records([a, b])
    with pytest.raises(UserError, match=rf"Record 0 of '{b}', line 1 holds no list"):
        mix[3]
    with pytest.raises(UserError, match=rf"Record 1 of '{b}', line 2, is not valid JSON"):
        mix[4]
    assert type(read_records([a])) is Records  # one file is no mixture


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"wieght": 1}, "'wieght' .did you mean 'weight'"),
        ({"weight": "much"}, "weight 'much'; expected a number"),
        ({"columns": {"questoin": "q"}}, "'questoin' .did you mean 'question'"),
        ({"split": "train"}, "has no splits"),
        ({"path": "none.json"}, "no data file"),
    ],
)
def test_bad_sources_say_what_is_wrong(files, source, message):
    with pytest.raises(UserError, match=message):
        read_records([{"path": str(files / "a.jsonl"), **source}])


def test_a_config_takes_a_list(files):
    a, b = str(files / "a.jsonl"), str(files / "b.jsonl")
    listed = [{"path": a, "weight": 2, "columns": {"question": "q"}}, {"path": b, "weight": 1}]
    file = files / "c.yaml"
    file.write_text(json.dumps({"data": {"train_file": listed, "columns": {"image": "img"}}}))
    python = files / "c.py"
    python.write_text(
        f"from vlm_jax.config import get_config as base\ndef get_config():\n    c = base()\n"
        f"    c.data.train_file = {listed}\n    c.data.columns = {{'image': 'img'}}\n    return c\n"
    )
    for path in (file, python):
        config = configs.load(path)
        assert configs.plain(config.data.train_file) == listed
        tree = configs.to_dict(config)
        assert tree["data"]["train_file"] == listed
        (files / "again.json").write_text(json.dumps(tree))
        assert configs.to_dict(configs.load(files / "again.json")) == tree
        assert configs.plain(config.data.columns) == {"image": "img"}
    said = f"data.train_file=[{{path: {a}, epochs: 2}}, {b}]"
    config = configs.load(None, [said])
    assert configs.plain(config.data.train_file) == [{"path": a, "epochs": 2}, b]
    assert absolute_paths(config)["data"]["train_file"] == [{"path": a, "epochs": 2}, b]
    one, two = sources_identity(configs.plain(config.data.train_file))
    assert one["epochs"] == 2 and one["path"] and two and one["path"] != two
    assert configs.load(None, [f"data.train_file={a}"]).data.train_file == a
    for bad in ("[", "[1]", "[{weight: 1}]", "[]"):
        with pytest.raises(UserError, match="data.train_file"):
            configs.load(None, [f"data.train_file={bad}"])
    with pytest.raises(UserError, match="our names of columns"):
        configs.load(None, ["data.columns=x"])
