"""The tokenizers of real backbones, against the `tokenizers` library, and their chat templates."""

import copy
import json
import random
import re
from collections import Counter
from pathlib import Path

import jinja2
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

import data
from data import TINY
from model import UserError

CHECKPOINT = Path(__file__).parent / "golden" / "checkpoint"
SPEC, CONFIG = (json.loads((CHECKPOINT / name).read_text()) for name in ("tokenizer.json", "tokenizer_config.json"))
LING_REGEX = SPEC["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
POSSESSIVE = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
WORDS_ONLY = r"\p{L}+|\d{1,3}"  # most signs and all blanks lie between two matches


# ---- help ----------------------------------------------------------------------------------------------------------------


def split(regex: str) -> dict:
    """The pre-tokenizer of LLaDA's kin: a regex, then bytes."""
    cut = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [cut, level]}


def byte_level(use_regex: bool) -> dict:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


PRE_TOKENIZERS = {
    "Ling": split(LING_REGEX),
    "possessive": split(POSSESSIVE),
    "words only": split(WORDS_ONLY),
    "GPT-2": byte_level(True),
    "whole text": byte_level(False),
}


def make_folder(folder: Path, spec: dict, config: dict, template: str | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


def loaded(folder: Path, spec: dict = SPEC, template: str | None = None, **config) -> data.Tokenizer:
    return data.load_tokenizer(make_folder(folder, spec, CONFIG | config, template))


def reference(spec: dict) -> tokenizers.Tokenizer:
    """The `tokenizers` library itself, set to take text as ordinary text."""
    library = tokenizers.Tokenizer.from_str(json.dumps(spec))
    library.encode_special_tokens = True
    return library


def library_ids(library: tokenizers.Tokenizer, text: str) -> list[int]:
    return library.encode(text, add_special_tokens=False).ids


SNIPPETS = "the The it's I'LL don'T 'ſ 12345 ² Ⅷ ٣ \u3000 \u00a0 \u0085 \r\n \n\n \t naïve e\u0301 ﬁ 東京 🙂".split(" ")
SNIPPETS += "👩‍👩‍👧 \u200b <|mask|> -- ... !? _ x==y".split(" ")


def random_texts(n: int, seed: int = 0) -> list[str]:
    """Words, contractions, digits, blanks of all kinds, many scripts, and characters drawn from all of Unicode."""
    rng = random.Random(seed)
    ranges = (range(32, 127), range(0, 0x250), range(0x370, 0x700), range(0x3000, 0x9FFF), range(0x1F300, 0x1FAFF))
    whole = [code for code in range(0x110000) if not 0xD800 <= code < 0xE000]

    def part() -> str:
        kind = rng.random()
        if kind < 0.5:
            return rng.choice(SNIPPETS)
        return " " * rng.randrange(4) if kind < 0.8 else chr(rng.choice(rng.choice((*ranges, whole))))

    return ["", *("".join(part() for _ in range(rng.randrange(1, 30))) for _ in range(n))]


def trained(pre_tokenizer: dict, size: int = 600) -> dict:
    """A tokenizer.json trained here on random text with the library's own trainer: ids follow the order of merges."""
    spec = {**SPEC, "added_tokens": [], "pre_tokenizer": pre_tokenizer}
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = tokenizers.Tokenizer.from_str(json.dumps(spec)).pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    library.train_from_iterator(
        (text.replace("<|mask|>", "") for text in random_texts(800, 9)),
        trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False),
    )
    library.add_special_tokens([token["content"] for token in SPEC["added_tokens"]])
    return json.loads(library.to_str())


def permuted(spec: dict) -> dict:
    """The same tokenizer with its ids in a random order."""
    spec, ids = copy.deepcopy(spec), list(range(len(spec["model"]["vocab"])))
    random.Random(3).shuffle(ids)
    spec["model"]["vocab"] = {token: ids[i] for token, i in spec["model"]["vocab"].items()}
    return spec


