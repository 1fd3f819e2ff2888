"""The preview: what is shown are the arrays of the batch that training sees."""

import html
import io
import json
import re

import numpy as np
import pytest
import yaml
from browser import browser
from checkpoint_files import VICUNA_MARKED, llava_files, qwen2_vl_files, write_image
from PIL import Image
from rich.console import Console

from vlm_jax import UserError, config
from vlm_jax.cli import main
from vlm_jax.data import Encoder, Pipeline, read_records
from vlm_jax.data.media.images import read_image
from vlm_jax.data.media.processors import look_up, smart_resize, value_table
from vlm_jax.hub.load import SETTINGS
from vlm_jax.preview import page, terminal
from vlm_jax.preview.collect import collect, histogram, preview, shards_of
from vlm_jax.preview.example import to_bytes

EVIL = "<script>alert('x')</script> & <b>bold</b> [red]"


def turns(question, *answers, **more):
    said = [{"role": "user", "content": question}]
    for number, answer in enumerate(answers):
        said += [{"role": "user", "content": "And?"}] if number else []
        said.append({"role": "assistant", "content": answer})
    return {"messages": said, **more}


def make_rows(folder):
    """Write records: text with markup, one and two images, a film, weights, one that is broken."""
    rows = []
    for i in range(30):
        if i % 5 == 0:
            rows.append(turns(f"{EVIL} {i} é日本🙂", "It is red.", f"Box {EVIL}", id=f"<i>{i}"))
        elif i % 5 == 1:
            names = [write_image(folder / f"{i}-{k}.png", 20 + i, 33, i + k).name for k in (0, 1)]
            row = turns("<image><image>\nWhat color?", "The ball is red.", id=f"two{i}")
            row["messages"][-1]["weight"] = 0.5
            rows.append({**row, "images": names})
        elif i % 5 == 2:
            names = [write_image(folder / f"{i}-{k}.png", 16, 24, i + k).name for k in range(3)]
            rows.append(turns("<video>\nWhat is it?", "A ball.", id=f"film{i}", video=names))
        else:
            name = write_image(folder / f"{i}.png", 9 + i, 40, i).name
            rows.append(turns("What color is the ball?", "red", id=f"one{i}", image=name))
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """(checkpoint directory, data file)"""
    place = tmp_path_factory.mktemp("preview")
    (place / "data").mkdir()
    return qwen2_vl_files(place / "base"), make_rows(place / "data")


@pytest.fixture(scope="module")
def packed(qwen):
    base, file = qwen
    encoder = Encoder(base, max_seq_length=200)
    return Pipeline(encoder, file, rows=2, packing=True, max_length=200, shuffle=True)


def first_rows(pipeline, count):
    """Return (batch, row) of training's first rows."""
    for batch, _, _ in pipeline.batches():
        for row in range(pipeline.rows):
            yield batch, row
            count -= 1
            if count == 0:
                return


def test_rows_are_those_of_training_and_colours_their_weights(packed):
    seen = collect(packed, 12)
    assert len(seen.examples) == 12
    assert any(row.segments > 1 for row in seen.rows)
    for row, (batch, place) in zip(seen.rows, first_rows(packed, len(seen.rows)), strict=True):
        segments = batch.segments[place]
        assert row.shape == (batch.shape[1], batch.shape[2])
        assert row.tokens == (segments > 0).sum() and row.segments == segments.max()
        assert row.patches == (batch.patch_segments[place] > 0).sum()
        for number, example in enumerate(row.examples, start=1):
            here = np.flatnonzero(segments == number)
            spread = [
                (piece.kind, piece.weight, piece.token)
                for piece in example.pieces
                for _ in range(piece.count)
            ]
            assert len(spread) == len(here) == example.tokens
            # The weight of a token stands where it is predicted: one place before.
            want = np.concatenate([[0], batch.weights[place, here][:-1]])
            np.testing.assert_array_equal([weight for _, weight, _ in spread], want)
            assert batch.weights[place, here[-1]] == 0
            np.testing.assert_array_equal([t for *_, t in spread], batch.tokens[place, here])
            for (kind, weight, _), feature in zip(
                spread, batch.image_index[place, here], strict=True
            ):
                assert (kind in ("image", "video")) == (feature >= 0)
                assert (kind == "loss") == (weight != 0)
    whole = [r for r in seen.rows if len(r.examples) == r.segments]
    for row, (batch, place) in zip(whole, first_rows(packed, len(whole)), strict=False):
        assert sum(e.loss_tokens for e in row.examples) == np.count_nonzero(batch.weights[place])


