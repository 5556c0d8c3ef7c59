"""Chat templates are somebody else's code: every fault is a ValueError, within time and memory."""

import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexijax.models import chat_template
from flexijax.models.chat_template import ChatPrompt, render
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.any_jax

MESSAGES = [{"role": "user", "content": "hi"}]
GROWING = "{% set ns = namespace(x='a', y=['a']) %}{% for i in range(100) %}STEP{% endfor %}"
HOSTILE = {
    "text times": "{{ 'a' * 20000000000 }}",
    "list times": "{{ [1] * 2000000000 }}",
    "loops in loops": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}"
    "{% endfor %}",
    "a long range": "{% for i in range(10**9) %}{% endfor %}",
    "a power": "{{ (10**9) ** (10**9) }}",
    "powers of digits": "{{ ('9' * 4000) | int ** 4000 }}",
    "digits": "{{ 10 ** 5000 }}",
    "filter center": "{{ 'x' | center(10**11) }}",
    "method center": "{{ 'x'.center(10**11) }}",
    "percent": "{{ '%100000000000d' % 1 }}",
    "format": "{{ '{:>100000000000}'.format(1) }}",
    "format of width": "{{ '%*d' | format(10**9, 1) }}",
    "doubled by tilde": GROWING.replace("STEP", "{% set ns.x = ns.x ~ ns.x %}"),
    "doubled by plus": GROWING.replace("STEP", "{% set ns.x = ns.x + ns.x %}"),
    "shared lists as JSON": GROWING.replace("STEP", "{% set ns.y = [ns.y, ns.y] %}")
    + "{{ ns.y | tojson }}",
    "shared lists as text": GROWING.replace("STEP", "{% set ns.y = [ns.y, ns.y] %}") + "{{ ns.y }}",
    "replace": "{% set a = 'a' * 100000 %}{{ a | replace('a', a) }}",
    "join": "{{ range(100000) | join('a' * 100000) }}",
    "indent": "{{ ('a\n' * 100000) | indent(100000) }}",
    "JSON indented": "{{ range(99999) | list | tojson(indent=100000) }}",
    "lipsum": "{{ lipsum(n=10**9) }}",
    "a macro of itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a macro twice itself": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}"
    "{% endmacro %}{{ f(100) }}",
    "wordwrap": "{{ ('a' * 10000000) | wordwrap(1) }}",
    "batch": "{{ [1] | batch(10**10, 0) | list }}",
    "slice": "{{ [1] | slice(10**10) | list }}",
    "sort": "{{ (range(99999) | list * 100) | sort }}",
    "sum of lists": "{{ ([[1] * 1000] * 100000) | sum(start=[]) }}",
    "translate": "{{ ('a' * 1000000).translate({97: 'b' * 1000000}) }}",
    "expandtabs": "{{ ('\t' * 1000).expandtabs(10**9) }}",
    "much output": "{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}",
    "in a generation block": "{% generation %}{{ 'a' * 20000000000 }}{% endgeneration %}",
    "a huge message": "{{ raise_exception('a' * 100000000) }}",
    "a long expression": "{{ " + "+".join(["1"] * 200000) + " }}",
    "parentheses": "{{ " + "(" * 100000 + ")" * 100000 + " }}",
    "ifs": "{% if 1 %}" * 5000 + "{% endif %}" * 5000,
    "lists in lists": "{{ " + "[" * 3000 + "]" * 3000 + " }}",
    "nots": "{{ " + "not " * 100000 + "1 }}",
    "recursive loop": "{% for i in range(3) recursive %}{{ loop(range(3)) }}{% endfor %}",
    "division": "{{ 1 / 0 }}",
    "types": "{{ messages + 1 }}",
    "an include": "{% include 'x' %}",
    "an import": "{% import 'x' as y %}",
    "a parent": "{% extends 'x' %}",
    "syntax": "{% if %}",
    "no such filter": "{{ 1 | nothing }}",
    "no such function": "{{ nothing() }}",
    "out of the sandbox": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "out of it by format": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "changing messages": "{{ messages.append(1) }}",
    "a time of the wrong kind": "{{ strftime_now(3) }}",
    "a private attribute": "{% set ns = namespace(_a=1) %}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_a_value_error(name):
    start = time.process_time() + _children_seconds()
    with pytest.raises(ValueError, match="chat template") as caught:
        render(HOSTILE[name], MESSAGES, {})
    chat_template._worker.stop()  # so that the time of its process is known
    assert time.process_time() + _children_seconds() - start < 3  # its start is in it
    assert len(str(caught.value)) < 700


