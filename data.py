"""
data.py: the tiny tokenizer, four small reading tasks in plain English, and their batches.

An example is a haystack of sentences, a question about a few of them (the needles), and an answer:

  task   after                needles                                 answer
  mv     RULER multi-value    " river holds 47.", two for each of 3   both sentences of one key
  vt     RULER var. tracking  " alpha = 47. beta = alpha.", 2 chains  the chain of one number
  cwe    RULER common words   " lamp." four times, eight others once  the two words: " lamp stone."
  babi   bAbI "who is where"  " Mary went home.", two for each of 4   the last moves of two people

Between the needles stands a filler that repeats three sentences, as in RULER's "noise" haystack: a
longer example is the same problem with more filler. That the filler can be *predicted* matters when
a prompt is written into the weights (Sec. 4.5): of random filler only noise would be written.

Reading list: RULER, arXiv 2404.06654; bAbI, arXiv 1502.05698; masked diffusion on pairs, LLaDA,
arXiv 2502.09992, Sec. 2.3.

Glossary
  x_0            (B, T) clean token ids: prompt, response, EOS padding
  maskable       (B, T) bool: what the forward process may mask and the loss may score
  attention_mask (B, T) bool, the positions that are visible; None: every one
  facts          (n, F, W) ids: F sentences of W tokens for each of n examples
"""

import re
import zlib
from typing import NamedTuple

import numpy as np
import tiktoken
import torch
from torch import Tensor

# ---- the tiny tokenizer: 256 bytes, a closed list of words, two special tokens ---------------

NOUNS = """river lamp stone bread cloud tiger piano clock glass horse candle forest pencil ladder
silver garden button carpet window rocket island pepper helmet basket"""
GREEK = "alpha beta gamma delta zeta theta iota kappa lambda rho sigma tau phi chi omega upsilon"
PEOPLE = "Mary John Sandra Daniel Julie Fred Bill Emily"
PLACES = "home outside upstairs downstairs north south east west abroad away"
OTHER = """holds hold went and which what does where are words common Question Answer Where
The was calm long deep night road snow = is in to the of a"""
FILLER = (" The night was calm.", " The road was long.", " The snow was deep.")

# The words of a class have consecutive ids: "another word of this class" is then arithmetic.
CLASSES = {"noun": NOUNS, "greek": GREEK, "person": PEOPLE, "place": PLACES}
CLASSES = {name: words.split() for name, words in CLASSES.items()} | {"tens": list("0123456789")}


class TinyTokenizer:
    """Text <-> ids, made here without a download. Any text decodes back to itself.

    " river holds 47." -> [" river", " holds", " 4", "7", "."]: a listed word with its leading space
    is one token, all else falls apart into bytes. A typed "<|mask|>" is bytes like any text.
    """

    def __init__(self):
        words = [word for names in CLASSES.values() for word in names] + OTHER.split()
        ranks = {bytes([i]): i for i in range(256)}
        ranks |= {f" {word}".encode(): 256 + i for i, word in enumerate(words)}
        self.specials = {"<|endoftext|>": len(ranks), "<|mask|>": len(ranks) + 1}
        self.eos, self.mask = self.specials.values()
        self.vocab_size = len(ranks) + 2
        pieces = r" ?[A-Za-z]+| ?[0-9]| ?[^\sA-Za-z0-9]|\s"
        options = {"mergeable_ranks": ranks, "special_tokens": self.specials}
        self.encoding = tiktoken.Encoding("memdlm-tiny", pat_str=pieces, **options)

    def pieces(self, text: str) -> list[int]:
        """The text just as it stands: parts of a sentence such as "." or "? Answer:"."""
        return self.encoding.encode_ordinary(text)

    def encode(self, text: str) -> list[int]:
        """A whole text. It gets a leading space if it has none: "river" would be five bytes."""
        spaced = text if not text or text.startswith((" ", "\n")) else " " + text
        return self.pieces(spaced)

    encode_prompt = encode  # real checkpoints put a chat template around a prompt

    def decode(self, ids: list[int]) -> str:
        """Text up to the first EOS. The cut is made here alone: the model fills a whole answer."""
        ids = ids[: ids.index(self.eos)] if self.eos in ids else ids
        return self.encoding.decode([token for token in ids if token != self.mask])


