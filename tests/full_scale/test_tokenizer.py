"""The tokenizers of published backbones, against the `tokenizers` library, and chat templates."""

import itertools
import json
import random
import re
import time
from pathlib import Path

import pytest
import tokenizers
from backbones import TOKENIZER
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast

from full_scale.tokenizer import Tokenizer, load_tokenizer
from model import UserError

TOY = load_tokenizer(TOKENIZER)
LIBRARY = PreTrainedTokenizerFast.from_pretrained(TOKENIZER)
SPEC = json.loads((TOKENIZER / "tokenizer.json").read_text())
CONFIG = json.loads((TOKENIZER / "tokenizer_config.json").read_text())
LING_REGEX = SPEC["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
GPT2 = BYTES | {"use_regex": True}
POSSESSIVE = r"[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++|\s*[\r\n]|\s+(?!\S)|\s+"


def split(regex: str, behavior: str = "Isolated") -> dict:
    """The pre-tokenizer of LLaDA's kin: a regex, then bytes."""
    cut = {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": False}
    return {"type": "Sequence", "pretokenizers": [cut, BYTES]}


BOS = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}]}
NO_BOS = {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}]}
PRE_TOKENIZERS = {
    "Ling": split(LING_REGEX),
    "possessive": split(POSSESSIVE),
    "words only": split(r"\p{L}+|\d{1,3}"),  # signs and blanks lie between two matches
    "GPT-2": GPT2,
    "whole text": BYTES,
}


def loaded(folder: Path, spec: dict = SPEC, plain: bool = False, **config) -> Tokenizer:
    """Both files written to a folder and read from there."""
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG | config))
    return load_tokenizer(folder, plain)


def added(first_id: int, *contents: str, **changes) -> list[dict]:
    """Entries of added_tokens, ordinary ones unless `changes` says otherwise."""
    entry = {**SPEC["added_tokens"][0], "special": False, **changes}
    return [{**entry, "id": first_id + i, "content": text} for i, text in enumerate(contents)]


def library_of(spec: dict, specials_as_text: bool = True):
    """A function text -> ids: the `tokenizers` library, special tokens taken as ordinary text."""
    library = tokenizers.Tokenizer.from_str(json.dumps(spec))
    library.encode_special_tokens = specials_as_text
    return lambda text: library.encode(text, add_special_tokens=False).ids


SNIPPETS = "the The it's I'LL don'T 'ſ 12345 ² Ⅷ ٣ naïve e\u0301 ﬁ 東京 🙂 👩‍👩‍👧 \u200b".split()
SNIPPETS += "\u212b Ｗｉｄｅ \uac00 -- ... !? _ x==y <|mas".split()
SNIPPETS += ["\u3000", "\u00a0", "\u0085", "\r\n", "\n\n", "\t", " ", "  ", "   "]
UNICODE = [*range(0xD800), *range(0xE000, 0x110000)]


def random_texts(n: int) -> list[str]:
    """Words, contractions, digits, blanks, many scripts, characters drawn from all of Unicode."""
    rng, texts = random.Random(0), []
    for _ in range(n):
        parts = rng.choices(SNIPPETS, k=rng.randrange(1, 40))
        parts += map(chr, rng.choices(range(32, 0x700), k=4) + rng.choices(UNICODE, k=4))
        rng.shuffle(parts)
        texts.append("".join(parts))
    return texts


def spec_with_merges(merges: list[str], ignore_merges: bool = False) -> dict:
    """A tokenizer.json with merges such as "ab c" in this order, its ids in a random one."""
    made = [merge.replace(" ", "") for merge in merges]
    tokens = list(dict.fromkeys(sorted(pre_tokenizers.ByteLevel.alphabet()) + made))
    random.Random(3).shuffle(tokens)
    vocab = {token: 1000 + i for i, token in enumerate(tokens)}
    model = {**SPEC["model"], "vocab": vocab, "merges": merges, "ignore_merges": ignore_merges}
    return {**SPEC, "model": model, "pre_tokenizer": BYTES}


