"""
tokenizer.py: a published backbone's tokenizer, read from its tokenizer.json without `transformers`.

A byte-level BPE tokenizer cuts text into pieces with a regex and then merges the bytes of each
piece, pair by pair, in a fixed order. `tiktoken` does both quickly, but wants the tokens in another
form than tokenizer.json has them. This file translates exactly: either every text gets the ids that
Hugging Face's `tokenizers` library gives it, or `load_tokenizer` says what it cannot express.
No text that a user types ever becomes a special token, in a chat template no more than elsewhere.

Reading list: byte pair encoding, Sennrich et al. 2015, arXiv 1508.07909; its use on bytes, the
GPT-2 report (Radford et al. 2019, Sec. 2.2); tiktoken's README.

Glossary
  name here   | meaning
  id          | a row of the embedding: what a model reads and writes; may leave gaps, in any order
  rank        | a token's place in the order of merges, tiktoken's own number of it; ids[rank] = id
  special     | an added token that is [MASK], EOS or markup: typed text never yields it
  ends        | the special tokens that end an answer: EOS, and those that end an assistant's turn
  added       | any other token beside the merges; it is looked for in the text before they begin
  added_later | the same, but looked for after the normalizer ("normalized": true in the file)
  symbol      | the letter that stands for one byte in the vocabulary of tokenizer.json
"""

import contextlib
import functools
import itertools
import json
import math
import re
import unicodedata
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tiktoken

from full_scale.templates import ADVICE, cover, render, render_pair
from lab.tools import read_json
from model import UserError

# tiktoken's regex gives up at a million blanks in a row. Without the (?<!...), which lets a match
# begin only where the blanks do, the search for them would take quadratic time.
TOO_MANY_BLANKS = re.compile(r"(?<!\s)\s{990000}")

# ---- text to ids and back ------------------------------------------------------------------------


def any_of(tokens: Collection[str]) -> re.Pattern:
    """Finds these strings, leftmost and then longest first, as the `tokenizers` library does."""
    longest_first = sorted(tokens, key=len, reverse=True)
    nothing = "(?!)"
    return re.compile("(" + ("|".join(map(re.escape, longest_first)) or nothing) + ")")