def test_text_targets_and_positions(packed):
    seen = {example.id: example for example in collect(packed, 30).examples}
    two = seen["two1"]
    assert [(t.text, t.weight) for t in two.targets] == [("The ball is red.<|im_end|>\n", 0.5)]
    chips = [piece for piece in two.pieces if piece.number]
    assert [(c.kind, c.text, c.number) for c in chips] == [
        ("image", "<|image_pad|>", 1),
        ("image", "<|image_pad|>", 2),
    ]
    assert [c.count for c in chips] == [p.tokens for p in two.pictures]
    text = seen["<i>0"]
    assert "".join(piece.text for piece in text.pieces).count(f"{EVIL} 0 é日本🙂") == 1
    assert [t.text for t in text.targets] == [
        "It is red.<|im_end|>\n",
        f"Box {EVIL}<|im_end|>\n",
    ]
    assert text.runs == [(f"0–{text.tokens - 1}", f"0–{text.tokens - 1}")]
    (names, places) = zip(*two.runs, strict=True)
    assert [name.split()[-1] for name in names if "image" in name] == ["image"] * 2
    assert places[1].startswith("t ") and " h " in places[1] and " w " in places[1]
    assert "line 2" in two.place


def test_pictures_are_the_resized_originals(qwen, packed):
    _, file = qwen
    records = {record["id"]: record for record in read_records(file)}
    raw = packed.encoder.image_settings()
    checked = 0
    for example in collect(packed, 30).examples:
        record = records[example.id]
        names = record["images"] or [n for film in record["videos"] for n in film]
        found = [frame for picture in example.pictures for frame in picture.frames]
        assert len(example.pictures) == len(record["images"]) + len(record["videos"])
        found = found[: len(names)]  # a film's last frame is repeated to fill a patch
        for name, frame in zip(names, found, strict=True):
            pixels = read_image(name, file.parent)
            size = smart_resize(*pixels.shape[:2], 8, raw["min_pixels"], raw["max_pixels"])
            if record["images"]:
                resized = Image.fromarray(pixels).resize(size[::-1], Image.BICUBIC)
                np.testing.assert_array_equal(frame, np.asarray(resized))
                checked += 1
            else:
                assert abs(frame.astype(int).mean() - pixels.mean()) < 3
        for picture in example.pictures:
            assert picture.cell == 8 and picture.original is not None
            assert picture.tokens * 4 == picture.patches
    assert checked >= 20


def test_llava_shows_its_own_pixels(tmp_path):
    base = llava_files(tmp_path / "base")
    names = [str(write_image(tmp_path / f"{i}.png", 30, 40, i)) for i in range(3)]
    rows = [turns("<image>\nWhat  color?", "red", image=name) for name in names]
    encoder = Encoder(base, allow_absolute_paths=True, max_seq_length=64)
    seen = collect(Pipeline(encoder, rows, rows=1, packing=True, max_length=64, shuffle=False), 3)
    example = seen.examples[0]
    text = "".join(piece.text for piece in example.pieces)
    assert text.startswith("<s>") and "USER: <image>" in text.replace("  ", " ")
    assert "What  color?" in text  # spaces are kept
    assert example.targets[0].text.endswith("red</s>")
    (picture,) = example.pictures
    assert picture.frames.shape == (1, 16, 16, 3) and picture.cell == 8
    assert picture.tokens == 4 and picture.original == (30, 40)
    raw = encoder.image_settings()
    processor = encoder.media.processor
    (values,) = look_up(processor.table, processor.cut(read_image(rows[0]["image"]))[0])
    assert raw["do_normalize"]
    np.testing.assert_array_equal(
        picture.frames[0], to_bytes(values.transpose(1, 2, 0), value_table(raw))
    )
    assert picture.frames.std() > 30