def test_recorded_ids_are_reproduced(tmp_path):
    """Also with post-processors that add no tokens: they change offsets, not ids."""
    records = json.loads((TOKENIZER / "token_ids.json").read_text())
    for processor in (None, GPT2, NO_BOS, {"type": "Sequence", "processors": [NO_BOS]}):
        tokenizer = loaded(tmp_path, SPEC | {"post_processor": processor})
        assert [tokenizer.encode(r["text"]) for r in records] == [r["ids"] for r in records]


@pytest.mark.parametrize("form", [None, "NFC", "NFD", "NFKC", "NFKD"])
@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_ids_equal_the_tokenizers_library(tmp_path, name, form):
    """Any two neighbouring bytes have a merge, so that no cut between two pieces goes unseen."""
    texts = [*random_texts(200), "a <|mask|>b<|role_end|>"]
    to_symbols = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    symbols = [to_symbols.pre_tokenize_str(text)[0][0] for text in texts]
    pairs = {pair for text in symbols for pair in itertools.pairwise(text)}
    spec = spec_with_merges([" ".join(pair) for pair in sorted(pairs)])
    spec |= {"pre_tokenizer": PRE_TOKENIZERS[name], "normalizer": form and {"type": form}}
    ours, library = loaded(tmp_path, spec), library_of(spec)
    for text in ["", *texts]:
        assert ours.encode(text) == library(text), text
        assert form or ours.decode(ours.encode(text)) == text


def test_any_list_of_merges_is_exact(tmp_path):
    """Any two tokens, several rules for one, in any order: some of them are never made."""
    rng = random.Random(0)
    for _ in range(300):
        tokens, merges = list("abc"), []
        for _ in range(rng.randrange(1, 18)):
            left, right = rng.choices(tokens, k=2)
            if len(left + right) < 9:
                merges.append(f"{left} {right}")
                tokens.append(left + right)
        if rng.random() < 0.5:
            rng.shuffle(merges)
        spec = spec_with_merges(merges)
        ours, library = loaded(tmp_path, spec), library_of(spec)
        for length in range(1, 40):
            text = "".join(rng.choices("abc", k=length))
            assert ours.encode(text) == library(text), (merges, text)
    spec = spec_with_merges(["a b", "ab c"], ignore_merges=True)
    for text in ("abc", "abcab", "bca", "ab", "aab"):
        assert loaded(tmp_path, spec).encode(text) == library_of(spec)(text)


def test_ordinary_added_tokens_are_found_in_text(tmp_path):
    """Looked for before (normalized: false) or after the normalizer; the longest one first."""
    words, later = ["<think>", "<think>x", "the"], ["<tool>", "é!", "e\u0301?"]
    entries = added(526, *words, normalized=False) + added(529, *later, normalized=True)
    spec = SPEC | {"added_tokens": SPEC["added_tokens"] + entries, "normalizer": {"type": "NFC"}}
    ours, library = loaded(tmp_path, spec), library_of(spec)
    parts = [*words, *later, "<think>\u0338", "<tool>\u0338", "é?", "x", " ", "\u0301", "<", "e"]
    for seed in range(500):
        text = "".join(random.Random(seed).choices(parts, k=6))
        assert ours.encode(text) == library(text), text
    assert ours.decode([526, 527, 528]) == "<think><think>xthe"
    more = loaded(tmp_path, spec, added_tokens_decoder={"540": {"content": "<late>"}})
    assert more.encode("<late>") == [540], "tokenizer_config.json may add tokens of its own"
    assert (ours.vocab_size, more.vocab_size) == (532, 541)