@dataclass(eq=False)
class Tokenizer:
    """Text <-> ids. Special tokens come from the chat template alone, never from typed text."""

    encoding: tiktoken.Encoding  # text -> ranks
    ids: list[int]  # rank -> id
    specials: dict[str, int]
    eos: int
    mask: int
    normalize: Callable[[str], str] = str
    added: dict[str, int] = field(default_factory=dict)
    added_later: dict[str, int] = field(default_factory=dict)
    template: str | None = None  # the chat template, a program in jinja2's language
    names: dict[str, str] = field(default_factory=dict)  # bos_token, ...: a template may print them
    ends: set[int] = field(default_factory=set)

    def __post_init__(self):
        self.added_later = {self.normalize(name): token for name, token in self.added_later.items()}
        # id -> the bytes it stands for. Special tokens have none, nor do rows without a token.
        ordinary = self.added | self.added_later
        self.pieces = {token: text.encode() for text, token in ordinary.items()}
        for rank, token in enumerate(self.ids):
            self.pieces[token] = self.encoding.decode_single_token_bytes(rank)
        self.markup = {token: name.encode() for name, token in self.specials.items()}
        self.ends = {self.eos, *self.ends}
        # One more than the highest id. A backbone's embedding has at least as many rows.
        self.vocab_size = 1 + max(*self.pieces, *self.specials.values())

    def encode(self, text: str) -> list[int]:
        """Ordinary text -> ids, without an EOS. A typed "<|mask|>" is letters and signs.

        Raises UserError for a million blanks in a row, which tiktoken cannot cut.
        """
        if TOO_MANY_BLANKS.search(text):
            raise UserError("the text has a stretch of a million blanks: shorten it.")
        ids = []
        for piece in any_of(self.added).split(text):
            if piece in self.added:
                ids.append(self.added[piece])
                continue
            for part in any_of(self.added_later).split(self.normalize(piece)):
                if part in self.added_later:
                    ids.append(self.added_later[part])
                else:
                    ids += [self.ids[rank] for rank in self.encoding.encode_ordinary(part)]
        return ids

    def encode_prompt(self, text: str) -> list[int]:
        """The text as one user's message, up to the answer; without a template, the text alone.

        Raises UserError where `encode` does, and for a chat template that fails.
        """
        if self.template is None:
            return self.encode(text)
        covered, originals = cover([text], self.specials, self.template)
        return self.encode_rendered(render(self.template, covered, self.names), originals)

    def encode_pair(self, prompt: str, response: str) -> tuple[list[int], list[int]]:
        """A prompt, and the answer to it with what ends a turn; without a template that is EOS.

        As published: the whole conversation's ids, cut where those of the prompt end.
        """
        if self.template is None:
            return self.encode(prompt), [*self.encode(response), self.eos]
        covered, originals = cover([prompt, response], self.specials, self.template)
        mark = any_of(self.specials)
        opened, whole = render_pair(self.template, covered, self.names, mark)
        ids, start = (self.encode_rendered(text, originals) for text in (whole, opened))
        answer = ids[len(start) :]
        if not (whole.startswith(opened) and answer):
            raise UserError(
                f"the backbone's chat template puts no answer behind a prompt: {ADVICE}."
            )
        return ids[: len(start)], answer

    def encode_rendered(self, text: str, originals: dict[str, str]) -> list[int]:
        """What a chat template has made of covered texts: here its markup is special."""
        covered, ids = any_of(originals), []
        for piece in any_of(self.specials).split(text):
            if piece in self.specials:
                ids.append(self.specials[piece])
            else:
                # A token may reach across the border of the template's words and the user's.
                ids += self.encode(covered.sub(lambda found: originals[found[0]], piece))
        return ids

    def decode(self, ids: list[int], stops: Sequence[str] = ()) -> str:
        """The text of an answer, up to the first token that ends one and to the first of `stops`.
        Broken UTF-8 shows as U+FFFD, ids without text do not.

        A stop may name special tokens. So it is looked for before they are dropped, then in what is
        left: "yes<|eot|> no" ends at "<|eot|>", and would be "yes no" without it.
        """
        spelled = []  # each byte, and whether it is text
        for token in itertools.takewhile(lambda token: token not in self.ends, ids):
            text = self.pieces.get(token)
            spelled += [(byte, text is not None) for byte in text or self.markup.get(token, b"")]
        whole = bytes(byte for byte, _ in spelled)
        cut = min((len(whole.partition(stop.encode())[0]) for stop in stops), default=None)
        text = bytes(byte for byte, is_text in spelled[:cut] if is_text).decode(errors="replace")
        for stop in stops:
            text = text.partition(stop)[0]
        return text


def answer_ends(
    specials: dict[str, int], names: dict[str, str], template: str | None, listed: Collection
) -> set[int]:
    """The special tokens that end an answer: what tokenizer_config.json calls eos_token or
    eot_token, the ids that are `listed` as eos_token_id by the checkpoint's other files, and what
    the chat template puts right behind an assistant's text."""
    ends = {names[key] for key in ("eos_token", "eot_token") if names.get(key) in specials}
    if template is not None:
        answer = "0123456789"  # a template may trim or capitalise a text: this one stays
        with contextlib.suppress(UserError):  # one that writes no answers, or fails, names no end
            behind = render(template, ["Hello", answer], names).partition(answer)[2].lstrip()
            if found := any_of(specials).match(behind):
                ends.add(found[0])
    return {token for name, token in specials.items() if name in ends or token in listed}


# ---- tokenizer.json as an exact tiktoken.Encoding ------------------------------------------------

GPT2_REGEX = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# The `tokenizers` library and tiktoken read two dialects of regexes. IN_BOTH matches what means the
# same in both. Refused are for example \w, a possessive {1,3}+, ^ and $, and [...&&...].
ESCAPE = r"\\(?:[pP]\{\w+\}|[sSdDrnt]|[^\w\s])"  # \p{L} \s \n \.
SET = rf"\[\^?(?:{ESCAPE}|(?!&&|--|~~)[^\\\[\]])+\]"  # [^\r\n\p{L}]
GROUP = r"\((?:\?(?:i?:|<?[=!]))?|[)|]"  # ( (?: (?i: (?= (?! (?<= (?<! ) |
REPEAT = r"[?*+][?+]?|\{\d+(?:,\d*)?\}(?![?+])"  # + ?+ *? {1,3}
LITERAL = r"[^\\\[\](){}?*+|^$]"
IN_BOTH = re.compile(f"(?:{ESCAPE}|{SET}|{GROUP}|{REPEAT}|{LITERAL})+")