def spec_with_merges(pairs: list[tuple[str, str]], ignore_merges: bool = False) -> dict:
    """A tokenizer.json with these merges in this order, over the 256 byte symbols."""
    tokens = dict.fromkeys([*data.byte_symbols(), *(left + right for left, right in pairs)])
    vocab = {token: i for i, token in enumerate(tokens)}
    added = [{**token, "id": len(vocab) + i} for i, token in enumerate(SPEC["added_tokens"])]
    model = {**SPEC["model"], "vocab": vocab, "merges": [list(pair) for pair in pairs], "ignore_merges": ignore_merges}
    return {**SPEC, "added_tokens": added, "model": model, "pre_tokenizer": byte_level(False)}


@pytest.fixture(scope="module")
def toy() -> data.Tokenizer:
    return data.load_tokenizer(CHECKPOINT)


# ---- text to ids ---------------------------------------------------------------------------------------------------------


def test_recorded_ids_are_reproduced(toy):
    """Every text of token_ids.json, recorded with the `tokenizers` library."""
    records = json.loads((CHECKPOINT / "token_ids.json").read_text())
    assert len(records) > 5
    assert [toy.encode(record["text"]) for record in records] == [record["ids"] for record in records]


@pytest.mark.parametrize("order", ["merge order", "permuted"])
@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_ids_equal_the_tokenizers_library(tmp_path, name, order):
    """Any text, any order of ids, with and without a regex, also where the regex leaves text unmatched."""
    spec = trained(PRE_TOKENIZERS[name])
    spec = permuted(spec) if order == "permuted" else spec
    ours, library = loaded(tmp_path, spec), reference(spec)
    texts = random_texts(300)
    assert [ours.encode(text) for text in texts] == [library_ids(library, text) for text in texts]
    assert [ours.decode(ours.encode(text)) for text in texts] == texts


def test_every_character_is_cut_as_in_the_tokenizers_library(tmp_path):
    """Oniguruma and fancy-regex agree on what a letter, a digit and a blank is: all of Unicode, between letters and blanks."""
    spec = spec_with_merges([("a", character) for character in "bcd"])
    spec["pre_tokenizer"] = split(LING_REGEX)
    ours, library = loaded(tmp_path, spec), reference(spec)
    codes = [code for code in range(0x30000) if not 0xD800 <= code < 0xE000]
    for at in range(0, len(codes), 4096):
        text = "".join(f"a{chr(code)}b 'S{chr(code)}  " for code in codes[at : at + 4096])
        assert ours.encode(text) == library_ids(library, text)


def test_merges_as_strings_or_as_pairs_are_the_same(tmp_path, toy):
    """Both forms of tokenizer.json: "a b" and ["a", "b"]."""
    spec = copy.deepcopy(SPEC)
    spec["model"]["merges"] = [pair.split(" ") if isinstance(pair, str) else " ".join(pair) for pair in spec["model"]["merges"]]
    other = loaded(tmp_path, spec)
    assert [other.encode(text) for text in random_texts(50)] == [toy.encode(text) for text in random_texts(50)]


def random_merges(rng: random.Random) -> list[tuple[str, str]]:
    """Merges as no trainer makes them: any two tokens, in any order, several rules for one token, the same rule twice."""
    tokens, pairs = list("abc"), []
    for _ in range(rng.randrange(1, 14)):
        left, right = rng.choice(tokens), rng.choice(tokens)
        if len(left + right) < 9:
            pairs.append((left, right))
            tokens.append(left + right)
        if pairs and rng.random() < 0.3:
            token = rng.choice(pairs)[0] + rng.choice(pairs)[1]
            pairs += [(token[:k], token[k:]) for k in [rng.randrange(1, len(token))] if {token[:k], token[k:]} <= {*tokens}]
    pairs += rng.choices(pairs, k=rng.randrange(2)) if pairs else []
    if rng.random() < 0.5:
        rng.shuffle(pairs)
    return pairs