def test_images_side_by_side_are_told_apart(tmp_path):
    template = VICUNA_MARKED.replace("<image>\n", "<image>")  # nothing between two of them
    base = llava_files(tmp_path / "base", template)
    names = [str(write_image(tmp_path / f"{i}.png", 30, 40, i)) for i in range(2)]
    encoder = Encoder(base, allow_absolute_paths=True)
    rows = [turns("<image><image>What color?", "red", images=names)]
    (example,) = collect(Pipeline(encoder, rows, rows=1)).examples
    chips = [piece for piece in example.pieces if piece.number]
    assert [(chip.number, chip.count) for chip in chips] == [(1, 4), (2, 4)]
    assert chips[1].start == chips[0].start + 4
    one, two = example.pictures
    assert (one.frames != two.frames).any()


def test_every_pixel_value_comes_back():
    raw = {
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.4, 0.5, 0.3],
        "image_std": [0.2, 0.3, 0.25],
    }
    table = value_table(raw)
    np.testing.assert_array_equal(to_bytes(table.T, table), np.arange(256)[:, None].repeat(3, 1))


def test_statistics(packed):
    seen = collect(packed, 3)
    assert seen.report == packed.report and seen.exact
    sizes = packed.measures.sizes(packed.measures.kept(np.arange(30)))
    tokens, patches, loss = seen.histograms
    assert sum(count for *_, count in tokens.bars) == 30
    assert tokens.median == int(np.median(sizes[:, 0])) and tokens.largest == sizes[:, 0].max()
    assert tokens.limit == 200 and patches.limit is None
    for name in ("median", "largest"):
        assert getattr(loss, name) > 0
    one = histogram("x", np.array([7, 7, 7]), None)
    assert one.bars == [(7, 7, 3)]
    spread = histogram("x", np.array([0, 1000]), None)
    assert spread.bars[0][2] == 1 and spread.bars[-1][2] == 1 and len(spread.bars) <= 25


def test_the_page_escapes_what_data_say(packed):
    written = page.render(collect(packed, 30))
    assert "<script" not in written and "<b>bold" not in written and "<i>0" not in written
    assert html.escape("<i>0") in written
    # Nothing is fetched: every source is a data URI.
    sources = re.findall(r"(?:src|href)=\"([^\"]*)\"", written)
    assert sources and all(source.startswith("data:") for source in sources)
    assert "url(" not in written and "@import" not in written


def test_the_terminal_shows_the_same(packed):
    seen = collect(packed, 12)
    text = io.StringIO()
    terminal.show(seen, Console(file=text, width=100))
    plain = text.getvalue()
    assert "\x1b" not in plain and EVIL in plain.replace("↵\n", " ")
    for example in seen.examples:
        assert example.id in plain
    assert "⟧×0.5" in plain and "[<|image_pad|> × " in plain and "positions: " in plain
    text = io.StringIO()
    coloured = Console(file=text, width=100, force_terminal=True, color_system="truecolor")
    terminal.show(seen, coloured)
    assert "\x1b[30;42m" in text.getvalue()


def test_control_characters_are_shown_and_not_obeyed():
    assert page.visible("a\x1b[31m\r\nb\tc\x7f\x9b") == "a␛[31m␍↵\nb⇥\tc␡⟨U+009B⟩"


HIDDEN = "a\u202eb\u200bc\u2066d\ufefff\u00adg\U000e0041h"
MARKED = "a⟨U+202E⟩b⟨U+200B⟩c⟨U+2066⟩d⟨U+FEFF⟩f⟨U+00AD⟩g⟨U+E0041⟩h"