TINY = TinyTokenizer()
EOS, MASK, VOCAB_SIZE = TINY.eos, TINY.mask, TINY.vocab_size


def class_range(name: str) -> tuple[int, int]:
    """First id of a word class and its size. "units" are the ten digits without a space."""
    if name == "units":
        return ord("0"), 10
    return TINY.pieces(" " + CLASSES[name][0])[0], len(CLASSES[name])


# ---- the four tasks --------------------------------------------------------------------------


def pick(rng: np.random.Generator, name: str, n: int, k: int) -> np.ndarray:
    """k different words of a class for each of n examples: ids (n, k)."""
    first, size = class_range(name)
    return first + rng.random((n, size)).argsort(axis=1)[:, :k]


def numbers(rng: np.random.Generator, n: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """k different two-digit numbers for each of n examples: tens (n, k), units (n, k)."""
    value = rng.random((n, 100)).argsort(axis=1)[:, :k]
    return class_range("tens")[0] + value // 10, class_range("units")[0] + value % 10


def shuffle(rng: np.random.Generator, facts: np.ndarray) -> np.ndarray:
    """The facts (n, F, ...) of each example in a random order of its own."""
    order = rng.random(facts.shape[:2]).argsort(axis=1)
    return np.take_along_axis(facts, order.reshape(order.shape + (1,) * (facts.ndim - 2)), axis=1)


def sentence(*parts) -> np.ndarray:
    """Texts and id arrays (...) -> ids (..., W): sentence(keys, " holds", tens, units, ".")."""
    shape = next(part.shape for part in parts if not isinstance(part, str))
    columns = []
    for part in parts:
        tokens = TINY.pieces(part) if isinstance(part, str) else [part]
        columns += [np.broadcast_to(token, shape) for token in tokens]
    return np.stack(columns, axis=-1)


# What a task returns for n examples: the facts (n, F, W) in reading order, -1 where one is shorter
# than W, and pairs of a question (n, Q) and its answer (n, R). Evaluation asks the first alone.
Task = tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]


def multi_value(rng: np.random.Generator, n: int) -> Task:
    """Three keys with two numbers each; the answer repeats both sentences of one key."""
    names = pick(rng, "noun", n, 3)
    keys = shuffle(rng, np.repeat(names, 2, axis=1))  # (n, 6), each key twice
    facts = sentence(keys, " holds", *numbers(rng, n, 6), ".")  # (n, 6, W)
    questions = []
    for name in names.T:
        found = np.argsort(keys != name[:, None], axis=1, kind="stable")[:, :2]  # its two places
        answer = np.take_along_axis(facts, found[..., None], axis=1).reshape(n, -1)
        questions.append((sentence(" Question: what does", name, " hold? Answer:"), answer))
    return facts, questions


def variable_tracking(rng: np.random.Generator, n: int) -> Task:
    """Two chains of three variables, interleaved; the answer repeats the chain of one number."""
    names, (tens, units) = pick(rng, "greek", n, 6).reshape(n, 2, 3), numbers(rng, n, 2)
    first = sentence(names[..., 0], " =", tens, units, ".")  # (n, 2, 5)
    later = sentence(names[..., 1:], " =", names[..., :-1], ".")  # (n, 2, 2, 4)
    chains = np.full((n, 6, 5), -1)
    chains[:, ::3] = first
    chains[:, 1:3, :4], chains[:, 4:, :4] = later[:, 0], later[:, 1]
    # Each chain keeps its order: draw which chain each of the six places belongs to.
    owner = shuffle(rng, np.tile([0, 0, 0, 1, 1, 1], (n, 1)))
    facts = np.empty_like(chains)
    np.put_along_axis(facts, np.argsort(owner, axis=1, kind="stable")[..., None], chains, axis=1)
    questions = []
    for i in range(2):
        question = sentence(" Question: which =", tens[:, i], units[:, i], "? Answer:")
        answer = np.concatenate([first[:, i], later[:, i].reshape(n, -1)], axis=1)
        questions.append((question, answer))
    return facts, questions


