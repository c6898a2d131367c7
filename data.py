"""
data.py: tokenizers (the tiny one and those of real backbones), small reading tasks in plain English, the user's own pairs,
batches of them, and the questions of two benchmarks.

Every example of the tiny run is a haystack of sentences, a question about a few of them (the needles), and an answer of
several tokens:

  task   after                 needles in the haystack                      the answer
  mv     RULER multi-value     " river holds 47." twice for each of 3 keys  " river holds 47. river holds 92."
  vt     RULER var. tracking   " alpha = 47. beta = alpha." ... 2 chains    " alpha = 47. beta = alpha. gamma = beta."
  cwe    RULER common words    " lamp." four times, other words once        " lamp stone."
  babi   bAbI who is where     " Mary went home."; the last move counts     " Mary went home. John went north."
  qa1    bAbI 1: who is where  " Mary went home."; the last move counts     " Mary went home."
  qa2    bAbI 2: what is where " Mary holds the lamp.", " Mary left the     " The lamp is home."
  qa3    bAbI 3: ... and was     lamp.", and moves                          " The lamp was home."
  qa4    bAbI 4: directions    " The lamp is north of the river.", twice    " The river is south of the lamp."
  qa5    bAbI 5: gifts         " Mary gave the lamp to Bill.", and as qa2   " Mary gave the lamp to Bill."

The tiny run trains on the first four (TASKS); the others (FACT_TASKS) are BABILong's five, in the tiny vocabulary.
Between the needles stands a filler that repeats three sentences, as RULER's "noise" haystack does: a longer example is the
same problem with more filler. That the filler is *predictable* matters when a prompt is written into the weights
(Sec. 4.5): on random filler there would be nothing but noise to write.

In this file, each readable without the others: tokenizers; the small tasks; examples and batches; the user's own data;
questions at any length, RULER, BABILong (with the world that all bAbI stories come from); command lines.

Reading list: RULER, Hsieh et al. 2024, arXiv 2404.06654; bAbI, Weston et al. 2015, arXiv 1502.05698; BABILong, Kuratov et
al. 2024, arXiv 2406.10149; LongAlpaca, Chen et al. 2023, arXiv 2309.12307; byte pair encoding, Sennrich et al. 2015, arXiv
1508.07909, and on bytes, the GPT-2 report (Radford et al. 2019, Sec. 2.2); tiktoken's README; Hugging Face's "Chat
templates".

Glossary
  paper      | name here      | shape
  x_0        | x0             | (B, T) clean token ids: prompt, response, EOS padding
  -          | maskable       | (B, T) bool: the response, that is what the forward process may mask and the loss may score
  -          | attention_mask | (B, T) bool or None: which positions are visible at all (None: every one)
  -          | Example        | prompt (P,) and response (R,) token ids, references: the strings that score
  -          | id             | a row of the embedding, what a model reads and writes; may leave gaps, in any order
  -          | rank           | a token's place in the order of merges, tiktoken's own number of it; Tokenizer.ids[rank] = id
  -          | special        | a token of the chat template's markup, [MASK] or EOS: no text that is typed ever yields it
  -          | added          | an ordinary token of tokenizer.json beside the merges: matched in the text before them
  -          | haystack       | the text that facts are hidden in: sentences of filler, lines of noise, an essay
  -          | needle         | one such fact; its depth is 0 where the haystack begins and 1 where it ends
  -          | Draft, size    | a benchmark's prompt before its haystack is measured out, in lines, words or different words
  -          | prefix         | the first words of the answer, put into the model's mouth
  -          | Story, Scene   | facts with a question, as they are told; the world behind them, as it is and as it is known
"""

import argparse
import functools
import itertools
import json
import math
import os
import random
import re
import string
import sys
import unicodedata
import uuid
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import jinja2.sandbox
import numpy as np
import tiktoken
import torch
from torch import Tensor

from model import UserError, read_json

# ---- text to ids and back ------------------------------------------------------------------------------------------------


def any_of(tokens: Collection[str]) -> re.Pattern:
    """Finds these strings, leftmost and then longest first: how the `tokenizers` library looks for added tokens."""
    return re.compile("(" + ("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)") + ")")


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """Text <-> ids. No text that is typed becomes a special token: these come from the chat template's own markup alone."""

    encoding: tiktoken.Encoding  # text -> ranks
    ids: list[int]  # rank -> id
    specials: dict[str, int]
    eos: int
    mask: int
    normalize: Callable[[str], str] = str
    added: dict[str, int] = field(default_factory=dict)  # looked for in the text as typed ...
    added_later: dict[str, int] = field(default_factory=dict)  # ... and in the normalized text
    template: str | None = None
    names: dict[str, str] = field(default_factory=dict)  # bos_token, eos_token, ...: what the template may print

    @functools.cached_property
    def patterns(self) -> list[re.Pattern]:
        """What finds added, added_later, specials, and finally special and added tokens at once."""
        return [any_of(tokens) for tokens in (self.added, self.added_later, self.specials, self.specials | self.added)]

    @functools.cached_property
    def pieces(self) -> dict[int, bytes]:
        """id -> the bytes it stands for. Special tokens, and rows of the embedding without a token, have none."""
        pieces = {token: text.encode() for text, token in (self.added | self.added_later).items()}
        return pieces | {token: self.encoding.decode_single_token_bytes(rank) for rank, token in enumerate(self.ids)}

    @property
    def vocab_size(self) -> int:
        """One more than the highest id. A backbone's embedding has at least as many rows."""
        return 1 + max(*self.pieces, *self.specials.values())

    def encode(self, text: str) -> list[int]:
        """Ordinary text -> ids: a typed "<|mask|>" is letters and signs."""
        ids = []
        for piece in self.patterns[0].split(text):
            if piece in self.added:
                ids.append(self.added[piece])
                continue
            for part in self.patterns[1].split(self.normalize(piece)):
                ranks = [] if part in self.added_later else self.encoding.encode_ordinary(part)
                ids += [self.ids[rank] for rank in ranks] if part not in self.added_later else [self.added_later[part]]
        return ids

    encode_response = encode  # not closed: `encode_pair` adds the EOS

    def encode_prompt(self, text: str) -> list[int]:
        """The text as one user's message, up to where the answer begins; without a template, the text alone."""
        if self.template is None:
            return self.encode(text)
        covered, originals = cover(text, self.specials, self.patterns[2], self.template)
        ids, plain = [], ""
        for piece in self.patterns[3].split(render(self.template, covered, self.names)):
            if piece in self.specials:
                ids += [*self.encode(plain.translate(originals)), self.specials[piece]]
                plain = ""
            else:  # the template's words and the user's are encoded in one go: a token may reach across their border
                plain += piece
        return ids + self.encode(plain.translate(originals))

    def decode(self, ids: list[int]) -> str:
        """Text up to the first EOS: cut on decoding only, generation itself fills the whole answer. Bytes that are not
        UTF-8 show as U+FFFD, ids without a text as nothing."""
        ids = ids[: ids.index(self.eos)] if self.eos in ids else ids
        return b"".join(self.pieces.get(token, b"") for token in ids).decode("utf-8", errors="replace")


def cover(text: str, specials: Collection[str], pattern: re.Pattern, template: str) -> tuple[str, dict[int, str]]:
    """Puts a private-use character in whatever could read as markup once the text stands inside the template.

    That is any special string, and a beginning or end of the text that the template's own words could complete to one
    ("<|mas" before "k|>"). One character of it, mostly "<" or ">", so that a template may still trim, count or capitalise.
    Returns the text and what brings it back: {stand-in: original} for str.translate.
    """
    body, first, places, at = text.strip(), len(text) - len(text.lstrip()), set(), -1
    while match := pattern.search(text, at + 1):  # each occurrence, overlapping ones too
        at = match.start()
        places.add(at)
    for token in specials:
        places |= {first + len(token) - k - 1 for k in range(1, len(token)) if body.startswith(token[k:])}
        places |= {first + len(body) - k for k in range(1, len(token)) if body.endswith(token[:k])}
    unused = (chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in text and chr(code) not in template)
    stand_ins = dict(zip({text[place] for place in places}, unused))
    covered = [stand_ins[letter] if place in places else letter for place, letter in enumerate(text)]
    return "".join(covered), {ord(stand_in): original for original, stand_in in stand_ins.items()}


@functools.lru_cache
def compiled(template: str) -> jinja2.Template:
    """Set up as Hugging Face's library does. A downloaded template is a foreign program: it runs in jinja2's sandbox."""

    def raise_exception(message: str):
        raise jinja2.TemplateError(message)

    loops = ["jinja2.ext.loopcontrols"]
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=loops)
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(template)


def render(template: str, content: str, names: dict[str, str]) -> str:
    """One user's message in the template, or a UserError: whatever goes wrong in there is the template's doing."""
    messages = [{"role": "user", "content": content}]
    try:
        return compiled(template).render(messages=messages, add_generation_prompt=True, tools=None, documents=None, **names)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"the backbone's chat template fails ({reason}); mend it, or do without a template.") from None


# ---- a backbone's tokenizer: tokenizer.json as an exact tiktoken.Encoding -----------------------------------------------

GPT2_REGEX = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The `tokenizers` library runs Oniguruma, tiktoken fancy-regex: two dialects. These constructs mean the same in both, unlike
# \w (is "²" one?), a possessive {1,3}+, ^ and $, or nested classes: \p{L} \s \., [^\r\n], ( (?: (?i: (?! (?<=, ) |, ?+, {1,3}.
ESCAPE = r"\\(?:[pP]\{\w+\}|[sSdDrnt]|[^\w\s])"
GROUP, REPEAT = r"\((?:\?(?:i?:|<?[=!]))?|[)|]", r"[?*+][?+]?|\{\d+(?:,\d*)?\}(?![?+])"
IN_BOTH = re.compile(rf"(?:{ESCAPE}|\[\^?(?:{ESCAPE}|(?!&&|--|~~)[^\\\[\]])+\]|{GROUP}|{REPEAT}|[^\\\[\](){{}}?*+|^$])+")


