import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from coordinator.text import limits
from coordinator.text.chat_template import ChatTemplate
from protos.errors import InvalidArgument, ModelError

CHATML = """{% for message in messages %}
{% if loop.first and messages[0]['role'] != 'system' %}
<|im_start|>system
You are helpful<|im_end|>
{% endif %}
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\n' }}
{%- endif %}"""

LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}{%- set system_message = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\nToday Date: " + date_string + "\n\n" + system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}{{- raise_exception("only single tool-calls at once!") }}{%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '{"name": "' + call.name + '", "parameters": ' ~ call.arguments | tojson ~ "}<|eot_id|>" }}
    {%- else %}
        {{- message.content if message.content is string else message.content | tojson(indent=2) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"""

QWEN3 = """{%- if tools %}
    {{- '<|im_start|>system\n# Tools\n<tools>' }}
    {%- for tool in tools %}{{- "\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\n</tools><|im_end|>\n" }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and not message.content.startswith('<tool_response>') %}
        {%- set ns.multi_step_tool = false %}{%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- macro show(content) %}{{ content.split('</think>')[-1].lstrip('\n') }}{%- endmacro %}
{%- for message in messages %}
    {%- if message.role == "assistant" and '</think>' in message.content and not loop.last %}
        {{- '<|im_start|>assistant\n' + show(message.content) }}
    {%- elif loop.last or message.content %}
        {{- '<|im_start|>' + message.role + '\n' + message.content }}
    {%- endif %}
    {%- for tool_call in message.tool_calls or [] %}{{ '<tool_call>' ~ loop.index ~ tool_call.arguments|tojson }}{%- endfor %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}"""

MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}{%- set loop_messages = messages[1:] %}
{%- else %}{%- set loop_messages = messages %}{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (loop.index0 % 2 == 0) %}
        {{- raise_exception("conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\n\n" + message["content"] + "[/INST]" }}
        {%- else %}{{- "[INST] " + message["content"] + "[/INST]" }}{%- endif %}
    {%- else %}{% generation %}{{- " " + message["content"]|trim + eos_token}}{% endgeneration %}{%- endif %}
    {%- if loop.index > 40 %}{% break %}{% endif %}
{%- endfor %}
{{- user_messages|map(attribute="content")|join(",") }}"""

TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "qwen3": QWEN3, "mistral": MISTRAL}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"city": "Zürich <&>"}}, "arguments": {"ü": [1, None]}}
TOOL = {"type": "function", "function": {"name": "f", "description": "é", "parameters": {"type": "object"}}}

CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "hi <b>&amp; 'x' \"y\""}],
    [{"role": "system", "content": " be kind "}, {"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}],
    [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nb"},
        {"role": "user", "content": "🎉"},
    ],
    [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}],
    [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x", "tool_calls": [CALL, CALL]}],
    [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
    [{"role": "tool", "content": [{"type": "text", "text": "x"}]}],
    [{"role": "user"}],
    [],
]
ARGUMENTS: list[dict[str, Any]] = [
    {"add_generation_prompt": True},
    {"add_generation_prompt": False, "enable_thinking": False, "tools": [TOOL]},
    {"add_generation_prompt": True, "enable_thinking": False, "date_string": "1 Jan"},
]


def oracle(source: str, messages: list[dict[str, Any]], arguments: dict[str, Any]) -> str | None:
    """What transformers makes of it; None if it fails."""
    try:
        rendered, _ = render_jinja_template([messages], chat_template=source, **(SPECIAL | arguments))
    except Exception:  # noqa: BLE001
        return None
    return str(rendered[0])


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_prompts_equal_transformers(name: str, arguments: dict[str, Any]) -> None:
    template = ChatTemplate(TEMPLATES[name], SPECIAL)
    agreed = 0
    for messages in CHATS:
        wanted = oracle(TEMPLATES[name], messages, arguments)
        if wanted is None:
            with pytest.raises(InvalidArgument):
                template.render(messages, **arguments)
        else:
            assert template.render(messages, **arguments) == wanted
            agreed += 1
    assert agreed >= 3


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": TEXT})


@pytest.mark.parametrize("name", ["chatml", "qwen3", "mistral"])
@given(messages=st.lists(MESSAGE, max_size=6))
@settings(max_examples=60, deadline=None)
def test_any_messages_give_what_transformers_gives(name: str, messages: list[dict[str, Any]]) -> None:
    wanted = oracle(TEMPLATES[name], messages, {"add_generation_prompt": True})
    try:
        found: str | None = ChatTemplate(TEMPLATES[name], SPECIAL).render(messages, add_generation_prompt=True)
    except InvalidArgument:
        found = None
    assert found == wanted


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize("name", TEMPLATES)
@given(messages=st.lists(st.dictionaries(st.sampled_from(["role", "content", "tool_calls"]), JSON), max_size=3))
@settings(max_examples=60, deadline=None)
def test_messages_of_any_form_are_rendered_or_refused_in_one_line(name: str, messages: list[dict[str, Any]]) -> None:
    try:
        ChatTemplate(TEMPLATES[name], SPECIAL).render(messages, add_generation_prompt=True)
    except InvalidArgument as error:
        refusal = str(error)
    else:
        refusal = ""
    assert "\n" not in refusal
    assert len(refusal) < 500


@given(value=JSON)
@settings(max_examples=100, deadline=None)
def test_tojson_is_what_json_says(value: object) -> None:
    assert ChatTemplate("{{ messages[0].x | tojson }}", {}).render([{"x": value}]) == json.dumps(value, ensure_ascii=False)


def test_what_a_template_raises_is_the_requests_fault_and_says_why() -> None:
    with pytest.raises(InvalidArgument, match="refuses these messages: roles must alternate"):
        ChatTemplate("{{ raise_exception('roles\nmust alternate') }}", {}).render([])


def test_an_argument_overrules_a_special_token() -> None:
    arguments = {"bos_token": "X", "self_": "Y"}
    assert ChatTemplate("{{ bos_token }}{{ self_ }}", SPECIAL).render([], **arguments) == "XY"


def test_an_argument_cannot_replace_the_chat() -> None:
    with pytest.raises(InvalidArgument, match="messages"):
        ChatTemplate("x", {}).render([], messages=[])


@pytest.mark.parametrize("value", [object(), b"x", {"a": {1, 2}}, pytest])
def test_only_plain_values_reach_a_template(value: object) -> None:
    with pytest.raises(InvalidArgument, match="what JSON can hold"):
        ChatTemplate("x", {}).render([], tools=value)


def test_deeply_nested_messages_are_refused() -> None:
    content: object = "x"
    for _ in range(5000):
        content = [content]
    with pytest.raises(InvalidArgument, match="nested"):
        ChatTemplate("{{ messages|tojson }}", {}).render([{"role": "user", "content": content}])


@pytest.mark.parametrize(
    "source",
    [
        "{% for %}",
        "{{ x",
        "{% endfor %}",
        "{{ x|nofilter }}",
        "{% include 'x' %}{% if %}",
        "{{ " + "(" * 5000 + " }}",
        "{{ -" + "-" * 20000 + "1 }}",
    ],
)
def test_a_text_that_is_no_template_is_a_model_error(source: str) -> None:
    with pytest.raises(ModelError, match="chat template") as caught:
        ChatTemplate(source, {})
    assert "\n" not in str(caught.value)


ESCAPES = [
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.__class__ }}",
    "{{ (messages|attr('__class__')).x }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "{{ '{x.__class__.y}'.format_map({'x': 1}) }}",
    "{{ raise_exception.__globals__ }}{{ raise_exception.__globals__.x }}",
    "{{ namespace(__class__=1) }}",
    "{% set ns = namespace() %}{% set ns.__init__ = 1 %}",
    "{{ namespace.__init__.__globals__.x }}",
    "{{ dict.__base__.__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='x') }}",
    "{% set ns = namespace(x=[1]) %}{{ ns.x.append(2) }}",
    "{% include 'etc/passwd' %}",
    "{% import 'x' as y %}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ strftime_now.__globals__.json }}",
    "{{ ''.join.__self__.__class__ }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_a_template_cannot_get_out(source: str) -> None:
    try:
        text = ChatTemplate(source, {}).render([{"role": "user", "content": "x"}])
    except InvalidArgument:
        return
    # What jinja2 answers with nothing is as good as an error.
    assert not set("<[{") & set(text)


def test_a_template_of_endless_length_is_not_compiled() -> None:
    with pytest.raises(ModelError, match="chat template has 200000 characters, at most 131072 are read"):
        ChatTemplate("x" * 200_000, {})


# A list of a hundred lists whose text is of 2**99 characters.
TREE = "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{% set x = ns.x %}"

TWO_TREES = TREE + TREE.replace("set x =", "set y =")

BOMBS = [
    "{% for i in range(10**9) %}x{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(999) %}" + "x" * 1000 + "{% endfor %}{% endfor %}",
    "{{ 'a' * 10**10 }}",
    "{{ 10**10 * 'a' }}",
    "{{ ([messages] * 10**8)|length }}",
    "{{ 10**(10**10) }}",
    "{% set ns = namespace(x=3) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x='aa') %}{% for i in range(99) %}{% set ns.x = ns.x.replace('a', ns.x) %}{% endfor %}",
    "{% set ns = namespace(x='aa') %}{% for i in range(99) %}{% set ns.x = ns.x|replace('a', ns.x) %}{% endfor %}",
    "{% set ns = namespace(x='aa') %}{% for i in range(99) %}{% set ns.x = ns.x.join(ns.x) %}{% endfor %}",
    "{% set ns = namespace(x='aa') %}{% for i in range(99) %}{% set ns.x = [ns.x, 'x']|map('upper')|join(ns.x) %}{% endfor %}",
    *(TREE + use for use in ("{{ x }}", "{{ x|string|length }}", "{{ x|tojson|length }}", "{{ ('%s' % x)|length }}")),
    *(TREE + use for use in ("{{ '{}'.format(x)|length }}", "{{ (x ~ '')|length }}", "{{ [x, x]|join|length }}")),
    "{{ 'a'.center(10**10) }}",
    "{{ 'a'.ljust(width=10**10) }}",
    "{{ 'a'.zfill(10**10) }}",
    "{{ '\t'.expandtabs(10**10) }}",
    "{{ 'a'|center(10**10) }}",
    "{{ 'a\nb'|indent(10**10) }}",
    "{{ '%9999999999d' % 1 }}",
    "{{ '%*d' % (9999999999, 1) }}",
    "{{ '%9999999999d'|format(1) }}",
    "{{ '{:9999999999}'.format(1) }}",
    "{{ '{:{}}'.format(1, 9999999999) }}",
    "{{ [1]|tojson(indent=9999999999) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% macro f(x) %}{{ f(x) if x else '' }}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "{% set x %}{% for i in range(99999) %}{{ messages[0].content * 1000 }}{% endfor %}{% endset %}",
    "{{ lipsum(n=10**6) }}",
    *(TWO_TREES + use for use in ("{{ x == y }}", "{{ x in [y] }}", "{{ [x, y]|unique|list|length }}", "{{ x|upper|length }}")),
    *(TREE.replace("[", "(").replace("]", ",)") + use for use in ("{{ {x: 1}|length }}", "{{ x.count(1) }}")),
    (
        "{% set ns = namespace(x={}) %}{% for i in range(99) %}"
        "{% set ns.x = {1: ns.x.items(), 2: ns.x.items()} %}{% endfor %}{{ ns.x }}"
    ),
    (
        "{% set ns = namespace(x=[1]) %}{% macro f() %}{% set ns.x = varargs %}{% endmacro %}"
        "{% for i in range(99) %}{{ f(ns.x, ns.x) }}{% endfor %}{{ ns.x == 1 }}"
    ),
    "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = [ns.x] * 2 %}{% endfor %}{{ ns.x == 1 }}",
    "{% set ns = namespace(x={}) %}{% for i in range(99) %}{% set ns.x = dict(a=ns.x, b=ns.x) %}{% endfor %}{{ ns.x == 1 }}",
    "{{ 'a'.encode().ljust(10**10)|length }}",
    "{{ ('%9999999999d'.encode() % 1)|length }}",
    "{{ (5).to_bytes(10**10, 'big')|length }}",
    "{{ ('a' * 10000).translate({97: 'b' * 1000000})|length }}",
    "{{ ('a' * 4000000).strip('b' * 4000000 ~ 'a')|length }}",
    "{{ ('a' * 4000000).rfind('ab' ~ 'a' * 2000000) }}",
    "{{ (('<!---->' * 1000000)|safe).striptags()|length }}",
    "{{ 5|round(-10**9) }}",
    "{{ ('f' * 4000000)|int(0, 16) // 3 }}",
    "{{ range(20000)|list|tojson(separators=('x' * 1000000, ':'))|length }}",
    (
        "{% set ns = namespace(x=range(20000)|list) %}{% for i in range(900) %}{% set ns.x = [ns.x] %}{% endfor %}"
        "{{ ns.x|tojson(indent=60)|length }}"
    ),
    "{{ strftime_now('%9999999d' * 10000)|length }}",
]


@pytest.mark.parametrize("source", BOMBS)
def test_a_template_cannot_use_up_the_machine(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_SECONDS", 1.0)
    begin = time.monotonic()
    with pytest.raises(InvalidArgument, match="chat template"):
        ChatTemplate(source, {}).render([{"role": "user", "content": "x" * 1000}])
    assert time.monotonic() - begin < 5


def test_work_is_booked_for_each_rendering_anew() -> None:
    template = ChatTemplate("{% for i in range(10000) %}" + "x" * 1600 + "{% endfor %}", {})
    assert {len(template.render([])) for _ in range(5)} == {16_000_000}


def test_a_long_chat_is_no_bomb() -> None:
    messages = [{"role": "user" if number % 2 == 0 else "assistant", "content": "word " * 200} for number in range(2000)]
    assert len(ChatTemplate(QWEN3, {}).render(messages, add_generation_prompt=True)) > 2_000_000
