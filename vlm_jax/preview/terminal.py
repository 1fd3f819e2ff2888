"""A preview in the terminal: the page's content, in colour where supported."""

from rich.console import Console
from rich.text import Text

from vlm_jax.errors import marked
from vlm_jax.preview.collect import Preview, Row, first_messages
from vlm_jax.preview.example import Example, Piece
from vlm_jax.preview.page import visible, weight

STYLES = {
    "text": "",
    "loss": "black on green",
    "image": "white on blue",
    "video": "white on magenta",
    "padding": "dim",
}
BLOCKS = "▁▂▃▄▅▆▇█"
# Where there is no colour, brackets say what carries loss.
OPEN, CLOSE = "⟦", "⟧"


def show(preview: Preview, console: Console | None = None) -> None:
    """Print settings, statistics and examples."""
    console = console or Console(highlight=False)
    colour = console.color_system is not None

    def line(text: Text | str = "", style: str = "") -> None:
        # Never markup: data may hold "[b]".
        text = Text(marked(text)) if isinstance(text, str) else text
        console.print(text, style=style, soft_wrap=not console.is_terminal)

    how = "in evaluation order" if preview.split == "eval" else "in training order"
    count = len(preview.examples)
    first = "first example" if count == 1 else f"first {count} examples"
    line(f"{preview.data}, the {first} {how}", "bold")
    line(f"encoded for {preview.model}")
    line()
    for setting in preview.settings:
        line(f"{setting.key:16} {setting.value}" + (f"  ({setting.note})" if setting.note else ""))
    line()
    for text in statistics(preview):
        line(text)
    for reason, count, message in first_messages(preview.report):
        line(f"left out {count} ({reason}): {message}", "red")
    for message in preview.damaged:
        line(f"its place stays empty: {message}", "red")
    line()
    for one in preview.histograms:
        most = max(count for _, _, count in one.bars)
        bars = "".join(BLOCKS[-(-7 * count // most)] if count else " " for _, _, count in one.bars)
        limit = "" if one.limit is None else f", limit {one.limit:,}"
        line(
            f"{one.name:16} {one.bars[0][0]:,} |{bars}| {one.bars[-1][1]:,}  median "
            f"{one.median:,}, 99 % <= {one.high:,}, largest {one.largest:,}{limit}"
        )
    line()
    legend = Text("read only ")
    for kind, name in (("loss", "carries loss"), ("image", "image"), ("video", "video")):
        legend.append(_marked(name, kind, colour), STYLES[kind] if colour else "")
        legend.append(" ")
    line(legend)
    for row in preview.rows:
        line()
        _show_row(line, row, colour)


def statistics(preview: Preview) -> list[str]:
    """Return the figures of a preview, as sentences."""
    report = preview.report
    about = "" if preview.exact else "about "
    steps = f"{preview.total_steps or '?'} steps"
    if report["steps_per_epoch"] is None:
        steps += " in all, from a stream: training.max_steps"
    elif preview.split == "train":
        steps += f" in all, {about}{report['steps_per_epoch']:,} an epoch"
    return [
        f"{report['records']:,} records, {report['measured']:,} measured, "
        f"{report['examples']:,} kept, {sum(report['dropped'].values()):,} left out, "
        f"{report['shrunk']:,} with smaller images, {report['turns_dropped']:,} with fewer turns",
        f"{100 * report['answer_tokens'] / report['tokens']:.1f} % of tokens carry loss; "
        f"padding is {100 * report['padding']:.1f} % of tokens and "
        f"{100 * report['patch_padding']:.1f} % of patches",
        steps,
    ]


def _show_row(line, row: Row, colour: bool) -> None:
    shown = f", {len(row.examples)} shown" if len(row.examples) < row.segments else ""
    line(
        f"── step {row.step}, row {row.number}: {row.tokens:,} of {row.shape[0]:,} tokens, "
        f"{row.patches:,} of {row.shape[1]:,} patches, "
        f"{row.segments} {'example' if row.segments == 1 else 'examples'}{shown}",
        "bold",
    )
    for example in row.examples:
        _show_example(line, example, colour)
    padding = row.shape[0] - row.tokens
    if padding and not shown:
        line(f"padding × {padding:,}", STYLES["padding"])


def _show_example(line, example: Example, colour: bool) -> None:
    line(
        f"{example.id}  {example.place}  {example.tokens:,} tokens, "
        f"{example.loss_tokens:,} with loss, {example.patches:,} patches",
        "bold",
    )
    for note in example.notes:
        line(note, "yellow")
    for number, picture in enumerate(example.pictures, start=1):
        start = "" if picture.original is None else "{1} × {0} → ".format(*picture.original)
        frames = f", {len(picture.frames)} frames" if picture.kind == "video" else ""
        line(
            f"{picture.kind} {number}: {start}{picture.width} × {picture.height} pixels{frames}, "
            f"{picture.tokens:,} tokens of {picture.cell} × {picture.cell}",
            "blue" if picture.kind == "image" else "magenta",
        )
    line(tokens(example.pieces, colour))
    for target in example.targets:
        weighted = "" if target.weight == 1 else f", weight {target.weight:g}"
        line(f"target, {target.tokens} tokens{weighted}: {visible(target.text).strip()}")
    line("positions: " + "; ".join(f"{which}: {where}" for which, where in example.runs), "dim")


def tokens(pieces: list[Piece], colour: bool) -> Text:
    """Return an example's tokens; without colours, loss stands in brackets, run by run."""
    text = Text()
    for i, piece in enumerate(pieces):
        written = visible(piece.text) + (f" × {piece.count:,}" if piece.number else "")
        if colour:
            begins = i == 0 or pieces[i - 1].weight != piece.weight
            text.append((weight(piece) if begins else "") + written, STYLES[piece.kind])
            continue
        before = i > 0 and (pieces[i - 1].kind, pieces[i - 1].weight) == (piece.kind, piece.weight)
        after = i + 1 < len(pieces) and (
            (pieces[i + 1].kind, pieces[i + 1].weight) == (piece.kind, piece.weight)
        )
        if piece.kind == "loss":
            written = ("" if before else OPEN) + written
            if not after:
                body = written.removesuffix("\n")
                written = f"{body}{CLOSE}{weight(piece)}{written[len(body) :]}"
        elif piece.number:
            written = f"[{written}]"
        text.append(written)
    return text


def _marked(name: str, kind: str, colour: bool) -> str:
    if colour:
        return name
    return f"{OPEN}{name}{CLOSE}" if kind == "loss" else f"[{name}]"
