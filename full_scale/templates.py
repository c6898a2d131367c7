"""
templates.py: chat templates. A checkpoint brings a program in jinja2's language that writes a
conversation as the text its model knows. Here it runs as in Hugging Face's `transformers`, with the
same functions, filters and blocks; but it is foreign, so it gets a sandbox and limits.

Reading list: Hugging Face's "Chat templates"; jinja2's "Sandbox" and "Extensions".
"""

import contextlib
import functools
import json
import re
import sys
import time
from collections.abc import Collection, Iterator
from datetime import datetime

import jinja2.ext
import jinja2.sandbox

from model import UserError

SECONDS = 2  # of computing for one conversation; chat templates need about a thousandth of one
GIANT = 10_000_000  # what "*" and "**" may make: a number, or the length of a text or list
ADVICE = "mend it, or leave it out with --plain"


def escaped(text: str) -> str:
    """As it stands within a string of JSON."""
    return json.dumps(text)[1:-1]


def cover(
    texts: list[str], specials: Collection[str], template: str
) -> tuple[list[str], dict[str, str]]:
    """Hides from the template whatever in the user's texts could become part of a special string.

    Each character that begins or ends one, mostly "<" or ">", gives way to an unused private-use
    character. So none can be typed, nor lie half in the user's words and half in the template's
    ("<|mas" before "k|>"). The template may still trim, count, capitalise or escape a text. Returns
    the texts, and what is to be put back for what.
    """
    edges = sorted({token[0] for token in specials} | {token[-1] for token in specials})
    known = "\n".join([template, *texts])
    letters = map(chr, range(0xF0000, 0xFFFFE))
    unused = (one for one in letters if one not in known and escaped(one) not in known)
    stand_ins = {old: next(unused) for old in edges}
    originals = {new: old for old, new in stand_ins.items()}
    originals |= {escaped(new): escaped(old) for old, new in stand_ins.items()}
    return [text.translate(str.maketrans(stand_ins)) for text in texts], originals


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """jinja2's, which lets a template change or reach nothing; and no giants: "x" * 10**10."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context, operator: str, left, right):
        """Looks at the size of the result first, in floats, which takes no time."""
        sizes = [float(len(one) if hasattr(one, "__len__") else one) for one in (left, right)]
        if abs(self.binop_table[operator](*sizes)) > GIANT:
            raise OverflowError(f"{operator} makes more than {GIANT}")
        return super().call_binop(context, operator, left, right)


class Generation(jinja2.ext.Extension):
    """{% generation %}...{% endgeneration %} marks an assistant's words, and adds nothing."""

    tags = frozenset({"generation"})

    def parse(self, parser) -> jinja2.nodes.Node:
        """The words between the two, as a scope of their own."""
        line = next(parser.stream).lineno
        words = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(words, lineno=line)


def raise_exception(message: str):
    """How a template refuses a conversation."""
    raise jinja2.TemplateError(message)


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """As `transformers` has it: without the escapes for HTML of jinja2's own."""
    how = {"indent": indent, "separators": separators, "sort_keys": sort_keys}
    return json.dumps(value, ensure_ascii=ensure_ascii, **how)


@functools.lru_cache
def compiled(template: str) -> jinja2.Template:
    """The template as a program, in the environment that `transformers` gives it."""
    environment = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises a TimeoutError in the Python code inside once it has computed for so many seconds.

    Python calls a trace function before each line it runs; ours looks at the clock. Unlike a signal
    or a second process, this works on every system and in every thread. It ends loops and
    recursions of any kind, though not a single operation that takes forever: of these `Sandbox`
    refuses the worst, and `render` a giant text ('"x" | center(10000000000)' may use up memory).
    """
    deadline = time.thread_time() + seconds

    def look_at_the_clock(frame, event, argument):
        if time.thread_time() > deadline:
            raise TimeoutError(f"it was still running after {seconds} seconds")
        return look_at_the_clock

    tracer_before = sys.gettrace()  # a debugger's, or None
    sys.settrace(look_at_the_clock)
    try:
        yield
    finally:
        sys.settrace(tracer_before)


def render(template: str, texts: list[str], names: dict[str, str]) -> str:
    """A prompt up to where its answer begins, or, of two texts, a prompt with its answer. Any
    failure in there is the template's: a UserError."""
    messages = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), texts)]
    values = {"messages": messages, "tools": None, "documents": None}
    try:
        program = compiled(template)
        with time_limit(SECONDS):
            text = program.render(values, add_generation_prompt=len(texts) == 1, **names)
        if len(text) > GIANT + 10 * sum(map(len, texts)):
            raise OverflowError(f"it writes {len(text)} characters")
        return text
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"the backbone's chat template fails ({reason}): {ADVICE}.") from None


def render_pair(
    template: str, pair: list[str], names: dict[str, str], mark: re.Pattern
) -> tuple[str, str]:
    """A prompt up to its answer, and the same with the answer and the end of its turn. mark finds
    special tokens.

    Some templates (Llama 3's first one) open a further turn behind it, unasked, just as they opened
    this one. It is left out: a model shall not learn to go on.
    """
    opened, whole = (render(template, pair[:n], names) for n in (1, 2))
    behind_answer = whole.removeprefix(opened).lstrip().removeprefix(pair[1].strip())
    *_, behind_turn = mark.split(behind_answer, maxsplit=1)
    opening = behind_turn.lstrip()
    if opening and opened.endswith(opening):
        whole = whole.removesuffix(opening)
    return opened, whole