def split_regex(pre_tokenizer: dict) -> str:
    """The regex that cuts text into pieces before the merges, such that they add up to the text."""
    match pre_tokenizer:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": own}:
            return GPT2_REGEX if own else r"[\s\S]+"
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        } if IN_BOTH.fullmatch(regex):
            return rf"(?:{regex})|(?:(?!{regex})[\s\S])+"  # what no match covers is a piece too; tiktoken would drop it
    raise ValueError(f"its pre_tokenizer is not supported: {json.dumps(pre_tokenizer)[:500]}")


def adds_tokens(post_processor: dict | None) -> bool:
    """Whether a post_processor puts tokens around a text, or may do so."""
    match post_processor:
        case None | {"type": "ByteLevel"}:
            return False
        case {"type": "Sequence", "processors": steps}:
            return any(map(adds_tokens, steps))
        case {"type": "TemplateProcessing", "single": parts}:
            return any("SpecialToken" in part for part in parts)
    return True


def check_pipeline(spec: dict) -> None:
    """Refuses, by name, what would make tiktoken's result differ from that of the `tokenizers` library."""
    model, normalizer = spec["model"], spec.get("normalizer")
    if model["type"] != "BPE":
        raise ValueError(f"a {model['type']} model is not supported, byte-level BPE alone is")
    for name in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(name):
            raise ValueError(f"{name} = {model[name]!r} is not supported")
    if normalizer and normalizer["type"] not in ("NFC", "NFD", "NFKC", "NFKD"):
        raise ValueError(f"the normalizer {normalizer['type']} is not supported")
    if adds_tokens(spec.get("post_processor")):
        raise ValueError(f"a post_processor that adds tokens ({spec['post_processor']['type']}) is not supported")


def byte_symbols() -> list[str]:
    """The letter that stands for each byte in a byte-level vocabulary: itself if printable, else the next one from U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte if byte in printable else 256 + others.index(byte)) for byte in range(256)]


def last_merge(ids: list[int], merges: dict[tuple[int, int], int], products: list[int]) -> int:
    """Merges these ids by the rules, earliest rule first, leftmost first. The last rule used if one token is left, else -1."""
    never, rule = len(products), -1
    found = [merges.get(pair, never) for pair in itertools.pairwise(ids)]  # found[i]: the rule for ids[i] and ids[i + 1]
    while found and (rule := min(found)) < never:
        at = found.index(rule)
        ids[at : at + 2] = [products[rule]]
        del found[at]
        for i in range(max(at - 1, 0), min(at + 1, len(found))):
            found[i] = merges.get((ids[i], ids[i + 1]), never)
    return rule if len(ids) == 1 else -1


def order_of_merges(model: dict, added: Collection[str]) -> tuple[list[bytes], list[int]]:
    """The tokens (bytes) of a byte-level BPE by tiktoken's rank, and their ids.

    Merge rules know pairs; tiktoken merges any two neighbours that make up a token, and takes a whole piece that is one.
    Both come to the same once every token is what its own bytes merge to. For while neighbours x, y make up the bytes of
    such a token t, all merges so far inside of them are those of t alone, which hence ends by merging just x and y: that
    rule exists, and its place is t's rank, also where other rules spell t too. And a token that its own bytes do not
    merge to is, by the same argument, never produced in any text, and is left out.
    """
    vocab, symbols = model["vocab"], byte_symbols()
    if missing := [byte for byte, symbol in enumerate(symbols) if symbol not in vocab]:
        raise ValueError(f"the vocabulary has no symbol for {len(missing)} bytes, such as {missing[0]}")
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    merges = {(vocab[left], vocab[right]): rule for rule, (left, right) in enumerate(pairs)}  # the last of equals counts
    products = [vocab[left + right] for left, right in pairs]
    made = {token: last_merge([vocab[symbol] for symbol in token], merges, products) for token in {a + b for a, b in pairs}}
    tokens = symbols + sorted((token for token, rule in made.items() if rule >= 0), key=made.get)
    if model.get("ignore_merges") and (loose := vocab.keys() - tokens - added):
        raise ValueError(f"ignore_merges with {len(loose)} tokens that no merges lead to ({min(loose)!r}) is not supported")
    byte_of = {symbol: byte for byte, symbol in enumerate(symbols)}
    return [bytes(byte_of[symbol] for symbol in token) for token in tokens], [vocab[token] for token in tokens]


def token_strings(entry: object) -> list[str]:
    """The tokens that an entry of tokenizer_config.json names: "a", {"content": "a", ...}, or several of them."""
    if isinstance(entry, dict):
        entry = entry["content"] if "content" in entry else list(entry.values())
    if isinstance(entry, list):
        return [name for item in entry for name in token_strings(item)]
    return [entry] if isinstance(entry, str) else []


def sort_added(spec: dict, config: dict) -> dict:
    """Tokenizer's fields specials, eos, mask, added, added_later and names, from both files."""
    listed = [{**token, "id": int(number)} for number, token in config.get("added_tokens_decoder", {}).items()]
    listed += spec.get("added_tokens", [])
    added = {token["content"]: token for token in listed}
    if odd := [name for name, token in added.items() if any(map(token.get, ("lstrip", "rstrip", "single_word")))]:
        raise ValueError(f"the added token {odd[0]!r} with lstrip, rstrip or single_word is not supported")
    named = {key: token_strings(entry) for key, entry in config.items() if key.endswith(("_token", "_tokens"))}
    names = {key: tokens[0] for key, tokens in named.items() if tokens and key.endswith("_token")}
    mask = names.get("mask_token") or next((name for name in ("<|mdm_mask|>", "<|mask|>") if name in added), None)
    for key, name in (("eos_token", names.get("eos_token")), ("mask_token", mask)):
        if name not in added:
            raise ValueError(f"tokenizer_config.json names no {key} that is an added token (it names {name})")
    special = {mask, *itertools.chain(*named.values()), *(token["content"] for token in listed if token.get("special"))}
    fields: dict = {"specials": {}, "added": {}, "added_later": {}}
    for name, token in added.items():
        fields["specials" if name in special else "added_later" if token.get("normalized") else "added"][name] = token["id"]
    return {**fields, "names": names, "mask": added[mask]["id"], "eos": added[names["eos_token"]]["id"]}


def read_template(folder: Path, config: dict) -> str | None:
    """The chat template: a file of its own goes first, as in Hugging Face's library; of several, the one named default."""
    template = config.get("chat_template")
    if (folder / "chat_template.jinja").exists():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
        if template is None:
            raise ValueError("none of the chat templates in tokenizer_config.json is named default")
    return template


def load_tokenizer(folder: Path, plain: bool = False) -> Tokenizer:
    """The tokenizer of a downloaded backbone, exact, or a UserError that says what is missing or cannot be expressed.

    plain: leave the chat template aside, so that a prompt is encoded as it stands.
    """
    folder = Path(folder)
    spec, config = read_json(folder / "tokenizer.json"), read_json(folder / "tokenizer_config.json")
    try:
        check_pipeline(spec)
        fields = sort_added(spec, config)
        tokens, ids = order_of_merges(spec["model"], {*fields["specials"], *fields["added"], *fields["added_later"]})
        if both := set(ids) & {*fields["specials"].values()}:
            raise ValueError(f"the special token {min(both)} is one of the ordinary tokens, so that text could produce it")
        regex, ranks = split_regex(spec["pre_tokenizer"]), {token: rank for rank, token in enumerate(tokens)}
        encoding = tiktoken.Encoding(folder.name, pat_str=regex, mergeable_ranks=ranks, special_tokens={})
        normalize = functools.partial(unicodedata.normalize, spec["normalizer"]["type"]) if spec.get("normalizer") else str
        fields["added_later"] = {normalize(name): token for name, token in fields["added_later"].items()}
        template = None if plain else read_template(folder, config)
    except ValueError as error:
        raise UserError(f"the tokenizer in {folder} cannot be used: {error}.") from None
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"the tokenizer in {folder} is malformed ({type(error).__name__}: {error}).") from None
    tokenizer = Tokenizer(encoding, ids, normalize=normalize, template=template, **fields)
    tokenizer.encode_prompt("Hello")  # a template that fails shall do so before any work begins
    return tokenizer


# ---- the tiny tokenizer: 256 bytes, then a closed list of words, then two special tokens -------------------------------

NOUNS = "river lamp stone bread cloud tiger piano clock glass horse candle forest pencil ladder silver garden".split()
NOUNS += "button carpet window rocket island pepper helmet basket".split()
GREEK = "alpha beta gamma delta zeta theta iota kappa lambda rho sigma tau phi chi omega upsilon".split()
PEOPLE = "Mary John Sandra Daniel Julie Fred Bill Emily".split()
PLACES = "home outside upstairs downstairs north south east west abroad away".split()
FILLER = (" The night was calm.", " The road was long.", " The snow was deep.")

# One class of interchangeable words is one run of consecutive ids, so that "another word of this class" is arithmetic.
CLASSES = {"noun": NOUNS, "greek": GREEK, "person": PEOPLE, "place": PLACES, "tens": list("0123456789")}
OTHER = "holds hold went and which what does where are words common Question Answer Where".split()
OTHER += "The was calm long deep night road snow = is in to the of a".split()
WORDS = [" " + word for words in (*CLASSES.values(), OTHER) for word in words]