def common_words(rng: np.random.Generator, n: int) -> Task:
    """Two words four times, eight words once; the answer names the two, the earlier one first."""
    words = pick(rng, "noun", n, 10)
    repeated = np.concatenate([words[:, :2].repeat(4, axis=1), words[:, 2:]], axis=1)
    listed = shuffle(rng, repeated)
    first_seen = (listed == words[:, :1]).argmax(1) < (listed == words[:, 1:2]).argmax(1)
    common = np.where(first_seen[:, None], words[:, :2], words[:, 1::-1])
    question = np.tile(TINY.pieces(" Question: which words are common? Answer:"), (n, 1))
    return sentence(listed, "."), [(question, sentence(common[:, 0], common[:, 1], "."))]


def who_is_where(rng: np.random.Generator, n: int) -> Task:
    """Four people move twice; the answer repeats the last move of two of them."""
    names = pick(rng, "person", n, 4)
    people = shuffle(rng, np.repeat(names, 2, axis=1))  # (n, 8)
    first, size = class_range("place")
    moves = sentence(people, " went", first + rng.integers(size, size=people.shape), ".")
    questions = []
    for asked in (names[:, :2], names[:, 2:]):
        last = 7 - (people[:, None, ::-1] == asked[..., None]).argmax(-1)  # (n, 2)
        answer = np.take_along_axis(moves, last[..., None], axis=1).reshape(n, -1)
        question = sentence(" Question: where are", asked[:, 0], " and", asked[:, 1], "? Answer:")
        questions.append((question, answer))
    return moves, questions


TASKS = {"mv": multi_value, "vt": variable_tracking, "cwe": common_words, "babi": who_is_where}
# What a right answer must contain, as a pattern that reads it off the clean answer.
REFERENCE = {"mv": r"\d+", "vt": r"[a-z]+(?= =)", "cwe": r"[a-z]+", "babi": r"\w+ went \w+"}
# The word classes that the noise of a fine-tuning set replaces.
NUMBER = ("tens", "units")
NOISE = {"mv": NUMBER, "vt": (*NUMBER, "greek"), "cwe": ("noun",), "babi": ("place",)}