def test_any_list_of_merges_is_exact(tmp_path):
    """Rules that compete, that come before what they need, or whose token is never made: still the library's ids."""
    rng, never_made = random.Random(0), 0
    for _ in range(300):
        spec = spec_with_merges(random_merges(rng))
        ours, library = loaded(tmp_path, spec), reference(spec)
        never_made += len(ours.ids) < len(spec["model"]["vocab"])
        for _ in range(40):
            text = "".join(rng.choices("abc", k=rng.randrange(1, 25)))
            assert ours.encode(text) == library_ids(library, text), (spec["model"]["merges"], text)
    assert 50 < never_made < 300


def test_a_token_that_its_bytes_do_not_merge_to_is_never_made(tmp_path):
    """By hand: b+c comes before ab+c, so "abc" is [a, bc], and so it is inside any other text."""
    spec = spec_with_merges([("a", "b"), ("b", "c"), ("ab", "c")])
    spec["model"]["merges"] = [["b", "c"], ["a", "b"], ["ab", "c"]]
    ours, vocab = loaded(tmp_path, spec), spec["model"]["vocab"]
    assert ours.encode("abc") == [vocab["a"], vocab["bc"]]
    assert ours.encode("ababc") == [vocab["ab"], vocab["a"], vocab["bc"]]
    assert vocab["abc"] not in ours.ids


def test_ignore_merges_is_refused_where_it_matters(tmp_path):
    """It takes a whole piece that is a token, as tiktoken does: the same, unless there are tokens that no merges lead to."""
    spec = spec_with_merges([("a", "b"), ("ab", "c")], ignore_merges=True)
    ours, library = loaded(tmp_path, spec), reference(spec)
    assert all(ours.encode(text) == library_ids(library, text) for text in ("abc", "abcab", "bca", "ab", "aab"))
    for change in ({"merges": [["b", "c"], ["a", "b"], ["ab", "c"]]}, {}):
        bad = spec_with_merges([("b", "c"), ("a", "b"), ("ab", "c")], ignore_merges=True)
        bad["model"] |= change or {"vocab": {**bad["model"]["vocab"], "cab": 999}}
        with pytest.raises(UserError, match=r"ignore_merges with .* is not supported"):
            loaded(tmp_path, bad)


@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "NFKD"])
def test_normalizers_equal_the_tokenizers_library(tmp_path, form):
    """Composed and decomposed letters, ligatures, wide forms."""
    spec = {**trained(PRE_TOKENIZERS["Ling"]), "normalizer": {"type": form}}
    ours, library = loaded(tmp_path, spec), reference(spec)
    texts = [*random_texts(100), "e\u0301 \u212b ﬁ Ｗｉｄｅ \uac00 \u1112\u1161\u11ab"]
    assert [ours.encode(text) for text in texts] == [library_ids(library, text) for text in texts]


def test_ordinary_added_tokens_are_found_in_text(tmp_path):
    """special: false, looked for before (normalized: false) or after the normalizer; the longest first."""
    spec = {**copy.deepcopy(SPEC), "normalizer": {"type": "NFC"}}
    words = {"<think>": False, "<think>x": False, "<tool>": True, "é!": True, "e\u0301?": True, "the": False}
    for i, (content, normalized) in enumerate(words.items()):
        spec["added_tokens"].append({**SPEC["added_tokens"][0], "id": 526 + i, "content": content})
        spec["added_tokens"][-1] |= {"normalized": normalized, "special": False}
    ours, library = loaded(tmp_path, spec), reference(spec)
    rng, parts = random.Random(1), [*words, "<think>\u0338", "<tool>\u0338", "é?", "x", " ", "\u0301", "<", "e", "<|mask|>"]
    for _ in range(500):
        text = "".join(rng.choices(parts, k=6))
        assert ours.encode(text) == library_ids(library, text), text
    assert ours.encode("<think>") == [526]
    assert ours.decode([526, 527, 531]) == "<think><think>xthe"
    assert ours.vocab_size == 532


