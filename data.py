"""
data.py: tokenizers (the tiny one and those of real backbones), four small reading tasks in plain English, the user's own
pairs, and batches of them.

Every example of the tiny run is a haystack of sentences, a question about a few of them (the needles), and an answer of
several tokens:

  task   after                 needles in the haystack                      the answer
  mv     RULER multi-value     " river holds 47." twice for each of 3 keys  " river holds 47. river holds 92."
  vt     RULER var. tracking   " alpha = 47. beta = alpha." ... 2 chains    " alpha = 47. beta = alpha. gamma = beta."
  cwe    RULER common words    " lamp." four times, other words once        " lamp stone."
  babi   bAbI who is where     " Mary went home."; the last move counts     " Mary went home. John went north."

Between the needles stands a filler that repeats three sentences, as RULER's "noise" haystack does: a longer example is the
same problem with more filler. That the filler is *predictable* matters when a prompt is written into the weights
(Sec. 4.5): on random filler there would be nothing but noise to write.

Reading list: RULER, Hsieh et al. 2024, arXiv 2404.06654; bAbI, Weston et al. 2015, arXiv 1502.05698; LongAlpaca, Chen et
al. 2023, arXiv 2309.12307; byte pair encoding, Sennrich et al. 2015, arXiv 1508.07909, and on bytes, the GPT-2 report
(Radford et al. 2019, Sec. 2.2); tiktoken's README; Hugging Face's "Chat templates".

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
"""

import argparse
import functools
import itertools
import json
import math
import os
import re
import sys
import unicodedata
import zlib
from collections.abc import Callable, Collection, Iterator
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


def read_text(path: str | Path) -> str:
    """A --data file's text, or a UserError that names the file."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --data {path}: {error}.") from None


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
        print("interrupted; what was saved is kept (memdlm.py --resume goes on from there).", file=sys.stderr)
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