def test_what_nobody_would_see_is_marked(qwen, tmp_path):
    """In the tokens, the target and the names, on the page and in the terminal."""
    row = turns(f"<image>{HIDDEN}\x1b[2J", HIDDEN, id=f"\x1b]0;x\x07{HIDDEN}\ud800")
    row["image"] = np.zeros((16, 16, 3), np.uint8)
    seen = collect(Pipeline(Encoder(qwen[0]), [row], rows=1))
    text = io.StringIO()
    terminal.show(seen, Console(file=text, width=1000))
    written_page, printed = page.render(seen), text.getvalue()
    for written, shown in (
        (written_page, re.sub(r"<[^>]*>", "", written_page)),
        (printed, printed),
    ):
        assert shown.count(MARKED) >= 4 and "␛[2J" in shown and "␛]0;x␇a" in shown
        assert not set(written) & {"\x1b", "\x07", *HIDDEN[1::2]} - set("bcdfgh")
        assert "\ud800" not in written and "⟨U+D800⟩" in written


def test_messages_show_what_data_hide(qwen, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps(turns("<image>", "x", image=f"\x1b[2J{HIDDEN}.png")))
    made = str(write_config(tmp_path, qwen[0], bad))
    assert main(["preview", "--config", made, "--out", str(tmp_path / "p.html")]) == 2
    said = capsys.readouterr().err
    assert f"Image 0 '␛[2J{MARKED}.png'" in said and not set(said) & set("\x1b\u202e\u200b")
    assert str(UserError("a\nb\tc\x1b")) == "a\nb\tc␛"


def test_a_page_is_written_over_with_a_word_and_nothing_else_is(qwen, tmp_path, capsys):
    made, out = write_config(tmp_path, *qwen), tmp_path / "page.html"
    arguments = ["preview", "--config", str(made), "--examples", "1", "--out", str(out)]
    assert main(arguments) == 0
    assert capsys.readouterr().err == f"Wrote 1 examples to '{out}'.\n"
    assert main(arguments) == 0
    assert "in place of the file that was there" in capsys.readouterr().err
    out.write_text("<html>my own</html>")
    assert main(arguments) == 2
    assert "exists, and is not a file of this kind" in capsys.readouterr().err
    assert out.read_text() == "<html>my own</html>"


def write_config(tmp_path, base, file, **more):
    sections = {
        "model": {"name_or_path": str(base)},
        "data": {"train_file": str(file), "eval_file": str(file), "max_seq_length": 200},
        "training": {"per_device_train_batch_size": 2, "num_train_epochs": 3},
        "mesh": {"devices": 1},
    }
    for key, value in more.items():
        section, name = key.split("__")
        sections[section][name] = value
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


def test_the_command(qwen, tmp_path, capsys, monkeypatch):
    made, out = write_config(tmp_path, *qwen), tmp_path / "page.html"
    assert not (qwen[0] / "model.safetensors").exists()  # no weights are needed
    arguments = ["preview", "--config", str(made), "--examples", "5"]
    assert main([*arguments, "--out", str(out)]) == 0
    written = out.read_text()
    assert written.count('class="example"') == 5 and "45 an epoch" not in written
    seen = preview(config.load(made), 5)
    assert seen.total_steps == 3 * 15 and seen.rows_a_step == 2
    assert main([*arguments, "--split", "eval", "--out", str(out)]) == 0
    assert "steps of one evaluation" in out.read_text()
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    assert main([*arguments, "--text", "--config.data.train_on=last"]) == 0
    said = capsys.readouterr().out
    assert "train_on         last" in said and not (tmp_path / "preview.html").exists()