def split_regex(pre_tokenizer: dict) -> str:
    """The regex that cuts a text into the pieces to be merged, which add up to the text."""
    match pre_tokenizer:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": own}:
            return GPT2_REGEX if own else r"[\s\S]+"
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": regex}, "behavior": how, "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        } if how == "Isolated" and IN_BOTH.fullmatch(regex):
            # What lies between two matches is a piece too; tiktoken would drop it.
            return rf"(?:{regex})|(?:(?!{regex})[\s\S])+"
    raise ValueError(f"its pre_tokenizer is not supported: {json.dumps(pre_tokenizer)[:500]}")


def check_pipeline(spec: dict) -> None:
    """Refuses, by name, what would make tiktoken's ids differ from the `tokenizers` library's."""
    model, normalizer = spec["model"], spec.get("normalizer")
    if model["type"] != "BPE":
        raise ValueError(f"a {model['type']} model is not supported, byte-level BPE alone is")
    affixes = ("continuing_subword_prefix", "end_of_word_suffix")
    for name in ("dropout", "unk_token", "byte_fallback", *affixes):
        if model.get(name):
            raise ValueError(f"{name} = {model[name]!r} is not supported")
    if normalizer and normalizer["type"] not in ("NFC", "NFD", "NFKC", "NFKD"):
        raise ValueError(f"the normalizer {normalizer['type']} is not supported")
    post_processor = spec.get("post_processor") or {"processors": []}
    for step in post_processor.get("processors", [post_processor]):
        # ByteLevel changes only offsets. A TemplateProcessing lists the parts of a single text.
        parts = json.dumps(step.get("single", "SpecialToken"))
        if step["type"] != "ByteLevel" and "SpecialToken" in parts:
            raise ValueError(f"a post_processor that adds tokens ({step['type']}) is not supported")


def byte_symbols() -> dict[str, int]:
    """Symbol -> byte. It is the byte's own character if printable, else the next from U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = {chr(byte): byte for byte in printable}
    return symbols | {chr(256 + i): byte for i, byte in enumerate(others)}


def last_merge(token: str, rules: dict[tuple[str, str], int]) -> int | None:
    """The last rule used when the token's symbols are merged; None if they do not become one.

    rules: pair -> its number. The earliest rule goes first, and its leftmost place.
    """
    parts, rule = list(token), None
    while len(parts) > 1:
        found = [rules.get(pair, math.inf) for pair in itertools.pairwise(parts)]
        rule = min(found)
        if rule == math.inf:
            return None
        place = found.index(rule)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return rule


def order_of_merges(model: dict, added: Collection[str]) -> tuple[list[bytes], list[int]]:
    """The tokens (bytes) of a byte-level BPE in the order of tiktoken's ranks, and their ids.

    tokenizer.json has rules for pairs. tiktoken merges any two neighbours that together spell a
    token, lowest rank first. Both agree if a token's rank is the last rule used when its own bytes
    are merged: once two neighbours spell a token, all merges inside of them were that token's
    alone, so that the rules end by merging just these two. A token that its own bytes do not merge
    to is left out, for by the same argument no text ever yields it.
    """
    vocab, symbols = model["vocab"], byte_symbols()
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    # Of two equal rules the later one counts.
    rules = {(left, right): rule for rule, (left, right) in enumerate(pairs)}
    last_rule = {left + right: last_merge(left + right, rules) for left, right in rules}
    missing = {*symbols, *itertools.chain(*rules), *last_rule} - vocab.keys()
    if missing:
        raise ValueError(f"its vocabulary lacks {min(missing)!r}, which a byte or a merge needs")
    made = [token for token, rule in last_rule.items() if rule is not None]
    tokens = [*symbols, *sorted(made, key=last_rule.get)]
    unmade = vocab.keys() - tokens - added
    if model.get("ignore_merges") and unmade:  # it takes a whole piece that is such a token
        raise ValueError(f"ignore_merges with {min(unmade)!r}, which is no merge, is not supported")
    spelled = [bytes(symbols[symbol] for symbol in token) for token in tokens]
    return spelled, [vocab[token] for token in tokens]


# ---- added tokens and the chat template, from both files -----------------------------------------


def strings(value: object) -> Iterator[str]:
    """All strings inside a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings(item)