def test_decode_ends_at_eos_and_skips_what_has_no_text():
    yes, no = TOY.encode("yes"), TOY.encode("no")
    assert TOY.decode([*yes, TOY.eos, *no]) == "yes"
    assert TOY.decode([*yes, TOY.mask, TOY.specials["<role>"], 575, 10**6, *no]) == "yesno"
    assert TOY.decode([*TOY.encode("東")[:1], *yes]) == "\ufffdyes"


def test_decode_looks_for_ends_and_stops_before_special_tokens_are_dropped():
    """ "yes", end of turn, "no" is "yes". What is left when they are dropped is searched, too."""
    yes, role, no = TOY.encode("yes"), TOY.specials["<role>"], TOY.encode("no")
    assert TOY.decode([*yes, TOY.specials["<|role_end|>"], *no]) == "yes"
    said = [*yes, role, *no, role, *no]
    assert TOY.decode(said, ["<role>"]) == "yes"
    assert TOY.decode(said, ["nothing", "o<role>no", "s<role>"]) == "ye"
    assert TOY.decode(said, ["non"]) == "yes"
    assert TOY.decode(TOY.encode("a<role>b"), ["b"]) == "a<role>", "typed, it is text"


A_TURN = "{{ messages[0].content }}{% if messages[1] %}{{ messages[1].content | trim }}"
ENDS = {  # what says so -> (the special tokens that end an answer beside EOS, the files)
    "the chat template": (["<|role_end|>"], {}),
    "a template, after a line end": (
        ["</role>"],
        {"chat_template": A_TURN + "\n</role>{% endif %}"},
    ),
    "a template without such a token": ([], {"chat_template": A_TURN + "\nEnd<role>{% endif %}"}),
    "a template that refuses answers": (
        [],
        {"chat_template": A_TURN + "{{ raise_exception('no') }}{% endif %}"},
    ),
    "nothing": ([], {"chat_template": None}),
    "eot_token": (["<role>"], {"chat_template": None, "eot_token": "<role>"}),
    "generation_config.json": (
        ["</role>"],
        {"chat_template": None, "generation_config": ["</role>"]},
    ),
    "config.json, one": (["</role>"], {"chat_template": None, "config": "</role>"}),
    "an ordinary token": ([], {"chat_template": None, "generation_config": ["a"]}),
}


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("source", ENDS)
def test_an_answer_ends_where_the_checkpoint_says_that_a_turn_ends(tmp_path, source, plain):
    names, config = ENDS[source]
    ids = TOY.specials | {"a": TOY.encode("a")[0]}
    for file in ("generation_config", "config"):
        if listed := config.get(file):
            ends = ids[listed] if isinstance(listed, str) else [ids[name] for name in listed]
            (tmp_path / f"{file}.json").write_text(json.dumps({"eos_token_id": ends}))
    tokenizer = loaded(tmp_path, SPEC, plain, **config)
    assert tokenizer.ends == {TOY.eos, *(ids[name] for name in names)}


@pytest.mark.parametrize("text", [" " * 1_000_000, "one two" + "\u3000" * 1_200_000 + "three"])
def test_a_million_blanks_are_one_clear_error(capfd, text):
    """tiktoken would panic at them, and Rust would report that on stderr by itself."""
    for encode in (TOY.encode, TOY.encode_prompt):
        with pytest.raises(UserError, match=r"^the text has a stretch .*\Z"):
            encode(text)
    assert capfd.readouterr().err == "", "the user is to see our line alone"
    assert TOY.decode(TOY.encode(" " * 900_000)) == " " * 900_000


@pytest.mark.parametrize("present", [["<|mask|>"], ["<|mask|>", "<|mdm_mask|>"]])
def test_without_a_mask_token_the_known_names_are_tried(tmp_path, present):
    """LLaDA-8B's <|mdm_mask|> before <|mask|>, also if the file calls it ordinary."""
    assert (TOY.mask, TOY.eos, TOY.vocab_size) == (525, 521, 526), "the toy's config names them"
    spec = SPEC | {"added_tokens": SPEC["added_tokens"][:-1] + added(525, *present)}
    tokenizer = loaded(tmp_path, spec, mask_token=None)
    assert tokenizer.mask == 524 + len(present)
    assert tokenizer.mask not in tokenizer.encode(" ".join(present))