def build_tokenizer() -> tiktoken.Encoding:
    """A tiktoken.Encoding made here, without a download. Any text encodes to ids and decodes back to itself.

    "river holds 47." -> ["r", "i", "v", "e", "r", " holds", " 4", "7", "."]: a listed word with its leading space is
    one token, everything else falls apart into bytes. Special tokens exist as ids only: `encode_ordinary`, the one
    function used on text, turns a typed "<|mask|>" into ordinary bytes.
    """
    ranks = {bytes([i]): i for i in range(256)} | {word.encode(): 256 + i for i, word in enumerate(WORDS)}
    special = {"<|endoftext|>": len(ranks), "<|mask|>": len(ranks) + 1}
    pattern = r" ?[A-Za-z]+| ?[0-9]| ?[^\sA-Za-z0-9]|\s"
    return tiktoken.Encoding("memdlm-tiny", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def lead_with_space(text: str) -> str:
    """A user's text gets a leading space if it has none: " river" is one token, "river" five bytes."""
    return text if text.startswith((" ", "\n")) or not text else " " + text


TOKENIZER = build_tokenizer()
SPECIALS = {name: TOKENIZER.encode_single_token(name) for name in ("<|endoftext|>", "<|mask|>")}
EOS, MASK, VOCAB_SIZE = *SPECIALS.values(), TOKENIZER.n_vocab
TINY = Tokenizer(TOKENIZER, list(range(EOS)), SPECIALS, EOS, MASK, normalize=lead_with_space)
decode = TINY.decode


def class_range(name: str) -> tuple[int, int]:
    """First id of a word class and its size. "units" are the ten digit bytes, the second digit of a number."""
    if name == "units":
        return ord("0"), 10
    return TOKENIZER.encode_single_token(" " + CLASSES[name][0]), len(CLASSES[name])


# ---- the four tasks, vectorised: every array has the examples along its first axis -------------------------------------


def pick(rng: np.random.Generator, name: str, n: int, k: int) -> np.ndarray:
    """k different words of a class for each of n examples: ids (n, k)."""
    first, size = class_range(name)
    return first + rng.random((n, size)).argsort(axis=1)[:, :k]


def sentence(*parts) -> np.ndarray:
    """Glues text and id arrays of one shape (...) into ids (..., W): sentence(keys, " holds", tens, units, ".")."""
    shape = next(part.shape for part in parts if not isinstance(part, str))
    columns = []
    for part in parts:
        if isinstance(part, str):
            columns += [np.full(shape, token) for token in TOKENIZER.encode_ordinary(part)]
        else:
            columns.append(part)
    return np.stack(columns, axis=-1)


def numbers(rng: np.random.Generator, n: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """k different two-digit numbers for each of n examples: tens (n, k), units (n, k)."""
    value = rng.random((n, 100)).argsort(axis=1)[:, :k]
    return class_range("tens")[0] + value // 10, class_range("units")[0] + value % 10


def shuffle(rng: np.random.Generator, facts: np.ndarray) -> np.ndarray:
    """Each example's facts (n, F, ...) in a random order of its own."""
    order = rng.random(facts.shape[:2]).argsort(axis=1)
    return np.take_along_axis(facts, order.reshape(order.shape + (1,) * (facts.ndim - 2)), axis=1)


class Task(NamedTuple):
    """What a generator returns for n examples; the first question is the one an evaluation asks."""

    facts: np.ndarray  # (n, F, W) ids in reading order, -1 where a fact is shorter than W
    questions: list[tuple[np.ndarray, np.ndarray]]  # pairs of question (n, Q) and answer (n, R)


def multi_value(rng: np.random.Generator, n: int) -> Task:
    names = pick(rng, "noun", n, 3)
    keys = shuffle(rng, np.repeat(names, 2, axis=1))  # (n, 6), each key twice
    facts = sentence(keys, " holds", *numbers(rng, n, 6), ".")
    questions = []
    for name in names.T:
        found = np.argsort(keys != name[:, None], axis=1, kind="stable")[:, :2]  # where it stands, in reading order
        answer = np.take_along_axis(facts, found[..., None], axis=1).reshape(n, -1)
        questions.append((sentence(" Question: what does", name, " hold? Answer:"), answer))
    return Task(facts, questions)


def variable_tracking(rng: np.random.Generator, n: int) -> Task:
    names, (tens, units) = pick(rng, "greek", n, 6).reshape(n, 2, 3), numbers(rng, n, 2)
    first = sentence(names[..., 0], " =", tens, units, ".")  # (n, 2, 5)
    later = sentence(names[..., 1:], " =", names[..., :-1], ".")  # (n, 2, 2, 4)
    chains = np.full((n, 6, 5), -1)
    chains[:, ::3], chains[:, 1:3, :4], chains[:, 4:, :4] = first, later[:, 0], later[:, 1]
    # Each chain keeps its order, but the two are interleaved: draw which chain each of the six places belongs to.
    places = np.argsort(shuffle(rng, np.tile([0, 0, 0, 1, 1, 1], (n, 1))), axis=1, kind="stable")
    facts = np.empty_like(chains)
    np.put_along_axis(facts, places[..., None], chains, axis=1)
    questions = []
    for i in range(2):
        question = sentence(" Question: which =", tens[:, i], units[:, i], "? Answer:")
        questions.append((question, np.concatenate([first[:, i], later[:, i].reshape(n, -1)], axis=1)))
    return Task(facts, questions)


def common_words(rng: np.random.Generator, n: int) -> Task:
    words = pick(rng, "noun", n, 10)
    listed = shuffle(rng, np.concatenate([words[:, :2].repeat(4, axis=1), words[:, 2:]], axis=1))
    first_seen = (listed == words[:, :1]).argmax(1) < (listed == words[:, 1:2]).argmax(1)
    common = np.where(first_seen[:, None], words[:, :2], words[:, 1::-1])
    question = np.tile(TOKENIZER.encode_ordinary(" Question: which words are common? Answer:"), (n, 1))
    return Task(sentence(listed, "."), [(question, sentence(common[:, 0], common[:, 1], "."))])


def who_is_where(rng: np.random.Generator, n: int) -> Task:
    names = pick(rng, "person", n, 4)
    people = shuffle(rng, np.repeat(names, 2, axis=1))  # (n, 8), each moves twice
    first, size = class_range("place")
    moves = sentence(people, " went", first + rng.integers(size, size=people.shape), ".")
    questions = []
    for asked in (names[:, :2], names[:, 2:]):
        last = 7 - (people[:, None, ::-1] == asked[..., None]).argmax(-1)  # (n, 2): each one's last move
        answer = np.take_along_axis(moves, last[..., None], axis=1).reshape(n, -1)
        questions.append((sentence(" Question: where are", asked[:, 0], " and", asked[:, 1], "? Answer:"), answer))
    return Task(moves, questions)


TASKS = {"mv": multi_value, "vt": variable_tracking, "cwe": common_words, "babi": who_is_where}
# What a correct answer must contain, read off the clean answer, and which words of it idiosyncratic noise replaces.
REFERENCE = {"mv": r"\d+", "vt": r"[a-z]+(?= =)", "cwe": r"[a-z]+", "babi": r"\w+ went \w+"}
NOISE = {"mv": ("tens", "units"), "vt": ("tens", "units", "greek"), "cwe": ("noun",), "babi": ("place",)}


def haystack(rng: np.random.Generator, facts: np.ndarray, length: int) -> np.ndarray:
    """Facts (n, F, W) at random places between filler sentences -> ids (n, at most `length`), no padding left."""
    n, n_facts, width = facts.shape
    filler = [TOKENIZER.encode_ordinary(text) for text in FILLER]
    n_filler = max(0, (length - (facts[0] >= 0).sum()) // len(filler[0]))
    width = max(width, len(filler[0]))
    slots = np.full((n, n_facts + n_filler, width), -1)
    is_fact = shuffle(rng, np.repeat((np.arange(n_facts + n_filler) < n_facts)[None], n, axis=0))
    slots[is_fact, : facts.shape[2]] = facts.reshape(-1, facts.shape[2])
    number = np.cumsum(~is_fact, axis=1)[~is_fact] % len(filler)  # filler sentences follow each other in a fixed cycle
    slots[~is_fact, : len(filler[0])] = np.array(filler)[number]
    return slots[slots >= 0].reshape(n, -1)


def make_arrays(task: str, n: int, length: int, rng: np.random.Generator, questions: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """n examples of at most `length` tokens: ids (n, T), and which of the T places belong to an answer (T,).

    Each answer is closed by EOS. More than one question makes the denser documents of the base's pretraining.
    """
    drawn = TASKS[task](rng, n)
    pieces = [piece for question, answer in drawn.questions[:questions] for piece in (question, answer, np.full((n, 1), EOS))]
    is_answer = [np.full(piece.shape[1], i % 3 > 0) for i, piece in enumerate(pieces)]
    hay = haystack(rng, drawn.facts, length - sum(piece.shape[1] for piece in pieces))
    return np.concatenate([hay, *pieces], axis=1), np.concatenate([np.zeros(hay.shape[1], bool), *is_answer])


def add_noise(task: str, response: np.ndarray, probability: float, rng: np.random.Generator) -> np.ndarray:
    """Replaces each answer word by a random one of its class with this probability: sample-specific noise.

    It stands for what no rule explains in real instruction data (this user's spelling, that annotator's taste, a wrong
    date): true of one example, worthless for every other, and learnable only by heart.
    """
    response = response.copy()
    for name in NOISE[task]:
        first, size = class_range(name)
        hit = (response >= first) & (response < first + size) & (rng.random(response.shape) < probability)
        response[hit] = first + rng.integers(size, size=hit.sum())
    return response


# ---- examples and batches ------------------------------------------------------------------------------------------------


class Example(NamedTuple):
    """One (prompt, response) pair of token ids, and the strings that a right answer contains (empty: not scored)."""

    prompt: list[int]
    response: list[int]
    references: tuple[str, ...] = ()


class Batch(NamedTuple):
    """What every loss takes: x0 (B, T) ids, maskable (B, T) bool, attention_mask (B, T) bool or None."""

    x0: Tensor
    maskable: Tensor
    attention_mask: Tensor | None


def split_seed(seed: int, split: str) -> int:
    """Seeds of "train", "held out" and "test" examples that do not coincide in practice, whatever the run's seed."""
    return int(np.random.SeedSequence([seed, zlib.crc32(split.encode())]).generate_state(1)[0])


def fingerprint() -> int:
    """A checksum of what the generators produce: changes when tokenizer or tasks do, and old bases no longer match."""
    return zlib.crc32(b"".join(make_arrays(task, 4, 96, np.random.default_rng(0), 3)[0].tobytes() for task in TASKS))


def make_examples(task: str, n: int, length: int, seed: int, noise: float = 0.0) -> list[Example]:
    """n examples of one task, at most `length` tokens each, the same for the same seed and n. References are clean."""
    if task in FACT_TASKS:
        if noise:
            raise UserError(f"{task} has no noisy answers; leave it out, or set the noise to 0.")
        return [fact_example(task, index, length, seed) for index in range(n)]
    rng = np.random.default_rng([seed, length, list(TASKS).index(task)])
    ids, is_answer = make_arrays(task, n, length, rng)
    prompts, clean = ids[:, ~is_answer], ids[:, is_answer]
    references = [tuple(dict.fromkeys(re.findall(REFERENCE[task], decode(row)))) for row in clean.tolist()]
    responses = add_noise(task, clean, noise, rng) if noise else clean
    return [Example(*row) for row in zip(prompts.tolist(), responses.tolist(), references)]


def pads_learn(length: Tensor, positions: Tensor, is_response: Tensor) -> tuple[Tensor, None]:
    """The paper's choice: EOS padding is visible, maskable and a target like any token, so that the model learns to stop."""
    return is_response, None


def pads_ignore(length: Tensor, positions: Tensor, is_response: Tensor) -> tuple[Tensor, Tensor]:
    """Padding is hidden from attention, never masked and never a target."""
    real = positions < length[:, None]
    return is_response & real, real


PADS = {"learn": pads_learn, "ignore": pads_ignore}


def collate(examples: list[Example], device: str = "cpu", pads: str = "learn", eos: int = EOS) -> Batch:
    """Right-pads with EOS to the longest example. Asymmetric masking (Sec. 2.1): only the response is maskable."""
    rows = [example.prompt + example.response for example in examples]
    width = max(map(len, rows))
    x0 = torch.tensor([row + [eos] * (width - len(row)) for row in rows])
    positions = torch.arange(width)[None]
    prompt_length = torch.tensor([[len(example.prompt)] for example in examples])
    length = torch.tensor([len(row) for row in rows])
    maskable, attention_mask = PADS[pads](length, positions, positions >= prompt_length)
    return Batch(x0.to(device), maskable.to(device), None if attention_mask is None else attention_mask.to(device))


def length_grouped(lengths: list[int], batch: int, seed: int, epoch: int) -> list[list[int]]:
    """One epoch's batches of indices, each index once: mixed at random, yet with lengths that are alike in each batch.

    Sorting within groups of 50 batches saves nearly all of the padding, and leaves which examples meet to chance.
    """
    rng, group = np.random.default_rng([seed, epoch]), 50 * batch
    order = rng.permutation(len(lengths)).tolist()
    order = [i for at in range(0, len(order), group) for i in sorted(order[at : at + group], key=lengths.__getitem__)]
    batches = [order[at : at + batch] for at in range(0, len(order), batch)]
    return [batches[i] for i in rng.permutation(len(batches))]


def pretraining_batch(seed: int, step: int, rows: int, length: int, questions: int, whole: float, device: str = "cpu") -> Batch:
    """A fresh batch of all four tasks. With probability `whole` every token is maskable, not the answers alone.

    Predicting the haystack too is what a real pretrained denoiser has done; without it the predictions at a prompt's
    positions would be untrained, and so would be what is written from them.
    """
    rng = np.random.default_rng([seed, step])
    drawn = [make_arrays(task, rows // len(TASKS), length, rng, questions) for task in TASKS]
    width = max(ids.shape[1] for ids, _ in drawn)  # several questions may not fit into `length`
    x0 = np.concatenate([np.pad(ids, ((0, 0), (0, width - ids.shape[1])), constant_values=EOS) for ids, _ in drawn])
    is_answer = np.stack([np.pad(mask, (0, width - len(mask))) for _, mask in drawn])
    maskable = is_answer.repeat(rows // len(TASKS), axis=0)
    if rng.random() < whole:
        maskable = np.ones_like(maskable)
    return Batch(torch.from_numpy(x0).to(device), torch.from_numpy(maskable).to(device), None)


# ---- the user's own data -------------------------------------------------------------------------------------------------


def encode_pair(record: object, where: str, max_length: float = math.inf, tokenizer: Tokenizer = TINY) -> Example:
    """One record -> Example, or a UserError that names the place. The response is closed by EOS."""
    if not isinstance(record, dict) or not all(isinstance(record.get(key), str) for key in ("prompt", "response")):
        raise UserError(f'{where}: each line must be {{"prompt": "...", "response": "..."}} with two strings.')
    if not record["response"].strip():
        raise UserError(f"{where}: the response is empty; there would be nothing to learn.")
    prompt = tokenizer.encode_prompt(record["prompt"])
    response = [*tokenizer.encode_response(record["response"]), tokenizer.eos]
    if len(prompt) + len(response) > max_length:
        raise UserError(f"{where}: {len(prompt)} + {len(response)} tokens exceed --max-length {max_length}; shorten it.")
    return Example(prompt, response)


def read_text(path: str | Path, flag: str = "--data") -> str:
    """A file's text, or a UserError that names it and the flag that named it."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {flag} {path}: {error}.") from None


def jsonl_records(name: str | Path, text: str) -> Iterator[tuple[str, object]]:
    """(where, record) of each line; only "\\n" ends a line, and empty ones are passed over."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"{name}, line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{name}, line {number}: not valid JSON ({error}).") from None


def alpaca_records(name: str | Path, text: str) -> Iterator[tuple[str, dict]]:
    """(where, pair) of each record of a JSON list in the form of Alpaca and LongAlpaca. Records with an empty answer,
    which Alpaca has a few of, are passed over."""
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: not valid JSON ({error}).") from None
    for number, record in enumerate(records, 1):
        where, record = f"{name}, record {number}", record if isinstance(record, dict) else {}
        instruction, context, answer = record.get("instruction"), record.get("input") or "", record.get("output")
        if not all(isinstance(field, str) for field in (instruction, context, answer)):
            raise UserError(f'{where}: must be {{"instruction": "...", "input": "...", "output": "..."}} with strings.')
        if answer.strip():
            yield where, {"prompt": f"{instruction}\n\n{context}" if context else instruction, "response": answer}


def read_jsonl(path: str | Path, max_length: int) -> list[Example]:
    """All pairs of a JSONL file in the tiny vocabulary, read and checked in full before any work begins."""
    examples = [encode_pair(record, where, max_length) for where, record in jsonl_records(path, read_text(path))]
    if not examples:
        raise UserError(f"{path}: no examples in it.")
    return examples


def find_data(source: str) -> Path:
    """The file that --data names: a path, or a dataset of the hub such as Yukang/LongAlpaca-12k, which is downloaded."""
    hub = re.fullmatch(r"[\w.-]+/([\w.-]+)", source)
    if Path(source).exists() or not hub or source.endswith((".json", ".jsonl")):
        return Path(source)
    file = f"{hub[1]}.json"
    url = f"https://huggingface.co/datasets/{source}/resolve/main/{file}"
    reasons = {
        "ImportError": "huggingface_hub is not installed (pip install huggingface_hub)",
        "GatedRepoError": "the dataset is gated: accept its terms on its page, and log in (hf auth login)",
        "RepositoryNotFoundError": "no such file here, and no such dataset on the hub",
        "LocalEntryNotFoundError": "the hub cannot be reached",
        "EntryNotFoundError": f"the dataset has no file {file}",
    }
    try:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(repo_id=source, filename=file, repo_type="dataset"))
    except Exception as error:  # huggingface_hub raises errors of several libraries; each class before its parents
        kinds = [kind.__name__ for kind in type(error).__mro__]
        reason = next((reasons[kind] for kind in kinds if kind in reasons), f"the download failed ({kinds[0]})")
        raise UserError(f"--data {source}: {reason}. Or fetch {url} yourself and pass it with --data {file}.") from None


def read_pairs(source: str, tokenizer: Tokenizer, max_length: int) -> tuple[list[Example], int]:
    """The pairs of a JSONL file, a LongAlpaca JSON file or a hub dataset, and how many were left out for being longer
    than max_length tokens (prompt, response and EOS). Anything else that is wrong is a UserError."""
    text, kept, dropped = read_text(find_data(source)), [], 0
    records = alpaca_records if text.lstrip().startswith("[") else jsonl_records
    for where, record in records(source, text):
        pair = encode_pair(record, where, tokenizer=tokenizer)
        if len(pair.prompt) + len(pair.response) <= max_length:
            kept.append(pair)
        else:
            dropped += 1
    if not kept:
        raise UserError(f"{source}: no examples in it, or none of its {dropped} fits into --max-length {max_length} tokens.")
    return kept, dropped


# ---- questions of a benchmark, at any length ---------------------------------------------------------------------------------


class Question(NamedTuple):
    """What a model reads, how many tokens it may answer with, and the strings that a right answer contains."""

    task: str
    prompt: list[int]
    tokens: int
    references: tuple[str, ...]
    text: str = ""  # the prompt as a string
    asked: str = ""  # the question alone: BABILong's own scoring sets aside the labels that it names
    depth: float | None = None  # of a single needle: 0 where the haystack begins, 1 where it ends


class Style(NamedTuple):
    """What a benchmark's prompts depend on, beside the seed."""

    encode: Callable[[str, str], list[int]]  # (text, the answer's prefix) -> ids
    protocol: str = "original"  # or "harness": lm-evaluation-harness's wording, which the paper's scores were made with
    haystack: str | None = None  # a text of the user's to hide facts in
    babi: Path | None = None  # a folder with bAbI's published files, whose stories take the place of ours


class Draft(NamedTuple):
    """A prompt whose haystack may have any size, in whatever its generator counts."""

    render: Callable[[int], tuple[str, float | None]]  # size -> text up to the answer's prefix, depth of a single needle
    smallest: int
    tokens: int  # to generate
    references: tuple[str, ...]
    prefix: str = ""  # put into the model's mouth
    asked: str = ""
    largest: int = 1 << 24


def cost(draft: Draft, size: int, style: Style) -> int:
    """Tokens of the prompt with that much haystack, and of the answer."""
    return len(style.encode(draft.render(size)[0], draft.prefix)) + draft.tokens


def too_short(task: str, least: int, length: int) -> UserError:
    return UserError(f"{task} needs at least {least} tokens; --lengths {length} is too short for it.")


def grow(task: str, draft: Draft, length: int, style: Style) -> Question:
    """The draft with as much haystack as fits, found by bisection: prompt and answer have at most `length` tokens."""
    low, high = draft.smallest, 2 * draft.smallest + 1
    if (least := cost(draft, low, style)) > length:
        raise too_short(task, least, length)
    while high <= draft.largest and cost(draft, high, style) <= length:
        low, high = high, 2 * high
    high = min(high, draft.largest + 1)
    while high - low > 1:  # `low` has been seen to fit, whether or not a larger haystack always costs more
        middle = (low + high) // 2
        low, high = (middle, high) if cost(draft, middle, style) <= length else (low, middle)
    text, depth = draft.render(low)
    ids = style.encode(text, draft.prefix)
    return Question(task, ids, draft.tokens, draft.references, text + draft.prefix, draft.asked, depth)


def make_draft(task: str, index: int, length: int, seed: int, style: Style) -> Draft:
    """Question `index` before its haystack is measured out. Its draws depend on seed, task and index, not on what else is
    asked, nor on the length: keys, values, variables and stories stay the same. (Coded words, and common words below and
    above 4096 tokens, do not, for a longer text has more of them; nor do the places.)"""
    return BENCHMARKS[task](random.Random(f"{seed} {task} {index}"), index, length, style)


def make_question(task: str, index: int, length: int, seed: int, style: Style) -> Question:
    return grow(task, make_draft(task, index, length, seed, style), length, style)


def check_length(task: str, n: int, length: int, seed: int, style: Style) -> None:
    """Refuses a length at which one of the first n questions does not fit, and names one at which all of them do."""
    needed, least = 0, length
    while needed < least:  # where there is more room a story may be longer
        needed, drafts = least, [make_draft(task, i, least, seed, style) for i in range(n)]
        least = max(cost(draft, draft.smallest, style) for draft in drafts)
    if needed > length:
        raise too_short(task, needed, length)


# ---- RULER (arXiv 2404.06654) ------------------------------------------------------------------------------------------------


# The words of NVIDIA's repository; where `protocol` is "harness", those of lm-evaluation-harness 0.4.9.2, slips included.
# Each prompt is a text and a prefix, the beginning of the answer that is put into the model's mouth.
GRASS = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
NIAH_PROMPT = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "{kind} afterwards.\n{context}\nWhat are all the special magic {kind} for {query} mentioned in the provided text?",
    " The special magic {kind} for {query} mentioned in the provided text are",
)
VT_PROMPT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
    "Question: Find all variables that are assigned the value {value} in the text above.",
    " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are {assigned} the value "
    "{value}, they are: ",
)
CWE_PROMPT = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that appear "
    "most often.\n{context}\nQuestion: What are the 10 most common words in the above list?",
    " Answer: The top 10 words that appear most often in the list are:",
)
FWE_PROMPT = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared coded "
    "words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most "
    "frequently appeared words in the above coded text?",
    " Answer: According to the coded text above, the three most frequently appeared words are:",
)


def lead_in(prefix: str, protocol: str, between: str = " ") -> str:
    """What follows the text. The harness strips the prefix and puts `between` before it."""
    return prefix if protocol == "original" else between + prefix.strip()


def shuffled(items: Iterable, seed: int = 42) -> list:
    """A shuffled copy. With the original's fixed seed, all lists of one length are put in one and the same order."""
    items = list(items)
    random.Random(seed).shuffle(items)
    return items


def draw_distinct(draw: Callable[[], str], count: int) -> list[str]:
    """Draws until there are `count` different ones. (The original takes its chance that a key comes twice.)"""
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw()] = None
    return list(found)


def letters(rng: random.Random, alphabet: str, count: int) -> str:
    return "".join(rng.choices(alphabet, k=count))


@functools.lru_cache
def english(*categories: str) -> tuple[str, ...]:
    """All words that the package wonderwords has in these categories, in alphabetical order."""
    try:
        from wonderwords import RandomWord
    except ImportError:
        raise UserError("RULER's prompts are made of English words: pip install wonderwords.") from None
    return tuple(sorted(set(RandomWord().filter(include_categories=categories))))


class Needles(NamedTuple):
    """What sets RULER's eight needle tasks apart, in the order of RULER's own settings."""

    hay: str
    key: str
    value: str
    keys: int  # how many
    values: int  # of each key
    asked: int  # how many of the keys


NIAH = {
    "niah_single_1": Needles("noise", "words", "numbers", 1, 1, 1),
    "niah_single_2": Needles("essay", "words", "numbers", 1, 1, 1),
    "niah_single_3": Needles("essay", "words", "uuids", 1, 1, 1),
    "niah_multikey_1": Needles("essay", "words", "numbers", 4, 1, 1),
    "niah_multikey_2": Needles("needle", "words", "numbers", 1, 1, 1),
    "niah_multikey_3": Needles("needle", "uuids", "uuids", 1, 1, 1),
    "niah_multivalue": Needles("essay", "words", "numbers", 1, 4, 1),
    "niah_multiquery": Needles("essay", "words", "numbers", 4, 1, 4),
}
KINDS: dict[str, Callable[[random.Random], str]] = {
    "words": lambda rng: f"{rng.choice(english('adjective'))}-{rng.choice(english('noun'))}",
    "numbers": lambda rng: str(rng.randint(10**6, 10**7 - 1)),
    "uuids": lambda rng: str(uuid.UUID(int=rng.getrandbits(128), version=4)),
}
DEPTHS = [round(100 * i / 39) for i in range(40)]  # percent


def needle_sentences(hidden: dict[str, list[str]], kind: str) -> list[str]:
    """One sentence for each value of each key, in the order of placing. The plural stays even where there is one."""
    return shuffled(NEEDLE.format(kind=kind, key=key, value=value) for key, values in hidden.items() for value in values)


def draw_places(size: int, count: int, seed: int) -> list[int]:
    return sorted(random.Random(seed).sample(range(size), count))


def place_lines(lines: list[str], needles: list[str], places: list[int]) -> list[str]:
    """Each needle before the line of the hay that has its number: the hay's last line stays the last."""
    lines = list(lines)
    for place, needle in sorted(zip(places, needles), reverse=True):  # from the end, so that earlier places hold
        lines.insert(place, needle)
    return lines


def place_sentences(sentences: list[str], needles: list[str], places: list[int]) -> str:
    """Needles at ascending places. Where no sentence stands before, between or after them, a space is left over."""
    pieces = [" ".join(sentences[a:b]) for a, b in itertools.pairwise([0, *places, len(sentences)])]
    return " ".join([*itertools.chain(*zip(pieces, needles)), pieces[-1]])


def niah_prompt(kind: str, queries: list[str], single: bool, context: str) -> list[str]:
    """Text and prefix. A question for one value is in the singular."""
    query = queries[0] if len(queries) == 1 else ", ".join(queries[:-1]) + ", and " + queries[-1]
    if not single:
        return [part.format(kind=kind, query=query, context=context) for part in NIAH_PROMPT]
    parts = [part.replace("Some", "A").replace("are all", "is").replace("are", "is") for part in NIAH_PROMPT]
    return [part.format(kind=kind.removesuffix("s"), query=query, context=context) for part in parts]


def noise_hay(task: Needles, keys: list[str], seed: int, style: Style) -> Callable[[int], list[str]]:
    return lambda size: [GRASS] * size


def needle_hay(task: Needles, keys: list[str], seed: int, style: Style) -> Callable[[int], list[str]]:
    """Needles with other keys. More are drawn as more are called for; the first of them stay the same."""
    rng, lines = random.Random(seed), []
    others = (key for key in iter(lambda: KINDS[task.key](rng), None) if key not in keys)

    def hay(size: int) -> list[str]:
        while len(lines) < size:
            lines.append(NEEDLE.format(kind=task.value, key=next(others), value=KINDS[task.value](rng)))
        return lines[:size]

    return hay


def essay_hay(task: Needles, keys: list[str], seed: int, style: Style) -> Callable[[int], list[str]]:
    """Sentences from the first words of the user's text, which is read again and again if it is too short."""
    words = style.haystack.split()
    if not words:
        raise UserError("the text to hide needles in (--haystack) has no word in it.")
    # The original's splitter is nltk's, which knows that "Dr." ends no sentence.
    end = re.compile(r"(?<=[.!?]) |(?<=[.!?][\"')\]”’]) ")
    return lambda size: end.split(" ".join(itertools.islice(itertools.cycle(words), size)))


def among_lines(lines: list[str], needles: list[str], seed: int) -> str:
    """The first needle goes nearest to the end, as in the original, which inserts from there."""
    return "\n".join(place_lines(lines, needles, draw_places(len(lines), len(needles), seed)[::-1]))


def among_sentences(sentences: list[str], needles: list[str], seed: int) -> str:
    """The first needle goes nearest to the beginning: with essays the original goes the other way."""
    depths = sorted(random.Random(seed).sample(DEPTHS, len(needles)))
    return place_sentences(sentences, needles, [int(len(sentences) * (depth / 100)) for depth in depths])


HAYS = {"noise": (noise_hay, among_lines), "needle": (needle_hay, among_lines), "essay": (essay_hay, among_sentences)}


def find_needles(task: Needles, rng: random.Random, index: int, length: int, style: Style) -> Draft:
    """A size is a number of lines, or of an essay's words. Without a text to take these from, the essay is noise."""
    keys = draw_distinct(lambda: KINDS[task.key](rng), task.keys)
    values = draw_distinct(lambda: KINDS[task.value](rng), task.keys * task.values)
    hidden = {key: values[i * task.values : (i + 1) * task.values] for i, key in enumerate(keys)}
    queries, needles = rng.sample(keys, task.asked), needle_sentences(hidden, task.value)
    references = tuple(value for key in queries for value in hidden[key])
    prompt = functools.partial(niah_prompt, task.value, queries, len(references) == 1)
    needle = next(needle for needle in needles if references[0] in needle)
    make_hay, place = HAYS["noise" if task.hay == "essay" and style.haystack is None else task.hay]
    seed, hay = rng.getrandbits(64), make_hay(task, keys, rng.getrandbits(64), style)

    def render(size: int) -> tuple[str, float | None]:
        context = place(hay(size), needles, seed)
        depth = context.index(needle) / (len(context) - len(needle))
        return prompt(context)[0], depth if len(references) == 1 else None

    return Draft(render, len(needles), 128, references, lead_in(prompt("")[1], style.protocol))


# Variable tracking, where the two protocols differ: a word, a line of noise, what joins two lines, what follows the example.
VT_WORDING = {"original": ("assigned", GRASS, "\n", "\n\n"), "harness": ("assgined", GRASS + "\n", " ", "\n\n\n\n")}


def tracking_prompt(names: list[str], value: str, places: list[int], size: int, protocol: str) -> tuple[str, str]:
    """Text and prefix. The first variable has the value, and each later one that of the one before."""
    assigned, line, joint, _ = VT_WORDING[protocol]
    chain = [f"VAR {names[0]} = {value}", *(f"VAR {new} = VAR {old} " for old, new in itertools.pairwise(names))]
    text = VT_PROMPT[0].format(context=joint.join(place_lines([line] * size, chain, places)), value=value)
    return text, VT_PROMPT[1].format(count=len(names), assigned=assigned, value=value)


def tracking_example(text: str, prefix: str, names: list[str], protocol: str) -> str:
    """The worked example before the question."""
    return " ".join([text + prefix, *names]) + VT_WORDING[protocol][-1]


def track_variables(rng: random.Random, index: int, length: int, style: Style) -> Draft:
    """A size is a number of lines. The example has at least 5 of them, and 5 more as long as it fits into 500 tokens; its
    names and its value are the question's own, its places are not."""
    shown, names = (draw_distinct(functools.partial(letters, rng, string.ascii_uppercase, count), 5) for count in (3, 5))
    (given, value), seed = draw_distinct(lambda: str(rng.randint(10000, 99998)), 2), rng.getrandbits(64)

    def example(size: int) -> tuple[str, str]:
        return tracking_prompt(shown, given, draw_places(size, 5, 42), size, style.protocol)

    def prompt(size: int) -> tuple[str, str]:
        return tracking_prompt(names, value, draw_places(size, 5, seed), size, style.protocol)

    size = 5
    while len(style.encode(*example(size + 5))) + 30 <= 500:
        size += 5
    start = tracking_example(*example(size), shown, style.protocol)
    prefix = lead_in(prompt(5)[1], style.protocol)
    return Draft(lambda size: (start + prompt(size)[0], None), 5, 30, tuple(names), prefix)


# From so many tokens on: how often a common word occurs, how often another one; the example's different words, and the same.
CWE_COUNTS = {0: ((6, 1), 20, (3, 1)), 4096: ((30, 3), 40, (10, 3))}


def repeated(words: list[str], counts: tuple[int, int]) -> list[str]:
    """Of these words the first ten are the common ones."""
    return words[:10] * counts[0] + words[10:] * counts[1]


def numbered(words: Iterable[str]) -> str:
    """1. river 2. lamp 3. river"""
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))