@pytest.mark.parametrize("text", ["<|mask|>", "a<|mask|>b", "<role>HUMAN</role>", "<|endoftext|><|mask|>", "\ud800 <|mask|>"])
def test_typed_markup_is_ordinary_text(toy, text):
    """encode never yields a special id, for the toy backbone as for the tiny vocabulary; half a surrogate pair is no crash."""
    for tokenizer in (toy, TINY):
        ids = tokenizer.encode(text)
        assert not {*tokenizer.specials.values()} & {*ids}
        assert tokenizer.decode(ids).strip() == text.replace("\ud800", "\ufffd")
        assert tokenizer.encode_response(text) == ids


def test_the_tiny_tokenizer_is_the_same_as_ever():
    """TINY, the module's constants and its functions are one thing: a leading space, no template."""
    assert (TINY.eos, TINY.mask, TINY.vocab_size, TINY.template) == (data.EOS, data.MASK, data.VOCAB_SIZE, None)
    assert TINY.specials == {"<|endoftext|>": data.EOS, "<|mask|>": data.MASK}
    for text in ("river holds 47.", " river", "\nriver", "", "naïve 東京"):
        expected = text if not text or text[0] in " \n" else " " + text
        ids = data.TOKENIZER.encode_ordinary(expected)
        assert TINY.encode(text) == TINY.encode_prompt(text) == ids
        assert TINY.decode([*ids, data.EOS, 5]) == data.decode(ids) == expected


# ---- ids to text ---------------------------------------------------------------------------------------------------------


def test_decode_ends_at_eos_and_skips_what_has_no_text(toy):
    """Special tokens, rows of the embedding beyond the vocabulary; half a character becomes U+FFFD."""
    yes, no = toy.encode("yes"), toy.encode("no")
    assert toy.decode([*yes, toy.eos, *no]) == "yes"
    assert toy.decode([*yes, toy.mask, toy.specials["<role>"], 575, 10**6, *no]) == "yesno"
    assert toy.decode([*toy.encode("東")[:1], *yes]) == "\ufffdyes"
    assert toy.decode([]) == ""


# ---- special tokens ------------------------------------------------------------------------------------------------------


def test_mask_and_eos_are_found_by_name(toy):
    """mask_token and eos_token of tokenizer_config.json, by string."""
    assert (toy.eos, toy.mask, toy.vocab_size) == (521, 525, 526)
    assert toy.specials == {token["content"]: token["id"] for token in SPEC["added_tokens"]}


@pytest.mark.parametrize(("present", "mask"), [(["<|mask|>"], 525), (["<|mask|>", "<|mdm_mask|>"], 526), ([], None)])
def test_without_a_mask_token_the_known_names_are_tried(tmp_path, present, mask):
    """LLaDA-8B's <|mdm_mask|> before <|mask|>, even if the file calls it ordinary; else a UserError."""
    spec = copy.deepcopy(SPEC)
    spec["added_tokens"][-1]["content"] = "<|other|>"
    for i, name in enumerate(present):
        spec["added_tokens"].append({**SPEC["added_tokens"][0], "id": 525 + i, "content": name, "special": False})
    if mask is None:
        with pytest.raises(UserError, match="mask_token"):
            loaded(tmp_path, spec, mask_token=None)
    else:
        tokenizer = loaded(tmp_path, spec, mask_token=None)
        assert tokenizer.mask == mask
        assert mask not in tokenizer.encode(" ".join(present))


@pytest.mark.parametrize(
    "config",
    [
        {"pad_token": "<new>"},
        {"pad_token": {"content": "<new>", "lstrip": False}},
        {"additional_special_tokens": ["<other>", {"content": "<new>"}]},
        {"extra_special_tokens": {"image_token": "<new>"}},
        {"added_tokens_decoder": {"526": {"content": "<new>", "special": True}}},
    ],
)
def test_tokens_named_as_special_are_special(tmp_path, config):
    """Whatever tokenizer.json says of them: typed, they are ordinary text; the template still can use them."""
    spec = copy.deepcopy(SPEC)
    spec["added_tokens"].append({**SPEC["added_tokens"][0], "id": 526, "content": "<new>", "special": False})
    assert loaded(tmp_path, spec).encode("<new>") == [526]
    tokenizer = loaded(tmp_path, spec, **config, chat_template="<new>{{ messages[0].content }}")
    assert 526 not in tokenizer.encode("<new>")
    assert tokenizer.encode_prompt("<new>") == [526, *tokenizer.encode("<new>")]