MARKUP = "<new>{{ messages[0].content }}"
SEVERAL = [{"name": "default", "template": "x"}, {"name": "tools", "template": MARKUP}]
ROLES = [
    {"pad_token": "<new>"},
    {"additional_special_tokens": ["<other>", {"content": "<new>"}]},
    {"extra_special_tokens": {"image_token": "<new>"}},
    {"added_tokens_decoder": {"526": {"content": "<new>", "special": True}}},
    {"chat_template": MARKUP},
    {"chat_template": SEVERAL},
]


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("config", ROLES)
def test_what_either_file_uses_as_markup_is_special(tmp_path, config, normalized, plain):
    """tokenizer.json may call its own markup ordinary. Typed, it must not act as markup."""
    entries = added(526, "<new>", "<word>", normalized=normalized)
    spec = SPEC | {"added_tokens": SPEC["added_tokens"] + entries}
    assert loaded(tmp_path, spec, plain).encode("<new><word>") == [526, 527]
    tokenizer = loaded(tmp_path, spec, plain, **config)
    typed = tokenizer.encode("<new>")
    assert 526 not in typed
    assert tokenizer.encode("<word>") == [527]
    if config.get("chat_template") == MARKUP:
        assert tokenizer.encode_prompt("<new>") == (typed if plain else [526, *typed])


MODEL, TOKENS = SPEC["model"], SPEC["added_tokens"]
# What the message must say, and what is put into tokenizer.json or into the other file ("config").
NEVER_MADE = spec_with_merges(["b c", "a b", "ab c"], ignore_merges=True)  # abc is a + bc
REFUSED = [
    ("ignore_merges with .* is not supported", NEVER_MADE),
    ("dropout", {"model": MODEL | {"dropout": 0.1}}),
    ("vocabulary lacks '!'", {"model": MODEL | {"vocab": {}}}),
    ("vocabulary lacks 'nowhere'", {"model": MODEL | {"merges": ["nowhere a"]}}),
    ("pre_tokenizer.*null", {"pre_tokenizer": None}),
    ("pre_tokenizer.*prefix_space", {"pre_tokenizer": GPT2 | {"add_prefix_space": True}}),
    ("pre_tokenizer.*Removed", {"pre_tokenizer": split(LING_REGEX, "Removed")}),
    ("pre_tokenizer.*w+", {"pre_tokenizer": split(r"\w+")}),
    (r"pre_tokenizer.*\{1,3\}", {"pre_tokenizer": split(r"\p{N}{1,3}+")}),
    ("pre_tokenizer.*&&", {"pre_tokenizer": split(r"[\p{L}&&a]")}),
    (r"pre_tokenizer.*\$", {"pre_tokenizer": split(r"\s+$")}),
    ("Parsing error", {"pre_tokenizer": split("a(b")}),
    ("normalizer Lowercase", {"normalizer": {"type": "Lowercase"}}),
    ("post_processor", {"post_processor": {"type": "Sequence", "processors": [BOS]}}),
    ("'<x>'.*lstrip", {"added_tokens": TOKENS + added(526, "<x>", lstrip=True)}),
    ("special token 64 ", {"added_tokens": TOKENS + added(64, "<x>", special=True)}),
    ("no mask_token", {"added_tokens": TOKENS[:-1]}),
    ("no eos_token", {"config": {"eos_token": "<gone>"}}),
    ("malformed", {"config": {"chat_template": 5}}),
    ("default", {"config": {"chat_template": SEVERAL[1:]}}),
]


