"""From a question about a video to a clue that can be looked for in one frame (docs/methods/quota.md 4).

Replies of a language model are parsed, never evaluated, and a reply that makes no sense is no error: the question
itself is the clue then.
"""

from __future__ import annotations

import ast
import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from vtoken.errors import ConfigError

KINDS = ("objects", "event", "query")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Clue:
    """What a scorer looks for in a frame.

    Args:
        kind: "objects" (any of `items`), "event" (the one in `items`), or "query" (whatever answers the question).
        items: names of things, or one phrase; empty for "query".
        text: the question as it was asked.

    Raises:
        ConfigError: for another kind, and for items or a text that are none.

    Example:
        >>> import vtoken
        >>> vtoken.video.Clue("objects", ("red shoe",), "Where is the red shoe?").items
        ('red shoe',)
    """

    kind: Literal["objects", "event", "query"]
    items: tuple[str, ...]
    text: str

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"Clue(kind={self.kind!r}): must be one of {', '.join(KINDS)}")
        if isinstance(self.items, str) or not all(isinstance(item, str) for item in self.items):
            raise ConfigError(f"Clue(items={self.items!r}): must be texts, a tuple of them")
        if not self.items and self.kind != "query":
            raise ConfigError(f"Clue({self.kind!r}, ()): needs items to look for; a bare question has kind 'query'")
        if not isinstance(self.text, str):
            raise ConfigError(f"Clue(text={self.text!r}): must be the question as it was asked")


class Decoupler(Protocol):
    """Anything that makes a clue of a question."""

    def decouple(self, query: str) -> Clue:
        """The clue in a question."""
        ...


class IdentityDecoupler:
    """The question itself is the clue.

    Example:
        >>> import vtoken
        >>> vtoken.video.IdentityDecoupler().decouple("Why does he laugh?").kind
        'query'
    """

    def decouple(self, query: str) -> Clue:
        """`Clue("query", (), query)`."""
        return Clue("query", (), query)


_OBJECTS_PROMPT = """\
You help to find the moments of a video that matter for a question. Work in three steps and write one line for each.
Step 1: To answer, must particular physical things be found in the picture? Write yes or no.
Step 2: If yes, list everything one could look for, as a JSON list of short names. If no, write null.
Step 3: Repeat that list without everything that is not a physical thing: places in the picture, mere colours, points
in time, the video itself, abstract notions. If nothing is left, write null.

Question: Which tool does the carpenter pick up first, at the left edge of the bench?
Step 1: yes
Step 2: ["carpenter", "tool", "bench", "left edge"]
Step 3: ["carpenter", "tool", "bench"]

Question: How many times is the yellow kite seen above the lighthouse during the video? A. once B. twice C. never
Step 1: yes
Step 2: ["yellow kite", "lighthouse", "sky", "number of times", "video"]
Step 3: ["yellow kite", "lighthouse", "sky"]

Question: What is the general mood of this film?
Step 1: no
Step 2: null
Step 3: null

Question: {query}
"""

_EVENT_PROMPT = """\
You help to find the moments of a video that matter for a question. Name the one event that a picture must show for the
question to be answered, in at most eight words, on one line, without answering. If there is no such event, write null.

Question: What does the girl do after she drops the ice cream? A. cries B. laughs
Event: a girl drops her ice cream

Question: Why does the crowd cheer near the end?
Event: a crowd is cheering

Question: What is the general mood of this film?
Event: null

Question: {query}
Event:"""


class CoTDecoupler:
    """Asks a language model, in three steps, which physical things a question is about.

    Args:
        generate: from a prompt to the model's reply; any language model (see `vtoken.video.text_generator`).
        mode: "objects", or "event" for a short phrase that says what must be seen.

    Attributes:
        last_reply: what the model said last, "" before the first call.

    Raises:
        ConfigError: if the mode is unknown, or `generate` is no function.

    Source: arXiv 2503.08689 section 3.2; prompt and examples are our own.

    Example:
        >>> from vtoken.video import CoTDecoupler
        >>> decoupler = CoTDecoupler(lambda prompt: 'Step 1: yes Step 2: ["cat", "joy"] Step 3: ["cat"]')
        >>> decoupler.decouple("What makes the cat happy?")
        Clue(kind='objects', items=('cat',), text='What makes the cat happy?')
    """

    def __init__(self, generate: Callable[[str], str], *, mode: str = "objects") -> None:
        if mode not in ("objects", "event"):
            raise ConfigError(f'unknown mode {mode!r}; supported: "objects", "event"')
        if not callable(generate):
            raise ConfigError(f"CoTDecoupler({generate!r}): must be a function from a prompt to a model's reply")
        self.generate, self.mode, self.last_reply = generate, mode, ""

    def prompt(self, query: str) -> str:
        """What the model is asked."""
        return (_OBJECTS_PROMPT if self.mode == "objects" else _EVENT_PROMPT).replace("{query}", query)

    def decouple(self, query: str) -> Clue:
        """The clue in the model's reply; the question itself if there is none in it."""
        reply = self.generate(self.prompt(query))
        self.last_reply = reply if isinstance(reply, str) else ""
        parse = parse_objects if self.mode == "objects" else parse_event
        items = parse(self.last_reply)
        if not items:
            _log.debug("no clue in the reply %.500r to the question %.500r", reply, query)
            return Clue("query", (), query)
        return Clue("objects" if self.mode == "objects" else "event", items, query)