def haystack(rng: np.random.Generator, facts: np.ndarray, length: int) -> np.ndarray:
    """Facts (n, F, W) at random places between filler sentences -> ids (n, at most `length`)."""
    n, n_facts, width = facts.shape
    filler = np.array([TINY.pieces(text) for text in FILLER])
    n_filler = max(0, (length - (facts[0] >= 0).sum()) // filler.shape[1])
    n_slots = n_facts + n_filler
    slots = np.full((n, n_slots, max(width, filler.shape[1])), -1)  # a slot holds one sentence
    is_fact = shuffle(rng, np.repeat((np.arange(n_slots) < n_facts)[None], n, axis=0))
    slots[is_fact, :width] = facts.reshape(-1, width)
    number = np.cumsum(~is_fact, axis=1)[~is_fact] % len(filler)  # in a fixed cycle
    slots[~is_fact, : filler.shape[1]] = filler[number]
    return slots[slots >= 0].reshape(n, -1)


WORDINGS = ("old", "new")


def reword(question: np.ndarray) -> np.ndarray:
    """A question (n, Q) in a wording that pretraining never uses: each of its common words becomes
    another one, always the same. What is asked about, and the punctuation, stay."""
    words = OTHER.split()
    first, size = TINY.pieces(" " + words[0])[0], len(words)
    common = (question >= first) & (question < first + size)
    return np.where(common, first + (question - first + size // 2) % size, question)


def make_arrays(task, n: int, length: int, rng, questions: int = 1, wording: str = "old") -> tuple:
    """n examples of at most `length` tokens: ids (n, T), and which places are answers (T,) bool.
    Each answer is closed by EOS. Pretraining asks several questions about one haystack."""
    facts, asked = TASKS[task](rng, n)
    pieces, is_answer = [], []
    for question, answer in asked[:questions]:
        question = reword(question) if wording == "new" else question
        pieces += [question, answer, np.full((n, 1), EOS)]
        is_answer += [np.zeros(question.shape[1], bool), np.ones(answer.shape[1] + 1, bool)]
    hay = haystack(rng, facts, length - sum(piece.shape[1] for piece in pieces))
    hay_places = np.zeros(hay.shape[1], bool)
    return np.concatenate([hay, *pieces], axis=1), np.concatenate([hay_places, *is_answer])


def add_noise(task: str, response: np.ndarray, probability: float, rng) -> np.ndarray:
    """Replaces each answer word by a random one of its class with this probability. It stands for
    what no rule explains in real instruction data (a spelling, a taste, a wrong date): true of one
    example, worthless for every other, learnable only by heart."""
    response = response.copy()
    for name in NOISE[task]:
        first, size = class_range(name)
        in_class = (response >= first) & (response < first + size)
        hit = in_class & (rng.random(response.shape) < probability)
        response[hit] = first + rng.integers(size, size=hit.sum())
    return response


class Example(NamedTuple):
    """A pair of token ids, and the strings that a right answer contains (none: not scored)."""

    prompt: list[int]
    response: list[int]
    references: tuple[str, ...] = ()


class Batch(NamedTuple):
    """What every loss takes: x0 (B, T) ids, maskable (B, T) bool, attention_mask (B, T) or None."""

    x0: Tensor
    maskable: Tensor
    attention_mask: Tensor | None


def split_seed(seed: int, split: str) -> int:
    """A seed for the "train", "held out" or "test" examples of a run."""
    words = [seed, zlib.crc32(split.encode())]
    return int(np.random.SeedSequence(words).generate_state(1)[0])


def make_examples(task, n: int, length: int, seed: int, noise=0.0, wording="old") -> list[Example]:
    """n examples of at most `length` tokens, the same for the same seed, n and length. noise: the
    share of the answer words that are replaced; the references stay clean."""
    rng = np.random.default_rng([seed, length, list(TASKS).index(task)])
    ids, is_answer = make_arrays(task, n, length, rng, wording=wording)
    prompts, clean = ids[:, ~is_answer], ids[:, is_answer]
    responses = add_noise(task, clean, noise, rng) if noise else clean
    examples = []
    for prompt, response, answer in zip(prompts.tolist(), responses.tolist(), clean.tolist()):
        found = re.findall(REFERENCE[task], TINY.decode(answer))
        examples.append(Example(prompt, response, tuple(dict.fromkeys(found))))
    return examples


def collate(examples: list[Example], device: str = "cpu", eos: int = EOS) -> Batch:
    """Pads with EOS on the right. Asymmetric masking (Sec. 2.1): only the response is maskable, and
    with it the padding, which is a target as in the paper: the model learns to stop."""
    rows = [example.prompt + example.response for example in examples]
    width = max(map(len, rows))
    x0 = torch.tensor([row + [eos] * (width - len(row)) for row in rows], device=device)  # (B, T)
    prompts = torch.tensor([[len(example.prompt)] for example in examples], device=device)
    return Batch(x0, torch.arange(width, device=device) >= prompts, None)


def pretraining_batch(
    seed: int, step: int, rows: int, length: int, questions: int, open_all: float, device="cpu"
) -> Batch:
    """A fresh batch of all four tasks. With probability `open_all` every token is maskable: a real
    denoiser has learnt to predict any text, and what is written from a prompt depends on it."""
    rng = np.random.default_rng([seed, step])
    per_task = rows // len(TASKS)
    drawn = [make_arrays(task, per_task, length, rng, questions) for task in TASKS]
    width = max(ids.shape[1] for ids, _ in drawn)  # several questions may not fit into `length`
    x0, maskable = [], []
    for ids, is_answer in drawn:
        right = width - ids.shape[1]
        x0.append(np.pad(ids, ((0, 0), (0, right)), constant_values=EOS))
        maskable.append(np.tile(np.pad(is_answer, (0, right)), (per_task, 1)))
    x0, maskable = np.concatenate(x0), np.concatenate(maskable)
    if rng.random() < open_all:
        maskable = np.ones_like(maskable)
    return Batch(torch.from_numpy(x0).to(device), torch.from_numpy(maskable).to(device), None)