@pytest.mark.parametrize(("reason", "changes"), REFUSED)
def test_what_cannot_be_exact_is_refused_by_name(tmp_path, reason, changes):
    """One line that says what, and in which folder."""
    with pytest.raises(UserError) as caught:
        loaded(tmp_path, SPEC | changes, **changes.get("config", {}))
    message = str(caught.value)
    assert re.search(reason, message), message
    assert str(tmp_path) in message
    assert "\n" not in message


CONTENT = "{{ messages[0]['content'] }}"
TRIMMED = "{{ messages[0].content | trim }}"
TEMPLATES = {
    "toy": CONFIG["chat_template"],
    "trimmed": f"<role>HUMAN</role>{TRIMMED}<|role_end|><role>ASSISTANT</role>",
    "plain text beside it": f"{{{{ bos_token }}}}USER:{CONTENT}s. ASSISTANT:",
    "upper case": "<role>{{ messages[0].content | upper }}</role>",
    "blocks": "<role>\n  {% for m in messages %}\n{{ m.content }}\n  {% endfor %}\n</role>",
    "json": "<role>{{ messages | tojson }}</role>{% if tools is not none %}tools{% endif %}",
    "json by position": "{{ messages[0] | tojson(true, 4, none, true) }}<role>ASSISTANT</role>",
    "loop control": "{% for m in messages %}{{ m.content }}<role>{% break %}{% endfor %}{{ gone }}",
    "date": "<role>{{ strftime_now('%d %B %Y') }}</role>" + CONTENT,
    "date if any": "{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% endif %}" + CONTENT,
    "generation": "{% set a = 1 %}<role>\n  {% generation -%}\n {% set a = 2 %}{{ a }}"
    f"{CONTENT}\n{{% endgeneration %}}\n{{{{ a }}}}</role>",
    "arithmetic": "{{ '-' * 3 }}{{ 2 ** 3 * 1.5 }}{{ [1] * 2 }}{{ -2 * 3 }}" + CONTENT,
    "jinja2's own": "{{ dict(a=1) | tojson }}{% set n = namespace(x=2) %}{{ n.x }}<role>" + CONTENT,
}
# Whole conversations, turn by turn, with a turn's opening where it is asked for.
EACH, OPEN, END = "{% for m in messages %}", "{% if add_generation_prompt %}", "{% endif %}"
TURN = "<role>{{ m.role }}</role>{{ m.content }}<|role_end|>"
IF_USER = "{% if m.role == 'user' %}"
TURNS = {
    "toy": CONFIG["chat_template"],
    "ChatML": EACH
    + "{{ '<role>' + m.role + '\n' + m.content + '<|role_end|>' + '\n' }}{% endfor %}"
    f"{OPEN}{{{{ '<role>assistant\n' }}}}{END}",
    "Llama": "{{ bos_token }}"
    + EACH
    + "<role>{{ m.role }}</role>\n\n{{ m.content | trim }}<|role_end|>"
    "{% endfor %}" + OPEN + "{{ '<role>assistant</role>\n\n' }}" + END,
    "system": "<role>SYSTEM</role>{{ strftime_now('%Y') }}<|role_end|>" + CONFIG["chat_template"],
    "instructions": EACH + IF_USER + "[INST] {{ m.content }} [/INST]{% else %}"
    " {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}",
    "words": EACH + "{{ m.role + ': ' + m.content }}<|role_end|>{{ ' ' }}{% endfor %}"
    f"{OPEN}{{{{ 'assistant: ' }}}}{END}",  # a token may reach across the last blank
    "never opened": EACH + TURN + "{% endfor %}",
    "generation": EACH + IF_USER + TURN + "{% else %}<role>{{ m.role }}</role>{% generation %}"
    "{{ m.content }}<|role_end|>{% endgeneration %}{% endif %}{% endfor %}"
    f"{OPEN}<role>assistant</role>{END}",
}
# These write an answer as a user's turn, or a prompt otherwise as soon as it is answered.
ROLELESS = EACH + "<role>HUMAN</role>{{ m.content }}{% endfor %}<role>ASSISTANT</role>"
THINKING = TURNS["toy"].replace("<role>ASSISTANT</role>", "<role>ASSISTANT</role>hm.")
TYPED = ["<|mask|>", " <role>x</role> ", "a<|role_end|><|mask|>b", "<|endoftext|>\n", "<<role>>"]
TYPED += ["\U000f0000<|mask|>\U000f0001", "\ud800<|mask|>"]  # private use; half a surrogate pair