def common_example(listed: list[str], common: list[str]) -> str:
    """The worked example before the question."""
    return f"{CWE_PROMPT[0].format(context=numbered(listed))}{CWE_PROMPT[1]} {numbered(common)}\n"


def find_common(rng: random.Random, index: int, length: int, style: Style) -> Draft:
    """A size is a number of different words. The harness sends no example, and shuffles each list in another way."""
    counts, shown, shown_counts = CWE_COUNTS[4096 if length >= 4096 else 0]
    words = english("noun", "adjective", "verb")
    examples, words, own = rng.sample(words, shown), rng.sample(words, len(words)), rng.getrandbits(64)
    example = common_example(shuffled(repeated(examples, shown_counts)), examples[:10])
    example, seed = {"original": (example, 42), "harness": ("", own)}[style.protocol]

    def render(size: int) -> tuple[str, None]:
        listed = shuffled(repeated(words[:size], counts), seed)
        return example + CWE_PROMPT[0].format(context=numbered(listed)), None

    prefix = lead_in(CWE_PROMPT[1], style.protocol, between="\n\n")
    return Draft(render, 11, 120, tuple(words[:10]), prefix, largest=len(words))


def coded_text(vocabulary: list[str], total: int) -> str:
    """Zipf's law: 1 / (k^2 zeta(2)) of the words, rounded down, are the k-th one."""
    counts = [int(total * k**-2.0 / (math.pi**2 / 6)) for k in range(1, len(vocabulary) + 1)]
    return " ".join(shuffled(itertools.chain(*([word] * count for word, count in zip(vocabulary, counts)))))


