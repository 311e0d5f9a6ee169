"""Clues from questions: what well-formed replies give, and that no reply raises or runs."""

from __future__ import annotations

import builtins
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from vtoken.errors import ConfigError
from vtoken.video import Clue, CoTDecoupler, IdentityDecoupler, RuleDecoupler

QUESTION = "Which {red} shoe does the dog carry? A. left B. right"


def replying(*replies: str) -> Any:
    """A language model that gives these replies, and the prompts that it was given."""
    left, seen = list(replies), []

    def generate(prompt: str) -> str:
        seen.append(prompt)
        return left.pop(0)

    generate.seen = seen  # type: ignore[attr-defined]
    return generate


@pytest.mark.parametrize(
    ("reply", "items"),
    [
        ('Step 1: yes\nStep 2: ["dog", "left"]\nStep 3: ["dog"]', ("dog",)),
        ('step 1: YES.\nstep 2: []\nstep 3: ["dog", " red shoe ", "dog", "", "  "]', ("dog", "red shoe")),
        ("Step 1: Yes\nStep 2: ['a']\nStep 3: ['dog', \"cat's bowl\"]", ("dog", "cat's bowl")),
        ('(1) yes (2) ["x"] (3) ["dog"]', ("dog",)),
        ('1. Yes\n2. ["x"]\n3. ["dog", "shoe"]', ("dog", "shoe")),
        ('**Step 1**: yes\n\n**Step 2**: ["x"]\n\n**Step 3**:\n["dog",\n "shoe"]', ("dog", "shoe")),
        ('Sure! Step 1: Yes, things must be found. Step 2: ["x"] Step 3: ["dog"] Hope this helps!', ("dog",)),
        ('Step one: yes\nStep two: ["x"]\nStep three: ["dog"]', ("dog",)),
        ('Step 1: yes\nStep 3: ["dog", 3, null, ["cat"], {"a": "b"}, true]', ("dog",)),
        ('Step 1: yes\nStep 3: ["a ]b", "c"]', ("a ]b", "c")),
        ("Step 1: yes\nStep 3: ['a ]b', 'c [']", ("a ]b", "c [")),
        (
            'Step 1: yes\nStep 2: ["x"]\nStep 3: ["dög", "猫"]\n\nQuestion: next?\nStep 1: no\nStep 3: null',
            ("dög", "猫"),
        ),
        ("Step 1: yes\nStep 3: ('dog', ['cat'])", ("cat",)),
        ('Step-1: yes\nStep-2: ["x"]\nStep-3: ["dog"]', ("dog",)),
        ('Step - 1: yes\nStep - 2: ["x"]\n**Step-3**: ["dog"]', ("dog",)),
        ('Step 1: yes\nStep 2: ["x"]\nStep 3 (null if nothing is left): ["dog"]', ("dog",)),
        ('Step 1: yes\nStep 2: ["x"]\nStep 3: None of these is a place: ["dog"]', ("dog",)),
        ('Step 1: yes\nStep 2: ["x"]\nStep 3: what is left, none removed: ["dog"]', ("dog",)),
        ('Step 1: yes\nStep 3: ["dog", "\\ud800", "a\ud800", "\\ud83d\\ude00"]', ("dog", "\U0001f600")),
        ('Step 1: yes, 3 of them.\nStep 2: ["left"]\nStep 3: ["dog"]', ("dog",)),
    ],
)
def test_replies_with_objects(reply: str, items: tuple[str, ...]) -> None:
    decoupler = CoTDecoupler(replying(reply))
    assert decoupler.decouple(QUESTION) == Clue("objects", items, QUESTION)
    assert decoupler.last_reply == reply


@pytest.mark.parametrize(
    "reply",
    [
        'Step 1: no\nStep 2: null\nStep 3: ["dog"]',
        'Step 1: yes\nStep 2: ["x"]\nStep 3: null',
        'Step 1: yes\nStep 2: ["x"]\nStep 3: None, as ["x"] is no thing',
        'Step 1: yes\nStep 2: ["x"]\n**Step 3**: null.\n\nQuestion: next?\nStep 1: yes\nStep 3: ["cat"]',
        'Step-1: yes\nStep-2: ["x"]\nStep-3: null',
        'Step 1: yes\nStep 3: ["\\ud800"]',
        'Step 1: yes\nStep 2: ["x"]\nStep 3: []',
        'Step 1: yes\nStep 2: ["x"]',
        'Step 2: ["x"]\nStep 3: ["dog"]',
        'Step 1: perhaps\nStep 2: ["x"]\nStep 3: ["dog"]',
        "Step 1: yes\nStep 3: dog, shoe",
        "Step 1: yes\nStep 3: [dog, shoe]",
        'Step 1: yes\nStep 3: ["dog", "shoe"',
        "",
    ],
)
def test_replies_without(reply: str) -> None:
    assert CoTDecoupler(replying(reply)).decouple(QUESTION) == Clue("query", (), QUESTION)