def test_bad_input_is_one_paragraph(qwen, tmp_path, capsys):
    base, file = qwen
    bad = tmp_path / "bad.jsonl"
    bad.write_text(file.read_text() + '{"image": "nowhere.png", "messages": []}\n')
    made, folder = (
        str(write_config(tmp_path, base, file)),
        f"--config.data.image_folder={file.parent}",
    )
    for more, expected in (
        (["--config.data.train_file=nowhere.json"], "nowhere.json"),
        ([f"--config.data.train_file={bad}", folder], "record 30"),
        (["--config.model.name_or_path=./nowhere"], "no checkpoint directory"),
        (["--out", str(tmp_path / "no" / "page.html")], "cannot be written"),
        (["--config.data.eval_file=none", "--split", "eval"], "data.eval_file"),
    ):
        assert main(["preview", "--config", made, "--out", str(tmp_path / "p.html"), *more]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and expected.lower() in said.lower(), said
    assert not (tmp_path / "p.html").exists()


def test_a_mesh_need_not_be_here(qwen, tmp_path):
    made = config.load(write_config(tmp_path, *qwen))
    made = made.having({"mesh.devices": 0, "mesh.data": 4, "mesh.fsdp": 8, "mesh.tensor": 2})
    assert shards_of(made) == 32
    made = made.having({"mesh.devices": 256, "mesh.data": -1})
    assert shards_of(made) == 128
    made = made.having({"mesh.devices": 12})
    with pytest.raises(UserError, match="does not cover 12 devices"):
        shards_of(made)


def test_a_stream(qwen, tmp_path):
    name = write_image(tmp_path / "i.png", 20, 30).name
    rows = [turns("What color?", "red " * (i + 1), id=f"s{i}", image=name) for i in range(6)]
    file = tmp_path / "stream.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = config.load(write_config(tmp_path, qwen[0], file, data__streaming=True))
    seen = preview(made, 4)
    assert seen.total_steps is None and len(seen.examples) == 4
    assert all(example.pictures for example in seen.examples)
    assert "of a stream" in page.render(seen)
    assert any("from a stream" in line for line in terminal.statistics(seen))


def test_no_weights_are_fetched(qwen, monkeypatch):
    import huggingface_hub

    from vlm_jax.hub.load import resolve

    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *a, **k: asked.append(k) or str(qwen[0])
    )
    resolve("some/model", weights=False)
    assert asked[0]["allow_patterns"] == SETTINGS and "*.safetensors" not in SETTINGS


def test_in_a_browser(packed, tmp_path):
    seen = collect(packed, 14)
    file = tmp_path / "page.html"
    file.write_text(page.render(seen), encoding="utf-8")
    shots = {}
    for width in (1100, 400):
        with browser(width) as tab:
            for scheme in ("light", "dark"):
                tab.scheme(scheme)
                tab.open(file)
                found = tab.run(
                    """
                    const seen = e => { const r = e.getBoundingClientRect();
                                        return r.width > 20 && r.height > 20; };
                    const all = [...document.querySelectorAll('article.example')];
                    return {examples: all.filter(seen).length,
                            loss: document.querySelectorAll('.tokens .l').length,
                            said: all.reduce((n, e) => n + Number(e.dataset.lossTokens), 0),
                            images: [...document.images].map(i => i.complete && i.naturalWidth),
                            across: document.documentElement.scrollWidth,
                            width: window.innerWidth,
                            back: getComputedStyle(document.body).backgroundColor};
                    """
                )
                assert found["examples"] == 14
                # Each span counts: what is coloured is the loss of the batch.
                assert found["loss"] == found["said"] == seen.loss_tokens
                assert all(found["images"]) and len(found["images"]) > 5
                assert found["across"] <= found["width"] == width  # nothing sticks out
                shots[width, scheme] = found["back"]
                grid = "getComputedStyle(document.querySelector('.shot svg')).display"
                assert tab.run(f"return {grid}") != "none"
                tab.run("document.querySelector('#show-grid').click()")
                assert tab.run(f"return {grid}") == "none"
            assert tab.console() == []
            assert tab.requests() == [file.resolve().as_uri()] * 2
    assert shots[400, "light"] != shots[400, "dark"]
    whole = [row for row in seen.rows if len(row.examples) == row.segments]
    weights = [batch.weights[row] for batch, row in first_rows(packed, len(whole))]
    counted = sum(int(np.count_nonzero(w)) for w in weights)
    assert sum(e.loss_tokens for row in whole for e in row.examples) == counted