def named_tokens(config: dict, added: Collection[str]) -> dict[str, str]:
    """The tokens that tokenizer_config.json gives a name. LLaDA's files give [MASK] none."""
    names = {}
    for key, entry in config.items():
        token = entry.get("content") if isinstance(entry, dict) else entry
        if key.endswith("_token") and isinstance(token, str):
            names[key] = token
    for known in ("<|mdm_mask|>", "<|mask|>"):
        if known in added:
            names.setdefault("mask_token", known)
    for key in ("eos_token", "mask_token"):
        if names.get(key) not in added:
            raise ValueError(f"its tokenizer_config.json names no {key} that is an added token")
    return names


def sort_added(spec: dict, config: dict) -> dict:
    """The fields specials, eos, mask, added, added_later and names of `Tokenizer`.

    An added token is special if either file says so, or if its string stands in a chat template or
    among the named tokens (pad_token, ...). The latter is for files that call their own markup
    ordinary: otherwise a user could type a turn of the assistant.
    """
    decoder = config.get("added_tokens_decoder", {})
    listed = [{**token, "id": int(number)} for number, token in decoder.items()]
    listed += spec.get("added_tokens", [])
    added = {token["content"]: token for token in listed}  # of two entries tokenizer.json's counts
    names = named_tokens(config, added)
    special = {token["content"] for token in listed if token.get("special")}
    roles = [config[key] for key in config if key.endswith(("_token", "_tokens", "chat_template"))]
    markup = [names["mask_token"], *strings(roles)]
    fields: dict = {"specials": {}, "added": {}, "added_later": {}, "names": names}
    for name, token in added.items():
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
            raise ValueError(f"its added token {name!r} has lstrip, rstrip or single_word")
        kind = "added_later" if token.get("normalized") else "added"
        if name in special or any(name in text for text in markup):
            kind = "specials"
        fields[kind][name] = token["id"]
    fields["eos"] = fields["specials"][names["eos_token"]]
    fields["mask"] = fields["specials"][names["mask_token"]]
    return fields


def listed_ends(folder: Path) -> list:
    """The eos_token_id, one or several, of config.json and generation_config.json, if any."""
    found = []
    for file in (folder / "config.json", folder / "generation_config.json"):
        listed = read_json(file).get("eos_token_id") if file.exists() else None
        found += listed if isinstance(listed, list) else [listed]
    return found


def build_tokenizer(spec: dict, config: dict, plain: bool, listed: Collection) -> Tokenizer:
    """Both files' contents -> Tokenizer, or a ValueError that says what cannot be expressed."""
    check_pipeline(spec)
    template, fields = config.get("chat_template"), sort_added(spec, config)
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
        if template is None and not plain:
            raise ValueError("none of its chat templates is named default")
    beside_merges = {*fields["specials"], *fields["added"], *fields["added_later"]}
    fields["ends"] = answer_ends(fields["specials"], fields["names"], template, listed)
    tokens, ids = order_of_merges(spec["model"], beside_merges)
    both = set(ids) & set(fields["specials"].values())
    if both:
        raise ValueError(f"the special token {min(both)} is an ordinary one too")
    encoding = tiktoken.Encoding(
        "backbone",
        pat_str=split_regex(spec["pre_tokenizer"]),
        mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
        special_tokens={},
    )
    if spec.get("normalizer"):
        fields["normalize"] = functools.partial(unicodedata.normalize, spec["normalizer"]["type"])
    return Tokenizer(encoding, ids, template=None if plain else template, **fields)


def load_tokenizer(folder: Path, plain: bool = False) -> Tokenizer:
    """The exact tokenizer of a downloaded backbone, or a UserError that says what is in the way.

    plain: leave the chat template out, so that a prompt is encoded as it stands.
    """
    folder = Path(folder)
    spec, config = read_json(folder / "tokenizer.json"), read_json(folder / "tokenizer_config.json")
    try:
        own_file = folder / "chat_template.jinja"  # goes first, as in Hugging Face's library
        if own_file.exists():
            config["chat_template"] = own_file.read_text(encoding="utf-8")
        tokenizer = build_tokenizer(spec, config, plain, listed_ends(folder))
        tokenizer.encode_prompt("Hello")  # a template that fails shall do so before any work begins
        return tokenizer
    except (ValueError, OSError) as error:
        raise UserError(f"the tokenizer in {folder} cannot be used: {error}.") from None
    except (LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"the tokenizer in {folder} is malformed ({error!r}).") from None