def _step(number: int) -> re.Pattern[str]:
    """ "Step 1:", "Step-1:", "1.", "(1)", "**Step 1**:" and the like."""
    word = ("one", "two", "three")[number - 1]
    named, bare = rf"\bstep[ \t]*-?[ \t]*\(?(?:{number}|{word})\b", rf"(?:^|(?<=\s))\W{{0,3}}{number}[ \t]?[.:)]"
    return re.compile(f"{named}|{bare}", re.I | re.M)


_STEPS = {number: _step(number) for number in (1, 2, 3)}
# Right behind the mark and no part of a sentence such as "None of these is a place".
_NOTHING = re.compile(r"[^\w\[]*(?:null|none)\b(?![ \t]+\w)", re.I)
_SURROGATE = re.compile("[\\ud800-\\udfff]")  # no text: a tokenizer could not encode it
_LONGEST_LIST = 4000  # characters
_DEEPEST_LIST = 16  # brackets within brackets; far below what any parser's stack can take


def parse_objects(reply: str) -> tuple[str, ...]:
    """The list after step 3 of a reply whose step 1 says yes, without blanks and repetitions; empty for any other."""
    first = _STEPS[1].search(reply)
    if first is None:
        return ()
    second = _STEPS[2].search(reply, first.end())
    third = _STEPS[3].search(reply, (second or first).end())
    if third is None:
        return ()
    said = re.search(r"\b(yes|no)\b", reply[first.end() : (second or third).start()], re.I)
    if said is None or said[1].lower() != "yes":
        return ()
    rest = reply[third.end() :]
    start = rest.find("[")
    if start < 0 or _NOTHING.match(rest):
        return ()
    found = _literal_list(rest[start : start + _LONGEST_LIST])
    stripped = (item.strip() for item in found if isinstance(item, str))
    return tuple(dict.fromkeys(item for item in stripped if item and not _SURROGATE.search(item)))


def parse_event(reply: str) -> tuple[str, ...]:
    """The first line of a reply as a phrase, without label and quotes; empty if there is none."""
    for line in reply.splitlines():
        phrase = re.sub(r"^\W*event\W*:", "", line.strip(), flags=re.I).strip(" \t\"'`*.")
        if phrase:
            nothing = phrase.lower() in ("null", "none", "no") or _SURROGATE.search(phrase)
            return () if nothing else (phrase[:200].strip(),)
    return ()


def _literal_list(text: str) -> list[object]:
    """The list with which `text` begins, as JSON or as a Python literal; empty if it is neither."""
    ends = _closing(text)
    if ends is None:
        return []
    for read in (json.loads, ast.literal_eval):
        for end in ends:
            try:
                found = read(text[:end])
            except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
                continue
            return found if isinstance(found, list) else []
    return []


def _closing(text: str) -> list[int] | None:
    """Where the list may end: after its matching bracket, or after the first ones, as strings may hold brackets."""
    depth = 0
    matching: list[int] = []
    others: list[int] = []
    for place, sign in enumerate(text, 1):
        if sign not in "[]({})":
            continue
        depth += 1 if sign in "[({" else -1
        if depth > _DEEPEST_LIST:
            return None
        if sign == "]":
            (others if depth else matching).append(place)
    return (matching + others)[:8]


_STOP = frozenset(
    """
    a an the this that these those and or but nor so if then than as of in on at to from by with without for about into
    onto over under above below between among through across along around near beside behind front off out up down is
    are was were be been being am do does did done doing has have had having will would shall should can could may
    might must it its he him his she her hers they them their theirs we us our you your i me my mine one ones there here
    who whom whose which what when where why how many much often long not no yes any some all both each every either
    neither other another such same only just also too very more most less least few several own
    video videos frame frames clip clips film movie footage scene scenes shot shots image images picture pictures screen
    camera question answer answers option options following choose select correct best describe describes described
    according based shown show shows showing seen see visible appear appears appeared appearing happen happens happened
    happening occur occurs occurred occurring take takes place
    first second third last next final finally initially beginning begin begins start starts started end ends ended
    ending middle before after during while until since now later earlier early late once twice time times moment
    moments minute minutes hour hours point sequence order left right top bottom upper lower corner center centre edge
    """.split()  # noqa: SIM905
)


class RuleDecoupler:
    """Finds what a question is about without a model: what is left between function words, as phrases.

    Answer options go first, then words that say how, when or where in the picture rather than what. Deterministic;
    made for English.

    Example:
        >>> from vtoken.video import RuleDecoupler
        >>> RuleDecoupler().decouple("At the end of the video, who picks up the red shoe? A. the cat B. the dog").items
        ('picks', 'red shoe')
    """

    def decouple(self, query: str) -> Clue:
        """The phrases of the question; the question itself if there are none."""
        words: list[str] = []
        phrases: list[str] = []
        for word in [*re.findall(r"[^\W_]+(?:['\u2019-][^\W_]+)*|[^\w\s]", without_options(query).lower()), "."]:
            word = re.sub(r"['\u2019]s$", "", word)
            if word[0].isalnum() and word not in _STOP and len(word) > 1:
                words.append(word)
            elif words:
                phrases.append(" ".join(words))
                words = []
        items = tuple(dict.fromkeys(phrases))
        return Clue("objects", items, query) if items else Clue("query", (), query)


def without_options(query: str) -> str:
    """The question without answer options such as "A. red (B) blue", if there are at least two of them."""
    first = re.search(r"(?:^|(?<=\s))(?:\(A\)|A[.):])\s", query)
    if first is None or not re.search(r"\s(?:\(B\)|B[.):])\s", query[first.end() - 1 :]):
        return query
    return query[: first.start()]
