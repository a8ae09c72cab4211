"""Chat templates put together at random from whatever could do harm, and from pieces of real ones."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

import pytest

from coordinator.text import limits
from coordinator.text.chat_template import ChatTemplate
from protos.errors import InvalidArgument, ModelError
from tests.fuzz.campaign import fuzz, sent, watched
from tests.fuzz.mutation import mutate_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

ATOMS = """
    messages messages[0].content messages|length 'ab' '{}{0!r}{x.y}' '%s%9d' 0 1 -1 99999 10**9 1.5 none true [] {} ()
    ns.x ns.y loop loop.index m x self namespace range dict caller varargs kwargs cycler lipsum ''.__class__
    messages.__class__ [x] [x,x] (x,x) {x:x} {'a':x} x.items() range(99999) range(3) ('a'*99999) ('<!--'*9999)
    strftime_now('%Y') raise_exception namespace(x=x) dict(x=x) x.__globals__
""".split()
METHODS = """
    upper() split() split('a') strip('ab') rsplit('a',1) join([x,x]) replace('a',x) format(x,x) format_map({'x':x})
    center(99999) zfill(99999) expandtabs(9999) encode() translate({97:x}) items() keys() get('a') count(x) index(x)
    title() splitlines() rfind(x) startswith('a') to_bytes(9999,'big') append(x) update(x=x) pop() copy()
    as_integer_ratio() hex() casefold() partition('a') mro() __init__() __add__(x)
""".split()
FILTERS = """
    trim upper length list string tojson tojson(indent=9) join join(x) replace('a',x) sort unique map('upper')
    map(attribute='a') selectattr('a') select('eq',x) reject('in',x) groupby('a') dictsort items first last reverse int
    int(0,16) float round(2) round(-9999999) abs default(x) e forceescape safe indent(999) center(9999) title wordcount
    urlencode truncate(3) attr('__class__') format(x) random max min reject('none')
""".split()
OPERATORS = """
    + - * ** / // % ~ == != < in and or is
""".split()
TESTS = """
    defined string mapping iterable none sameas(x) in(x) eq(x) divisibleby(3) callable
""".split()


@pytest.fixture(autouse=True, scope="module")
def _short_time() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "MAX_SECONDS", 0.2)
        yield


def expression(random: Random, depth: int = 0) -> str:
    kind = random.randrange(8) if depth < 4 else 0
    if kind <= 1:
        return random.choice(ATOMS)
    inner = expression(random, depth + 1)
    if kind == 2:
        return f"({inner}).{random.choice(METHODS)}"
    if kind <= 4:
        return f"({inner})|{random.choice(FILTERS)}"
    if kind == 5:
        return f"({inner} is {random.choice(TESTS)})"
    if kind == 6:
        return f"({inner})[{random.choice(('0', '-1', ':', '::-1', '1:', repr('a'), expression(random, depth + 1)))}]"
    return f"({inner} {random.choice(OPERATORS[:-1])} {expression(random, depth + 1)})"


def statement(random: Random, depth: int = 0) -> str:
    one, body = (
        expression(random),
        "".join(statement(random, depth + 1) for _ in range(random.randrange(3))) if depth < 4 else "t",
    )
    return random.choice(
        (
            f"{{{{ {one} }}}}",
            f"{{{{ {one} }}}}",
            f"{{% set ns.x = {one} %}}",
            f"{{% set x = {one} %}}",
            "{% set ns.x = [ns.x, ns.x] %}",
            "{% set ns.y = ns.x ~ ns.x %}",
            f"{{% for m in {one} %}}{body}{{% endfor %}}",
            f"{{% for x, m in {one} recursive %}}{body}{{{{ loop(m) }}}}{{% endfor %}}",
            f"{{% for i in range(99999) %}}{body}{{% endfor %}}",
            f"{{% if {one} %}}{body}{{% endif %}}",
            f"{{% macro f(x) %}}{body}{{{{ f({one}) }}}}{{% endmacro %}}{{{{ f(x) }}}}",
            f"{{% set x %}}{body}{{% endset %}}",
            f"{{% filter {random.choice(FILTERS)} %}}{body}{{% endfilter %}}",
            f"{{% call namespace({one}) %}}{body}{{% endcall %}}",
            f"{{% generation %}}{body}{{% endgeneration %}}",
            f"{{% for m in {one} %}}{body}{{% if {expression(random)} %}}{{% break %}}{{% endif %}}{{% endfor %}}",
        )
    )


MESSAGES = [{"role": "user", "content": "a b <!-- 😀 " * 20}, {"role": "assistant", "content": [{"type": "text", "text": "x"}]}]


@fuzz(0.02)
def test_any_template_is_rendered_or_stopped(number: int) -> None:
    random = Random(number)
    statements = [statement(random) for _ in range(random.choice((1, 1, 2, 4)))]
    source = "{% set ns = namespace(x=[1], y='') %}{% set x = messages %}" + "".join(statements)
    if random.random() < 0.2:
        source = mutate_bytes(random, source.encode()).decode(errors="replace")
    with watched():
        try:
            template = ChatTemplate(source, {"bos_token": "<s>"})
        except ModelError as error:
            sent["template: no template"] += 1
            assert "\n" not in str(error)
            return
        try:
            text = template.render(MESSAGES, add_generation_prompt=True)
        except InvalidArgument as error:
            sent[f"template: {'stopped' if 'is stopped' in str(error) else 'refused'}"] += 1
            assert "\n" not in str(error)
        else:
            sent["template: rendered"] += 1
            assert "<class" not in text
            assert "<module" not in text