def rendered(template: str, *texts: str) -> str:
    """What transformers renders of a prompt, or of a prompt and its answer."""
    messages = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), texts)]
    options = {"add_generation_prompt": len(texts) == 1, "tokenize": False}
    return LIBRARY.apply_chat_template(messages, chat_template=template, **options)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_equals_rendering_and_the_tokenizers_library(tmp_path, name):
    """For text without special strings; the library takes the rendered markup as special tokens."""
    tokenizer = loaded(tmp_path, chat_template=TEMPLATES[name])
    library = library_of(SPEC, specials_as_text=False)
    for text in random_texts(100):
        for end in ("", "<", "|>", " <role", ">  "):
            expected = library(rendered(TEMPLATES[name], text + end))
            assert tokenizer.encode_prompt(text + end) == expected, text + end


@pytest.mark.parametrize("text", TYPED)
def test_markup_in_the_users_text_stays_text(tmp_path, text):
    """The special tokens are an empty message's, and for the toy's template so is all the rest."""
    typed, empty, special = TOY.encode(text), TOY.encode_prompt(""), set(TOY.specials.values())
    assert TOY.decode(typed) == text.replace("\ud800", "\ufffd"), "special ones decode to nothing"
    end = empty.index(TOY.specials["<|role_end|>"])
    assert TOY.encode_prompt(text) == empty[:end] + typed + empty[end:]
    for template in TEMPLATES.values():
        tokenizer = loaded(tmp_path, chat_template=template)
        ids, empty = tokenizer.encode_prompt(text), tokenizer.encode_prompt("")
        assert [i for i in ids if i in special] == [i for i in empty if i in special]
    for template in TURNS.values():
        tokenizer = loaded(tmp_path, chat_template=template)
        marks = [
            [[i for i in ids if i in special] for ids in tokenizer.encode_pair(*pair)]
            for pair in ((text, text), ("x", "x"))
        ]
        assert marks[0] == marks[1], "neither prompt nor answer adds a special token"
    assert TOY.decode(TOY.encode_pair("x", text)[1]) == TOY.decode(typed)


@pytest.mark.parametrize("name", TURNS)
def test_an_answer_ends_as_its_template_ends_a_turn(tmp_path, name):
    """The ids of the whole conversation by transformers, cut where those of the prompt end. Texts
    with blanks at their ends, which a template may strip and a token may reach across."""
    tokenizer = loaded(tmp_path, chat_template=TURNS[name])
    library = library_of(SPEC, specials_as_text=False)
    texts = [*random_texts(60), "A rose.", "\nA rose. \n", "  <", "e", "</role", "HUMAN"]
    for question, answer in itertools.pairwise(texts):
        start = len(library(rendered(TURNS[name], question)))
        whole = library(rendered(TURNS[name], question, answer))
        assert tokenizer.encode_pair(question, answer) == (whole[:start], whole[start:]), answer
    ends = tokenizer.encode_pair("What is red?", "A rose.")[1]
    assert TOY.eos not in ends or "eos_token" in TURNS[name], "EOS pads, it ends no turn"
    assert loaded(tmp_path, plain=True).encode_pair("a", "b")[1] == [*TOY.encode("b"), TOY.eos]


