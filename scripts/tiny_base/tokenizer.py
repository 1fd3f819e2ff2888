"""Trains the tiny base's byte-level BPE tokenizer, with Qwen2-VL's special tokens and template."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# Qwen2's split of text into words: digits one by one, a space belongs to the word after it.
WORD = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
VOCABULARY = 1280
BOILERPLATE = "system\nYou are a helpful assistant.\nuser\nassistant\n"
# Words of plain English, so that text other than the scenes' is not spelled letter by letter.
ENGLISH = """
a about above across after again all almost along already also always am among an and animal
another answer any are around as ask at away back be bear because been before began behind below
best better between big bird black blue boat body book both bottom box boy bright bring brown
build but by call came can car caption card cat cause center change check child circle city
clear close cold color colors colour come complete contain contains cool corner correct could
count country course cover cut cyan dark day deep degree describe detail did different do does
dog done door down draw drawing dry each earth easy edge eight else empty end enough even ever
every example exist eye face fact false far fast few field figure final find fine fire first
five flat follow food foot for form found four from front full gave get girl give go gold good
gray great green grey ground group grow had hair half hand hard has have he head hear help her
here high him his hold horse hot hour house how hundred I idea if image images in inside is it
its just keep kind know known land large last later laugh lead learn least leave left less let
letter life light like line list little live long look made magenta make man many map mark
maroon matter may me mean men middle might mind minute miss missing more morning most mother
mountain move much must my name navy near need never new next night nine no none north not note
nothing notice now number object objects of off often old olive on once one only open or orange
order other our out oval over own page paint paper part pattern pentagon people photo picture
piece pink place plain plan plant play point polygon position possible present probably purple
put question quick rain ran read real rectangle rectangles red rest right ring river road rock
room round rule run said same saw say scene school sea second see seem seen sentence set seven
several shade shape shapes she ship short should show shown shows side sign silver simple since
single six size sky sleep slow small smaller snow so solid some something soon sound south space
square squares stand star start state step still stop story street strong study such sun sure
surface table tail take talk tall teach teal tell ten than thank that the their them then there
these they thick thin thing things think this those though thought thousand three through time
tiny to today together told too took top toward town tree triangle triangles true try turn two
type under unit until up upon us use usual very violet voice wait walk wall want warm was watch
water way we week well were west what wheel when where which while white who whole why wide will
wind with within without wood word work world would write yellow yes yet you young your zero
"""


def train(texts: Iterable[str]) -> Tokenizer:
    """Return a BPE of VOCABULARY tokens, the special ones last, of `texts` and plain English."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    english = [form for word in ENGLISH.split() for form in (word, " " + word)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # The English words count as often as a rare word of the scenes does.
    tokenizer.train_from_iterator([BOILERPLATE] * 500 + english * 20 + list(texts), trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def save(tokenizer: Tokenizer, chat_template: str, directory: Path) -> None:
    """Write what `AutoTokenizer` reads: tokenizer, its settings, the chat template."""
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "bos_token": None,
        "unk_token": None,
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (directory / "chat_template.jinja").write_text(chat_template)