def test_tokens_of_the_config_alone_are_added(tmp_path):
    """added_tokens_decoder may hold tokens that tokenizer.json lacks."""
    decoder = {"530": {"content": "<late>", "special": True}, "531": {"content": "<word>", "special": False}}
    tokenizer = loaded(tmp_path, added_tokens_decoder=decoder)
    assert tokenizer.specials["<late>"] == 530
    assert tokenizer.encode("<word>") == [531]


# ---- what is refused -----------------------------------------------------------------------------------------------------


def put(*path, value):
    """A change of tokenizer.json: spec[path[0]][path[1]]... = value."""

    def change(spec: dict) -> None:
        for key in path[:-1]:
            spec = spec[key]
        spec[path[-1]] = value

    return change


BOS = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A"}}]}
REFUSED = {
    "dropout": put("model", "dropout", value=0.1),
    "byte_fallback": put("model", "byte_fallback", value=True),
    "unk_token": put("model", "unk_token", value="<unk>"),
    "continuing_subword_prefix": put("model", "continuing_subword_prefix", value="##"),
    "end_of_word_suffix": put("model", "end_of_word_suffix", value="</w>"),
    "WordPiece": put("model", "type", value="WordPiece"),
    "no symbol for 1 bytes": lambda spec: spec["model"]["vocab"].pop("a"),
    "pre_tokenizer.*Whitespace": put("pre_tokenizer", value={"type": "Whitespace"}),
    "pre_tokenizer.*null": put("pre_tokenizer", value=None),
    "pre_tokenizer.*prefix_space": put("pre_tokenizer", value=byte_level(True) | {"add_prefix_space": True}),
    "pre_tokenizer.*Removed": put("pre_tokenizer", "pretokenizers", 0, "behavior", value="Removed"),
    "pre_tokenizer.*invert": put("pre_tokenizer", "pretokenizers", 0, "invert", value=True),
    "pre_tokenizer.*String": put("pre_tokenizer", "pretokenizers", 0, "pattern", value={"String": " "}),
    "pre_tokenizer.*use_regex": put("pre_tokenizer", "pretokenizers", 1, "use_regex", value=True),
    "pre_tokenizer.*Digits": lambda spec: spec["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "Digits"}),
    "pre_tokenizer.*w+": put("pre_tokenizer", value=split(r"\w+")),
    r"pre_tokenizer.*\{1,3\}": put("pre_tokenizer", value=split(r"\p{N}{1,3}+")),
    "pre_tokenizer.*&&": put("pre_tokenizer", value=split(r"[\p{L}&&a]")),
    r"pre_tokenizer.*\$": put("pre_tokenizer", value=split(r"\s+$")),
    "Parsing error": put("pre_tokenizer", value=split("a(b")),
    "normalizer Lowercase": put("normalizer", value={"type": "Lowercase"}),
    "post_processor": put("post_processor", value=BOS),
    "post_processor.*Sequence": put("post_processor", value={"type": "Sequence", "processors": [byte_level(True), BOS]}),
    "post_processor.*Bert": put("post_processor", value={"type": "BertProcessing"}),
    "'<role>'.*lstrip": put("added_tokens", 2, "lstrip", value=True),
    "'<role>' with.*rstrip": put("added_tokens", 2, "rstrip", value=True),
    "'<role>' with.*single_word": put("added_tokens", 2, "single_word", value=True),
    "special token 64 ": put("added_tokens", 2, value={**SPEC["added_tokens"][2], "content": "a", "id": 64}),
    "malformed": put("model", "merges", value=3),
    "malformed.*'nowhere'": put("model", "merges", value=["nowhere a"]),
    "malformed.*'vocab'": lambda spec: spec["model"].pop("vocab"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_exact_is_refused_by_name(tmp_path, reason):
    """One line that says what, and in which folder."""
    spec = copy.deepcopy(SPEC)
    REFUSED[reason](spec)
    with pytest.raises(UserError) as caught:
        loaded(tmp_path, spec)
    message = str(caught.value)
    assert re.search(reason, message), message
    assert str(tmp_path) in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "post_processor",
    [
        None,
        byte_level(True),
        {"type": "Sequence", "processors": [byte_level(False)]},
        {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}], "pair": [], "special_tokens": {}},
    ],
)
def test_post_processors_without_special_tokens_are_accepted(tmp_path, toy, post_processor):
    """They change offsets, not ids."""
    assert loaded(tmp_path, SPEC | {"post_processor": post_processor}).encode("some text") == toy.encode("some text")