def test_no_rendering_took_much_memory():
    """Of all the processes above the largest, in kilobytes, the interpreter's own 20 MB in it."""
    with pytest.raises(ValueError, match="more than 150 MB of memory"):
        render(HOSTILE["text times"], MESSAGES, {})
    made = _alone(
        f"""
        import resource
        for template in {[HOSTILE[n] for n in ("doubled by tilde", "much output", "replace")]}:
            try:
                render(template, [dict(role="user")], dict())
                raise SystemExit("rendered")
            except ValueError:
                _worker.stop()
        print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
        """
    )
    assert 20_000 < int(made) < 200_000


def _alone(code):
    """What a program of its own prints; without JAX, which starts slowly and has threads."""
    before = (
        "import sys, types\nsys.modules['flexijax'] = package = types.ModuleType('flexijax')\n"
        f"package.__path__ = [{str(REPOSITORY / 'flexijax')!r}]\n"
        "from flexijax.models.chat_template import _worker, render\n"
    )
    code = before + textwrap.dedent(code)
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return made.stdout


def _children_seconds():
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_after_a_hostile_template_the_next_one_is_rendered():
    for name in ("loops in loops", "text times", "division"):
        with pytest.raises(ValueError):
            render(HOSTILE[name], MESSAGES, {})
        assert render("{{ messages[0].content }}", MESSAGES, {}) == "hi"


def test_a_process_that_was_killed_is_replaced():
    assert render("a", MESSAGES, {}) == "a"
    process = chat_template._worker._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with pytest.raises(ValueError, match="could not be rendered"):
        render("a", MESSAGES, {})
    assert render("b", MESSAGES, {}) == "b"


def test_threads_share_the_process():
    made = {}

    def work(n):
        made[n] = [render("{{ messages[0].content }}" + str(n), MESSAGES, {}) for _ in range(20)]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == {n: [f"hi{n}"] * 20 for n in range(8)}


def test_a_forked_child_starts_its_own_process():
    """And leaves the parent's alone."""
    _alone(
        """
        import os
        messages = [dict(role="user", content="hi")]
        assert render("a", messages, {}) == "a"
        mine = _worker._process.pid
        child = os.fork()
        if child == 0:
            assert render("b", messages, {}) == "b" and _worker._process.pid != mine
            _worker.stop()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert render("c", messages, {}) == "c" and _worker._process.pid == mine
        """
    )


def test_long_messages_get_the_time_and_memory_they_need():
    long = "the quick brown fox " * 1_000_000
    made = render(
        "{% for m in messages %}{{ m.content | trim }}{% endfor %}",
        [{"role": "user", "content": long}],
        {},
    )
    assert made == long.strip()


PARTS = [
    *"{}%#-+*/|~()[].,'\" \n01ax",
    *("{{", "}}", "{%", "%}", "for ", " in ", "endfor", "messages", "if ", "endif", "set "),
    *("macro ", "loop", "tojson", "{{ messages", "{% for x in messages %}", "{% endfor %}"),
]


@settings(deadline=None, max_examples=300)
@given(st.lists(st.sampled_from(PARTS), max_size=30).map("".join))
def test_any_template_renders_or_is_refused(template):
    try:
        assert isinstance(render(template, MESSAGES, {}), ChatPrompt)
    except ValueError as error:
        assert "chat template" in str(error)


class Image:
    def save(self):
        raise AssertionError("a template called it")


@pytest.mark.parametrize(
    "messages, says",
    [
        ([], "at least one message"),
        ("hi", "must be a list of messages"),
        ({"role": "user"}, "must be a list of messages"),
        (["hi"], r"messages\[0\]='hi': must be a dict"),
        ([[MESSAGES]], r"messages\[0\]=.*must be a dict"),
    ],
)
def test_messages_of_the_wrong_kind_are_named(messages, says):
    with pytest.raises(ValueError, match=says):
        render("x", messages, {})


def test_messages_reach_the_template_as_plain_values():
    nested: list = []
    nested.append(nested)
    with pytest.raises(ValueError, match=r"messages\[0\]: nested deeper than 50"):
        render("x", [{"content": nested}], {})
    made = render(
        "{{ messages[0].image }}{{ messages[0].pair }}{{ messages[0].numbers }}",
        [{"image": Image(), "pair": (1, None), "numbers": {1: True}}],
        {},
    )
    assert made == "<Image>(1, None){1: True}"
    with pytest.raises(ValueError, match="refused"):
        render("{{ messages[0].image.save() }}", [{"image": Image()}], {})


def test_a_prompt_with_the_beginning_of_an_answer_is_a_prompt():
    prompt = render("{{ messages[0].content }}:", MESSAGES, {})
    assert isinstance(prompt + " Sure", ChatPrompt) and prompt + " Sure" == "hi: Sure"