def find_frequent(rng: random.Random, index: int, length: int, style: Style) -> Draft:
    """A size is a number of words. From 53 on, the fourth coded word is always rarer than the third."""
    drawn = draw_distinct(lambda: letters(rng, string.ascii_lowercase, 6), max(6, length // 50))
    vocabulary = ["...", *shuffled(sorted(drawn))[1:]]  # the most frequent word of all is no answer

    def render(size: int) -> tuple[str, None]:
        return FWE_PROMPT[0].format(context=coded_text(vocabulary, size)), None

    return Draft(render, 53, 50, tuple(vocabulary[1:4]), lead_in(FWE_PROMPT[1], style.protocol))


RULER = {name: functools.partial(find_needles, task) for name, task in NIAH.items()}
RULER |= {"ruler_vt": track_variables, "ruler_cwe": find_common, "ruler_fwe": find_frequent}


# ---- BABILong (arXiv 2406.10149) ---------------------------------------------------------------------------------------------


class Event(NamedTuple):
    """What happens, or is true; the names in the braces of a World's sentences.

    kind  who          what       to
    go    person       -          place
    take  person       object     -
    drop  person       object     -
    give  person       object     person
    is    -            object     the place where it is
    was   later place  object     the place where it was before
    side  place        direction  the place that it lies on this side of
    """

    kind: str
    who: str
    what: str = ""
    to: str = ""

    def said(self, text: str) -> str:
        return text.format(**self._asdict())


class World(NamedTuple):
    """What bAbI's tasks 1 to 5 are told in."""

    people: list[str]
    objects: list[str]
    places: list[str]
    facts: dict[str, tuple[int, int]]  # task -> the fewest and the most facts of a story
    sentences: dict[str, list[str]]  # kind of event -> ways to tell it
    questions: dict[str, list[str]]  # task -> questions with their answers


class Story(NamedTuple):
    facts: list[str]
    question: str
    target: str
    truth: Event | None = None  # unknown if the story was read from a file


BABI = World(
    people="Mary John Sandra Daniel".split(),
    objects="apple football milk".split(),
    places="bathroom bedroom garden hallway kitchen office".split(),
    facts={"qa1": (2, 10), "qa2": (6, 30), "qa3": (10, 60), "qa4": (2, 2), "qa5": (5, 20)},
    sentences={
        "go": [f"{{who}} {verb} to the {{to}}." for verb in ("moved", "went", "went back", "journeyed", "travelled")],
        "take": [
            f"{{who}} {verb} the {{what}}{end}" for verb in ("took", "got", "grabbed", "picked up") for end in (".", " there.")
        ],
        "drop": [f"{{who}} {verb} the {{what}}." for verb in ("dropped", "discarded", "left", "put down")],
        "give": [f"{{who}} {verb} the {{what}} to {{to}}." for verb in ("gave", "handed", "passed")],
        "side": ["The {who} is {what} of the {to}."],
    },
    questions={
        "qa1": ["Where is {who}? {to}"],
        "qa2": ["Where is the {what}? {to}"],
        "qa3": ["Where was the {what} before the {who}? {to}"],
        "qa4": ["What is {what} of the {to}? {who}", "What is the {who} {what} of? {to}"],
        "qa5": ["What did {who} give to {to}? {what}", "Who gave the {what} to {to}? {who}"]
        + ["Who did {who} give the {what} to? {to}", "Who gave the {what}? {who}", "Who received the {what}? {to}"],
    },
)
BABI_WORLDS = dict.fromkeys(("qa1", "qa2", "qa3", "qa4"), BABI) | {"qa5": BABI._replace(people="Mary Fred Bill Jeff".split())}
# In words of the tiny vocabulary, which spells left, before, who, did, give, gave and received in bytes.
SMALL = World(
    people=PEOPLE,
    objects=NOUNS,
    places=PLACES,
    facts={"qa1": (2, 8), "qa2": (3, 8), "qa3": (4, 8), "qa4": (2, 2), "qa5": (3, 8)},
    sentences={
        "go": [" {who} went {to}."],
        "take": [" {who} holds the {what}."],
        "drop": [" {who} left the {what}."],
        "give": [" {who} gave the {what} to {to}."],
        "is": [" The {what} is {to}."],
        "was": [" The {what} was {to}."],
        "side": [" The {who} is {what} of the {to}."],
    },
    questions={task: [text[0].lower() + text[1:] for text in texts] for task, texts in BABI.questions.items()}
    | {"qa3": ["where was the {what} before {who}? {to}"]},
)
SMALL_WORLDS = dict.fromkeys(BABI_WORLDS, SMALL) | {"qa4": SMALL._replace(places=NOUNS)}  # PLACES has the directions in it


@dataclass
class Scene:
    """Where everyone and everything is, from the start on, and what of it the facts have told so far."""

    people: list[str]
    objects: list[str]
    place: dict[str, str]  # of a person, or of an object that lies somewhere
    told: dict[str, list[str]]  # the places of a person or an object that a reader knows, in order
    holder: dict[str, str] = field(default_factory=dict)  # of an object that is carried

    def load(self, who: str) -> list[str]:
        return [what for what, holder in self.holder.items() if holder == who]

    def possible(self, places: list[str]) -> dict[str, list[Event]]:
        """Kind -> all that can happen: one takes what lies free in one's place, and gives to someone who is there too."""
        place, free = self.place, [what for what in self.objects if what not in self.holder]
        pairs = [(who, to) for who, to in itertools.permutations(self.people, 2) if place[who] == place[to]]
        return {
            "go": [Event("go", who, to=to) for who in self.people for to in places if to != place[who]],
            "take": [Event("take", who, what) for who in self.people for what in free if place[who] == place[what]],
            "drop": [Event("drop", who, what) for what, who in self.holder.items()],
            "give": [Event("give", who, what, to) for who, to in pairs for what in self.load(who)],
        }

    def happen(self, event: Event) -> None:
        """Moves the world on, and notes what a reader can tell: whoever acts together is in one place, so that where one of
        them is known to be the others are, with what they carry. What this says of *earlier* places is not followed up."""
        kind, who, what, to = event
        if kind == "go":
            self.place[who] = to
            for name in (who, *self.load(who)):
                self.told[name].append(to)
            return
        if kind == "drop":
            self.place[what] = self.place[self.holder.pop(what)]
        else:
            self.holder[what] = to or who
        present = {who, what, to or who, *self.load(who), *self.load(to)}
        if any(self.told[name] for name in present):
            for name in present:
                self.told[name] = self.told[name] or [self.place[who]]


def whereabouts(kind: str, scene: Scene, events: list[Event]) -> list[Event]:
    """Where people ("go") or objects ("is") are now."""
    if kind == "go":
        return [Event("go", who, to=scene.told[who][-1]) for who in scene.people if scene.told[who]]
    return [Event("is", "", what, scene.told[what][-1]) for what in scene.objects if scene.told[what]]


def places_before(scene: Scene, events: list[Event]) -> list[Event]:
    """Where objects were before each place. Before the first one nobody knows (""): a question for that place is unclear."""
    ways = {what: ["", *scene.told[what]] for what in scene.objects}
    return [Event("was", later, what, before) for what, way in ways.items() for before, later in itertools.pairwise(way)]


def gifts(scene: Scene, events: list[Event]) -> list[Event]:
    """Who gave what to whom."""
    return [event for event in events if event.kind == "give"]


Tale = tuple[list[Event], list[Event]]  # what is told, and what is true


def live(weights: dict[str, int], truths: Callable, world: World, n: int, rng: random.Random) -> Tale:
    """n things happen among four people, three objects and six places. The facts do not tell where all of them start."""
    people, objects, places = (rng.sample(names, k) for names, k in ((world.people, 4), (world.objects, 3), (world.places, 6)))
    names, events = people + objects, []
    scene = Scene(people, objects, {name: rng.choice(places) for name in names}, {name: [] for name in names})
    for _ in range(n):
        possible = scene.possible(places)
        kinds = [kind for kind in weights if possible[kind]]
        events.append(rng.choice(possible[rng.choices(kinds, [weights[kind] for kind in kinds])[0]]))
        scene.happen(events[-1])
    return events, truths(scene, events)


DIRECTIONS = "north east south west".split()


def both_ways(one: str, side: int, other: str) -> list[Event]:
    return [Event("side", one, DIRECTIONS[side], other), Event("side", other, DIRECTIONS[side - 2], one)]


def lie(world: World, n: int, rng: random.Random) -> Tale:
    """Two places on two sides of a third, each told in one of its two ways; in a row, the outer two have their sides too."""
    (middle, *outer), sides = rng.sample(world.places, 3), rng.sample(range(4), 2)
    ways = [both_ways(place, side, middle) for place, side in zip(outer, sides)]
    in_a_row = both_ways(outer[0], sides[0], outer[1]) if (sides[0] - sides[1]) % 4 == 2 else []
    return [rng.choice(way) for way in ways], [*ways[0], *ways[1], *in_a_row]


CARRYING = {"go": 6, "take": 3, "drop": 2}
TALES: dict[str, Callable[[World, int, random.Random], Tale]] = {
    "qa1": functools.partial(live, {"go": 1}, functools.partial(whereabouts, "go")),
    "qa2": functools.partial(live, CARRYING, functools.partial(whereabouts, "is")),
    "qa3": functools.partial(live, CARRYING, places_before),
    "qa4": lie,
    "qa5": functools.partial(live, {"go": 3, "take": 3, "drop": 1, "give": 4}, gifts),
}


def make_story(task: str, world: World, rng: random.Random, most: int = 60) -> Story:
    """A story of at most `most` facts (but no fewer than the task's least), and a question with one right answer."""
    (low, high), clear = world.facts[task], []
    while not clear:
        events, truths = TALES[task](world, rng.randint(low, max(low, min(high, most))), rng)
        asked: dict[str, set] = {}  # question -> each (answer, truth) that fits it
        for text, truth in itertools.product(world.questions[task], truths):
            question, target = truth.said(text).split("? ")
            asked.setdefault(question + "?", set()).add((target, truth))
        found = [(question, *fitting.pop()) for question, fitting in asked.items() if len(fitting) == 1]
        clear = [(question, target, truth) for question, target, truth in found if target]
    facts = [event.said(rng.choice(world.sentences[event.kind])) for event in events]
    return Story(facts, *rng.choice(clear))


BABI_LINE = re.compile(r"(\d+) ([^\t]*\S[^\t]*)(?:\t([^\t]*\S[^\t]*)\t[\d ]+)?")


def find_babi(folder: Path, task: str) -> Path:
    """The file of a task: in the folder itself, or else in a folder below it, best in en-10k, which BABILong reads."""
    files = folder.rglob(f"{task}_*train.txt")
    ranked = sorted(files, key=lambda file: (file.parent != folder, file.parent.name != "en-10k", file))
    if not ranked:
        raise UserError(f"no {task}_*train.txt of bAbI in the folder {folder}.")
    return ranked[0]


@functools.lru_cache
def read_babi(folder: Path, task: str) -> list[Story]:
    """bAbI's own stories: each question with all facts of its story so far, without the earlier questions."""
    path = find_babi(folder, task)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}.") from None
    samples, facts, last = [], [], 0
    for i, line in enumerate(lines, 1):
        parts = BABI_LINE.fullmatch(line)
        number, text, target = parts.groups() if parts else (-1, "", None)
        facts, expected = ([], 1) if number == "1" else (facts, last + 1)
        last = int(number)
        if last != expected or (target and not facts):
            raise UserError(f"{path}, line {i}: not bAbI's NUMBER FACT, or NUMBER QUESTION, TAB, ANSWER, TAB, NUMBERS.")
        if target:
            samples.append(Story(facts, text, target.strip()))
        else:
            facts = [*facts, text.strip()]
    return samples


class Wording(NamedTuple):
    instruction: str
    post_prompt: str
    examples: list[str]  # facts, question and answer
    gap: str = "\n"  # between two examples


FROM_FACTS = "You need to answer the question based only on the information from the facts."
CARRIED = (
    "\nIf a person got an item in the first location and travelled to the second location the item is also in the second "
    "location. If a person dropped an item in the first location and moved to the second location the item remains in the "
    "first location."
)
ANSWER_FORMAT, NOTHING_ELSE = "Always return your answer in the following format: ", " Do not write anything else after that."
BABILONG_WORDING = {
    "qa1": Wording(
        "I will give you context with the facts about positions of different persons hidden in some random text and a "
        f"question. {FROM_FACTS} If a person was in different locations, use the latest location to answer the question.",
        f"{ANSWER_FORMAT}The most recent location of ’person’ is ’location’.{NOTHING_ELSE}",
        [
            "Charlie went to the hallway. Judith come back to the kitchen. Charlie travelled to balcony. "
            "Where is Charlie? The most recent location of Charlie is balcony.",
            "Alan moved to the garage. Charlie went to the beach. Alan went to the shop. Rouse travelled to balcony. "
            "Where is Alan? The most recent location of Alan is shop.",
        ],
        gap="\n\n",
    ),
    "qa2": Wording(
        "I give you context with the facts about locations and actions of different persons hidden in some random text and a "
        f"question.{FROM_FACTS}{CARRIED}",
        f"{ANSWER_FORMAT}The ’item’ is in ’location’.{NOTHING_ELSE}",
        [
            "Charlie went to the kitchen. Charlie got a bottle. Charlie moved to the balcony. "
            "Where is the bottle? The bottle is in the balcony.",
            "Alan moved to the garage. Alan got a screw driver. Alan moved to the kitchen. "
            "Where is the screw driver? The screw driver is in the kitchen.",
        ],
    ),
    "qa3": Wording(
        "I give you context with the facts about locations and actions of different persons hidden in some random text and a "
        f"question. {FROM_FACTS}{CARRIED}",
        f"{ANSWER_FORMAT}Before the $location_1$ the $item$ was in the $location_2$.{NOTHING_ELSE}",
        [
            "John journeyed to the bedroom. Mary grabbed the apple. Mary went back to the bathroom. Daniel journeyed to the "
            "bedroom. Daniel moved to the garden. Mary travelled to the kitchen. "
            "Where was the apple before the kitchen? Before the kitchen the apple was in the bathroom.",
            "John went back to the bedroom. John went back to the garden. John went back to the kitchen. Sandra took the "
            "football. Sandra travelled to the garden. Sandra journeyed to the bedroom. "
            "Where was the football before the bedroom? Before the bedroom the football was in the garden.",
        ],
    ),
    "qa4": Wording(
        "I will give you context with the facts about different people, their location and actions, hidden in some random text "
        f"and a question. {FROM_FACTS}",
        f"Your answer should contain only one word - location.{NOTHING_ELSE}",
        [
            "The hallway is south of the kitchen. The bedroom is north of the kitchen. What is the kitchen south of? bedroom",
            "The garden is west of the bedroom. The bedroom is west of the kitchen. What is west of the bedroom? garden",
        ],
    ),
    "qa5": Wording(
        "I will give you context with the facts about locations and their relations hidden in some random text and a question. "
        f"{FROM_FACTS}",
        f"Your answer should contain only one word.{NOTHING_ELSE} Do not explain your answer.",
        [
            "Mary picked up the apple there. Mary gave the apple to Fred. Mary moved to the bedroom. Bill took the milk there. "
            "Who did Mary give the apple to? Fred",
            "Jeff took the football there. Jeff passed the football to Fred. Jeff got the milk there. Bill travelled to the "
            "bedroom. Who gave the football? Jeff",
            "Fred picked up the apple there. Fred handed the apple to Bill. Bill journeyed to the bedroom. Jeff went back to "
            "the garden. What did Fred give to Bill? apple",
        ],
    ),
}
BABILONG_TEMPLATE = "{instruction}\n\n{examples}\n\n{post_prompt}\n\n<context>\n{context}\n</context>\n\nQuestion: {question}"


def shown_as(form: str, examples: list[str]) -> list[str]:
    return [form.format(*re.fullmatch(r"(.*\.) (.*\?) (.*)", example).groups()) for example in examples]


def original_prompt(task: str, context: str, question: str, shots: int = 3) -> str:
    """BABILong's own prompt, with all of the task's examples."""
    words, form = BABILONG_WORDING[task], "<example>\n{} {}\nAnswer: {}\n</example>"
    parts = {"instruction": words.instruction, "examples": words.gap.join(shown_as(form, words.examples[:shots]))}
    parts |= {"post_prompt": words.post_prompt, "context": context.strip(), "question": question}
    return BABILONG_TEMPLATE.format(**parts).strip()


HARNESS_CHANGES = {"qa2": {"I give you": "I will give you", "question.You": "question. You"}}  # and none in the others' words


def harness_prompt(task: str, context: str, question: str, shots: int = 2) -> str:
    """lm-evaluation-harness's: the same words in other places."""
    words = BABILONG_WORDING[task]
    instruction, post_prompt = words.instruction.replace("\n", " "), words.post_prompt.replace("’", "'")
    for old, new in HARNESS_CHANGES.get(task, {}).items():
        instruction = instruction.replace(old, new)
    head = instruction + "\n" + post_prompt.replace("format: ", "format:\n")
    asked = f"{context.strip()}\n{question.strip()}"
    return "\n\n".join([head, *shown_as("{}\n{} {}", words.examples[:shots]), asked])


BABILONG_PROTOCOLS = {"original": (original_prompt, 20), "harness": (harness_prompt, 16)}  # and how many tokens to generate

# What hides the facts if the user gives no text. It names none of the tasks' people, objects and places.
BACKGROUND = """
Rain had fallen since the early morning, and the old road was covered with brown leaves. The ferry left the harbour an hour
late because the captain was waiting for a letter. Nobody in the village could remember a winter that had lasted as long as
this one. At the edge of the forest stood a low stone wall which the shepherds had built long ago. She counted the coins twice,
wrote the sum into a small black book and closed the drawer. A flock of geese crossed the valley and disappeared behind the
hills before the sun went down. Would the bridge be strong enough to carry the heavy carts across the river in spring? The
baker opened his shop at five, when the streets were still dark and quite empty. Two children had tied a paper boat to a string
and pulled it slowly along the bank. In those days a journey to the coast took a week, and few people made it twice. The clock
in the tower struck nine, although everybody knew that it was nearly ten. He had learned to mend nets from his grandfather, who
had never once been out at sea. A cold wind came through the broken window and blew the candle out for the third time. The
letter was so badly written that it took three of us an evening to read it. Behind the mill the water was deep and green, and
the boys were told to keep away. Every summer a travelling circus put up its tents on the meadow beside the railway station.
What a strange thing it is to come back to a town where every house has changed! The soup was thin, the bread was hard, but
nobody who sat at that table complained. An old map on the wall showed islands which no sailor had ever been able to find. The
train stopped between two fields for no reason that any of the passengers could see. Snow lay on the roofs until the middle of
April, and the wells were frozen every night. They spoke little on the way up, for the path was steep and the stones were
loose. A lamp burned in the topmost window of the lighthouse, as it had done for sixty years. The teacher asked them to draw a
tree, and not two of the drawings looked alike. Toward evening the fog grew so thick that the driver walked ahead of the horses
with a lantern.
"""


@functools.lru_cache
def sentences_of(text: str) -> list[list[str]]:
    """The words of each sentence that has at least ten. (The original splits with an untrained Punkt model, by tokens.)"""
    sentences = [sentence.split() for sentence in re.split(r"(?<=[.!?])\s+", text)]
    sentences = [words for words in sentences if len(words) >= 10]
    if not sentences:
        raise UserError("the text of --haystack has no sentence of at least ten words to hide facts between.")
    return sentences


def stretch(sentences: list[list], start: int, size: int) -> list[list]:
    """`size` words or ids of sentences from number `start` on, round and round; the last sentence is cut to fit."""
    taken: list[list] = []
    while size > 0:
        taken.append(sentences[(start + len(taken)) % len(sentences)][:size])
        size -= len(taken[-1])
    return taken


def hide(facts: list[list], spots: list[float], background: list[list]) -> list:
    """Facts in order among background sentences, joined. Spots in [0, 1) choose the places, two facts may have one: so a
    larger background is the same draw."""
    pieces = list(background)
    for fact, spot in zip(reversed(facts), sorted(spots, reverse=True)):
        pieces.insert(int(spot * (len(background) + 1)), fact)
    return list(itertools.chain(*pieces))


def babilong(task: str, rng: random.Random, index: int, length: int, style: Style) -> Draft:
    """Like the original, stories keep to 8 tokens a fact of what the prompt's own words leave, some 300 tokens."""
    most = (length - 300) // 8
    if style.babi is None:
        story = make_story(task, BABI_WORLDS[task], rng, most)
    else:
        # Mixed, for up to five questions in a row are about one story.
        stories = [story for story in shuffled(read_babi(style.babi, task)) if len(story.facts) <= most]
        if index >= len(stories):
            room = f"at most {max(most, 0)} facts, the room in --lengths {length}"
            raise UserError(f"babilong_{task}: {style.babi} has {len(stories)} questions after {room}: lower --samples.")
        story = stories[index]
    sentences = sentences_of(BACKGROUND if style.haystack is None else style.haystack)
    start, spots = rng.randrange(len(sentences)), [rng.random() for _ in story.facts]
    facts, (prompt, tokens) = [fact.split() for fact in story.facts], BABILONG_PROTOCOLS[style.protocol]

    def render(size: int) -> tuple[str, None]:
        return prompt(task, " ".join(hide(facts, spots, stretch(sentences, start, size))), story.question), None

    return Draft(render, 0, tokens, (story.target,), asked=story.question)


BABILONG = {f"babilong_{task}": functools.partial(babilong, task) for task in TALES}

# The same worlds as tasks of the tiny vocabulary: name -> tokens that a story, its question and its answer may take.
FACT_TASKS = {"qa1": 48, "qa2": 64, "qa3": 72, "qa4": 36, "qa5": 96}


def fact_example(task: str, index: int, length: int, seed: int) -> Example:
    """Example `index`, whatever the others: exactly `length` tokens, so that examples batch without padding."""
    if length < FACT_TASKS[task]:
        raise UserError(f"{task} needs at least {FACT_TASKS[task]} tokens; a length of {length} is too short for it.")
    rng, used, encode = random.Random(f"{seed} {task} {length} {index}"), math.inf, TOKENIZER.encode_ordinary
    while used > FACT_TASKS[task]:
        story = make_story(task, SMALL_WORLDS[task], rng)
        answer = story.truth.said(SMALL.sentences[story.truth.kind][0])
        *facts, question, response = map(encode, [*story.facts, f" Question: {story.question} Answer:", answer])
        used = sum(map(len, facts)) + len(question) + len(response) + 1
    filler = stretch([encode(text) for text in FILLER], 1, length - used)
    prompt = hide(facts, [rng.random() for _ in facts], filler) + question
    return Example(prompt, [*response, EOS], (answer.strip(" ."),))


BENCHMARKS: dict[str, Callable[[random.Random, int, int, Style], Draft]] = {**RULER, **BABILONG}


# ---- command lines: shared by the three programs ---------------------------------------------------------------------------


def whole(low: int, high: int | None = None, multiple: int = 1) -> Callable[[str], int]:
    """argparse type: a whole number in a range."""

    def parse(text: str) -> int:
        value = int(text) if text.lstrip("-").isdigit() else None
        if value is None or value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(
                f"{text} is not a whole number of at least {low}" + (f" and at most {high}" if high else "")
            )
        if value % multiple:
            raise argparse.ArgumentTypeError(f"{text} is not a multiple of {multiple}")
        return value

    return parse


def real(low: float, high: float = math.inf) -> Callable[[str], float]:
    """argparse type: a finite number in a range."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and low <= value <= high):
            raise argparse.ArgumentTypeError(f"{text} is not a number from {low} to {high}")
        return value

    return parse


class Parser(argparse.ArgumentParser):
    """argparse with one line for an error, and no abbreviated flags."""

    def __init__(self, description: str):
        super().__init__(description=description, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def error(self, message: str):
        raise UserError(f"{message}. --help lists the flags.")


def guarded(run: Callable[[], None]) -> None:
    """Runs a command; what the user can mend becomes one line on stderr and exit code 2."""
    try:
        run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError as error:
        lower = (
            "lower --batch or --max-length, or add --checkpoint-activations or --load-4bit; for an answer, shorten the prompt"
        )
        print(f"error: out of GPU memory ({str(error).splitlines()[0]}): {lower}.", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; what was saved is kept: memdlm.py --resume goes on there, eval_niah.py by itself.", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has gone, e.g. `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def pick_device(name: str) -> str:
    """--device: "auto" takes the first of cuda, mps and cpu that is there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(device for device, there in available.items() if there)
    if not available[name]:
        raise UserError(f"--device {name} is not available on this machine; leave --device out to choose automatically.")
    return name