def test_an_eos_token_is_required(tmp_path):
    """Named in tokenizer_config.json, and among the added tokens."""
    for eos in (None, "<gone>"):
        with pytest.raises(UserError, match="eos_token"):
            loaded(tmp_path, eos_token=eos)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [None, "{", "[]", b"\xff\xfe"])
def test_a_missing_or_broken_file_is_named(tmp_path, name, content):
    """Which file, and where."""
    make_folder(tmp_path, SPEC, CONFIG)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        data.load_tokenizer(tmp_path)
    assert name in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- the chat template ---------------------------------------------------------------------------------------------------

CONTENT = "{{ messages[0]['content'] }}"
TEMPLATES = {
    "toy": CONFIG["chat_template"],
    "trimmed": "<role>HUMAN</role>{{ messages[0].content | trim }}<|role_end|><role>ASSISTANT</role>",
    "plain text beside it": f"{{{{ bos_token }}}}USER:{CONTENT}s. ASSISTANT:",
    "upper case": "<role>{{ messages[0].content | upper }}</role>",
    "blocks": "{% for m in messages %}\n  {% if m.role == 'user' %}\n<role>\n{{ m.content }}{% endif %}\n{% endfor %}</role>\n",
    "json": "<role>{{ messages | tojson }}</role>{% if tools is not none %}tools{% endif %}",
    "loop control": "{% for m in messages %}{{ m.content }}<role>{% break %}{% endfor %}{{ unknown }}",
}