def test_the_prompt_holds_the_question_and_three_examples() -> None:
    model = replying("Step 1: no", "none")
    CoTDecoupler(model).decouple(QUESTION)
    (prompt,) = model.seen
    assert prompt.count("Question: ") == 4
    assert prompt.rstrip().endswith(f"Question: {QUESTION}")
    examples = prompt.split("Question: ")[1:4]
    assert [block.split("Step 1: ")[1].split()[0] for block in examples] == ["yes", "yes", "no"]
    for block in examples[:2]:  # step 3 of the examples leaves things out
        wide, narrow = (json.loads(block.split(f"Step {n}: ")[1].splitlines()[0]) for n in (2, 3))
        assert set(narrow) < set(wide)
        read = CoTDecoupler(replying("Step 1:" + block.split("Step 1:")[1])).decouple("q")
        assert read.items == tuple(narrow)


def test_events() -> None:
    for reply in ("a dog carries a shoe", "Event: a dog carries a shoe.", '\n**Event:** "a dog carries a shoe"\nmore'):
        clue = CoTDecoupler(replying(reply), mode="event").decouple(QUESTION)
        assert clue == Clue("event", ("a dog carries a shoe",), QUESTION)
    for reply in ("null", "None.", "", " \n", "Event: null", "Event: a dog \ud800"):
        assert CoTDecoupler(replying(reply), mode="event").decouple(QUESTION) == Clue("query", (), QUESTION)
    model = replying("x")
    CoTDecoupler(model, mode="event").decouple(QUESTION)
    assert QUESTION in model.seen[0]
    with pytest.raises(ConfigError, match="unknown mode 'story'"):
        CoTDecoupler(model, mode="story")


def malformed(count: int, trap: Path) -> list[str]:
    """Replies that are broken, huge, deeply nested or code, most of them shaped so that a parser is reached."""
    write = f"open({str(trap)!r}, 'w').write('evaluated')"
    code = [
        write, f"[{write}]", f"['dog', {write}]", f"[*map(str, [{write}])]", f"[x for x in [{write}]]",
        f"[__import__('os').system('touch {trap}')]", f"[__import__('pathlib').Path({str(trap)!r}).touch()]",
        f"[(lambda: {write})()]", f"[f\"{{{write}}}\"]", f"['dog'] + [{write}]", f"[\"dog\"]; {write}",
        f"[eval({write!r})]", f"[exec({write!r})]", f"[(trap := {write})]", f"['a' if {write} else 'b']",
        f"[{{{write}: 1}}]", "[().__class__.__base__.__subclasses__()]", "[breakpoint()]", "[exit()]",
        "[1/0]", "[10**10**10]", "['a' * 10**12]",
    ]  # fmt: skip
    deep = [
        "[" * 100_000, "[" * 100_000 + "]" * 100_000, "[" * 15 + "'x'" + "]" * 15, "[" + "(" * 50_000, "[{" * 20_000,
        "[" + "-" * 3_900 + "1]", "[" + "not " * 900 + "1]", "[" + "~" * 3_990 + "1]", "[" + "1+" * 1_900 + "1]",
        "['" + "a" * 1_000_000 + "']", "[" + "1," * 100_000 + "]", "[" + "9" * 3_990 + "]", "[1e999999, -1e999999]",
        "[" + "lambda:" * 500 + "1]", "[" + "a." * 1_900 + "a]", "[" + "a if a else " * 300 + "a]",
    ]  # fmt: skip
    odd = [
        "[NaN, Infinity]", "[\x00]", "['\x00']", "['\ud800']", "['\\ud800']", "['\\N{nothing}']",
        "['\\x']", "[\"\\u12\"]", "]", "[", "][",
        "[b'dog']", "['dog' 'cat', u'x']", "[...]", "[None, True]", "{'dog'}", "{\"a\": [\"b\"]}", "[[[[]]]]",
        "['dog", "[\"dog]", "['dog',,]", "[,]", "[#]\n]", "['dog'\n#]\n]", "[\\", "['''dog]", "[\t\r\n\f\v]",
        "[\u2028'dog']", "[\u2018dog\u2019]", "\u3010\"dog\"\u3011", "[0x]",
        "[1_000, 0o9]", "[1j+'a']", "[-'a']", "[{}]", "[{**{}}]", "[*'dog']",
    ]  # fmt: skip
    bodies = [*code, *deep, *odd]
    replies = [f'Step 1: yes\nStep 2: ["x"]\nStep 3: {body}' for body in bodies]
    replies += [f"1) yes 2) {body} 3) {body}" for body in bodies[:30]] + bodies
    rng = random.Random(7)
    pieces = [
        "Step 1: yes",
        "Step 3:",
        "[",
        "]",
        "(",
        ")",
        "{",
        "}",
        "'",
        '"',
        ",",
        "dog",
        "\\",
        "\n",
        "null",
        "1",
        ":",
        *code,
    ]
    while len(replies) < count:
        replies.append("Step 1: yes Step 3: " + "".join(rng.choice(pieces) for _ in range(rng.randint(1, 30))))
    return replies