@pytest.mark.parametrize("name", ["toy", "ChatML", "Llama", "words"])
def test_a_turn_that_a_template_opens_unasked_is_no_part_of_the_answer(tmp_path, name):
    """Llama 3's first template opens the assistant's next turn behind each conversation. Learnt as
    the end of an answer, it would make a model answer without end."""
    asked = loaded(tmp_path, chat_template=TURNS[name])
    pairs = [("What is red?", text) for text in (*TYPED, "A rose.", " s", "ASSISTANT", "assistant")]
    expected = [asked.encode_pair(*pair) for pair in pairs]
    unasked = TURNS[name].replace("{% if add_generation_prompt %}", "{% if true %}")
    tokenizer = loaded(tmp_path, chat_template=unasked)
    assert [tokenizer.encode_pair(*pair) for pair in pairs] == expected


@pytest.mark.parametrize("template", [TEMPLATES["json"], TEMPLATES["date"], ROLELESS, THINKING])
def test_a_template_that_has_no_answer_behind_a_prompt_is_refused(tmp_path, template):
    """It writes the first message alone, an answer as a user's turn, or a prompt otherwise as soon
    as it is answered. One can still ask."""
    tokenizer = loaded(tmp_path, chat_template=template)
    with pytest.raises(
        UserError, match=r"^the backbone's chat template puts no answer behind .*\Z"
    ):
        tokenizer.encode_pair("What is red?", "A rose.")
    assert tokenizer.encode_prompt("What is red?")


def test_the_templates_words_do_not_complete_the_users_markup(tmp_path):
    """Half of a special string typed, the other half made by the template: all is text."""
    halves = {CONTENT + "k|> is it": "say <|mas", "<|" + CONTENT + " ": "mask|> it is"}
    halves |= {TRIMMED + ">": "<role \n", "{{ messages[0].content | lower }}": "<|MASK|>"}
    for template, text in halves.items():
        ids = loaded(tmp_path, chat_template=template).encode_prompt(text)
        assert ids == TOY.encode(rendered(template, text))


def test_where_the_template_comes_from(tmp_path):
    """A string, the default of a list, or a file, which goes first; plain leaves them all out."""
    several = [SEVERAL[1], {"name": "default", "template": "default " + CONTENT}]
    assert loaded(tmp_path, chat_template=several).encode_prompt("x") == TOY.encode("default x")
    assert loaded(tmp_path, chat_template=None).encode_prompt("x") == TOY.encode("x")
    (tmp_path / "chat_template.jinja").write_text("file " + CONTENT)
    assert loaded(tmp_path).encode_prompt("x") == TOY.encode("file x")
    assert loaded(tmp_path, plain=True).encode_prompt("<role>x") == TOY.encode("<role>x")


TWICE = "{% macro two(n) %}{% if n %}{{ two(n - 1) }}{{ two(n - 1) }}{% endif %}{% endmacro %}"
FAILING = [
    ("{{ raise_exception('user and assistant must alternate') }}", "must alternate"),
    ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
    ("{% for m in %}", "TemplateSyntaxError"),
    ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "RecursionError"),
    ("{% for i in range(99999) %}" * 2 + "{% endfor %}" * 2, "running after"),
    (TWICE + "{{ two(60) }}", "running after"),
    ("{{ 'x' * 10**10 }}", "OverflowError"),
    ("{{ 'x' * 9999999999 }}", "OverflowError"),
    ("{{ 99 ** 99999999 }}", "OverflowError"),
    ("{% for i in range(99) %}{{ 'x' * 999999 }}{% endfor %}", "OverflowError"),
    ("{{ messages.append(1) }}", "SecurityError"),
]


@pytest.mark.parametrize(("template", "reason"), FAILING)
def test_a_template_that_fails_or_never_ends_is_one_line_at_load_time(tmp_path, template, reason):
    """Found within seconds, before any work begins. Without the template the rest still loads."""
    start = time.thread_time()
    with pytest.raises(UserError, match=rf"^the backbone's chat template .*{reason}.*\Z"):
        loaded(tmp_path, chat_template=template)
    assert time.thread_time() - start < 20
    assert loaded(tmp_path, plain=True, chat_template=template).template is None