def rendered(template: str, text: str) -> str:
    """Hugging Face's settings, in a plain environment."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    names = {key: value for key, value in CONFIG.items() if key.endswith("_token") and isinstance(value, str)}
    messages = [{"role": "user", "content": text}]
    return environment.from_string(template).render(messages=messages, add_generation_prompt=True, tools=None, **names)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_equals_rendering_and_encoding_with_the_tokenizers_library(tmp_path, name):
    """On any text without special strings; the library takes the markup in the rendered text as special tokens."""
    tokenizer, library = loaded(tmp_path, chat_template=TEMPLATES[name]), reference(SPEC)
    library.encode_special_tokens = False
    for text in random_texts(100, 5):
        text = text.replace("<|mask|>", "<|") + random.Random(text).choice(["", "<", "|>", " <role", ">  "])
        expected = library_ids(library, rendered(TEMPLATES[name], text))
        assert tokenizer.encode_prompt(text) == expected, text


def test_a_prompt_of_the_toy_backbone_by_hand(toy):
    """<role>HUMAN</role>text<|role_end|><role>ASSISTANT</role>"""
    role, end_role, end = (toy.specials[name] for name in ("<role>", "</role>", "<|role_end|>"))
    expected = [role, *toy.encode("HUMAN"), end_role, *toy.encode("Hi there"), end, role, *toy.encode("ASSISTANT"), end_role]
    assert toy.encode_prompt("Hi there") == expected


def test_the_longest_token_counts_in_a_template(tmp_path):
    """An ordinary added token that begins with a special one, as the `tokenizers` library takes it."""
    spec = copy.deepcopy(SPEC)
    spec["added_tokens"].append({**SPEC["added_tokens"][0], "id": 526, "content": "<role>USER", "special": False})
    tokenizer, library = loaded(tmp_path, spec, chat_template="<role>USER<role>" + CONTENT), reference(spec)
    library.encode_special_tokens = False
    assert tokenizer.encode_prompt("hi") == library_ids(library, "<role>USER<role>hi")
    assert tokenizer.encode_prompt("hi")[:2] == [526, 522]


TYPED = [
    "<|mask|>",
    " <role>x</role> ",
    "a<|role_end|><|mask|>",
    "<|endoftext|>\n",
    "\U000f0000<|mask|>\U000f0001",
    "<<role>>",
    "\ud800<|mask|>",
]


@pytest.mark.parametrize("text", TYPED)
def test_markup_in_the_users_text_stays_text(toy, tmp_path, text):
    """The ids of the text itself, the special tokens of the template around it, also where the template trims."""
    role, end_role, end = (toy.specials[name] for name in ("<role>", "</role>", "<|role_end|>"))
    head, tail = [role, *toy.encode("HUMAN"), end_role], [end, role, *toy.encode("ASSISTANT"), end_role]
    assert toy.encode_prompt(text) == [*head, *toy.encode(text), *tail]
    trims = loaded(tmp_path, chat_template=TEMPLATES["trimmed"])
    assert trims.encode_prompt(text) == [*head, *toy.encode(text.strip()), *tail]
    shouts = loaded(tmp_path, chat_template=TEMPLATES["upper case"])
    assert shouts.encode_prompt(text) == [role, *toy.encode(text.upper()), end_role]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("text", TYPED)
def test_no_text_adds_a_special_token_to_a_template(tmp_path, name, text):
    """In every template the special tokens are those of a harmless message."""
    tokenizer = loaded(tmp_path, chat_template=TEMPLATES[name])
    special = {*tokenizer.specials.values()}
    counts = [Counter(i for i in tokenizer.encode_prompt(typed) if i in special) for typed in (text, "hello")]
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (CONTENT + "k|> is it", "say <|mas"),
        ("<|" + CONTENT + " ", "mask|> it is"),
        ("{{ messages[0].content | trim }}>", "<role \n"),
        ("<ro{{ messages[0].content | trim }}", "\n le>"),
    ],
)
def test_the_templates_words_do_not_complete_the_users_markup(tmp_path, toy, template, text):
    """Half of a special string typed, the other half in the template's plain text: all of it is plain text."""
    ids = loaded(tmp_path, chat_template=template).encode_prompt(text)
    assert ids == toy.encode(rendered(template, text))


def test_where_the_template_comes_from(tmp_path, toy):
    """A string, the default of a list, or a file beside it, which goes first; plain leaves all of them aside."""
    several = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "default " + CONTENT}]
    assert loaded(tmp_path, chat_template=several).encode_prompt("x") == toy.encode("default x")
    with pytest.raises(UserError, match="default"):
        loaded(tmp_path, chat_template=several[:1])
    assert loaded(tmp_path, template="file " + CONTENT).encode_prompt("x") == toy.encode("file x")
    plain = data.load_tokenizer(tmp_path, plain=True)
    assert plain.template is None
    assert plain.encode_prompt("<role>x") == toy.encode("<role>x")
    (tmp_path / "chat_template.jinja").unlink()
    assert loaded(tmp_path, chat_template=None).encode_prompt("x") == toy.encode("x")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('user and assistant must alternate') }}", "must alternate"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{% for m in %}", "TemplateSyntaxError"),
        ("{{ unknown.attribute }}", "UndefinedError"),
        ("{{ 1 + 'a' }}", "TypeError"),
        ("{{ open('/etc/passwd') }}", "UndefinedError"),
    ],
)
def test_a_template_that_fails_is_one_line_at_load_time(tmp_path, template, reason):
    """Its own exception, a step out of the sandbox, bad syntax: found before any work begins; plain still loads."""
    with pytest.raises(UserError, match=reason) as caught:
        loaded(tmp_path, chat_template=template)
    assert "chat template" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert data.load_tokenizer(tmp_path, plain=True).template is None