@pytest.mark.filterwarnings("ignore:invalid escape sequence")
def test_malformed_replies_raise_nothing_and_run_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trap = tmp_path / "trap"
    replies = malformed(600, trap)
    assert len(replies) >= 600
    for name in ("eval", "exec", "__import__", "breakpoint", "exit"):
        plain = getattr(builtins, name)

        def guarded(*args: Any, _plain: Any = plain, _name: str = name, **named: Any) -> Any:
            written = args and isinstance(args[0], str) and ("trap" in args[0] or args[0] in ("os", "pathlib"))
            assert _name == "__import__"
            assert not written, f"{_name}{args} was called"
            return _plain(*args, **named)

        monkeypatch.setattr(builtins, name, guarded)
    monkeypatch.setattr(os, "system", lambda command: pytest.fail(f"os.system({command!r})"))
    for mode in ("objects", "event"):
        for reply in replies:
            decoupler = CoTDecoupler(lambda prompt, reply=reply: reply, mode=mode)
            clue = decoupler.decouple(QUESTION)
            assert clue.text == QUESTION
            assert decoupler.last_reply == reply
            assert (clue.kind == "query") == (clue.items == ())
            assert all(isinstance(item, str) and item == item.strip() and item for item in clue.items)
            assert len(set(clue.items)) == len(clue.items)
    assert not trap.exists()


@pytest.mark.parametrize("reply", [None, 3, b"Step 1: yes", ["Step 1: yes"]])
def test_a_reply_that_is_no_text_is_no_clue(reply: Any) -> None:
    decoupler = CoTDecoupler(lambda prompt: reply)
    assert decoupler.decouple("q") == Clue("query", (), "q")
    assert decoupler.last_reply == ""


def test_errors_of_the_model_itself_are_not_hidden() -> None:
    def fails(prompt: str) -> str:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        CoTDecoupler(fails).decouple("q")


@pytest.mark.parametrize(
    ("question", "items"),
    [
        ("What does the man in the red shirt do after he opens the fridge?", ("man", "red shirt", "opens", "fridge")),
        ("At the end of the video, who picks up the red shoe? A. the cat B. the dog", ("picks", "red shoe")),
        ("How many people are visible?\n(A) 3\n(B) 4", ("people",)),
        ("Which of the following is the dog's bowl?", ("dog bowl",)),
        ("Where is a T-shirt, a T-shirt and an ice-cream?", ("t-shirt", "ice-cream")),
        ("Who is A. Smith?", ("smith",)),
        ("", ()),
        ("What happens at the end of this video?", ()),
        ("??? !!!", ()),
        ("A. x B. y", ()),
    ],
)
def test_rules(question: str, items: tuple[str, ...]) -> None:
    clue = RuleDecoupler().decouple(question)
    assert clue == Clue("objects" if items else "query", items, question)
    assert RuleDecoupler().decouple(question) == clue


def test_rules_take_any_text() -> None:
    rng = random.Random(2)
    for _ in range(500):
        question = "".join(
            chr(rng.choice([rng.randint(1, 127), rng.randint(128, 0x2FFF)])) for _ in range(rng.randint(0, 60))
        )
        clue = RuleDecoupler().decouple(question)
        assert clue.text == question
        assert all(item.strip() == item and item for item in clue.items)


def test_identity() -> None:
    assert IdentityDecoupler().decouple(QUESTION) == Clue("query", (), QUESTION)
