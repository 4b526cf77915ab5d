"""Chat templates in the manner of well-known models, and small pieces that each use one feature of templates."""

from __future__ import annotations

CHATML = """
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- 'You may call:\\n<tools>' }}
    {%- for tool in tools %}
        {{- '\\n' }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(searching=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- if ns.searching and message.role == 'user' and message.content is string %}
        {%- set ns.searching = false %}
        {%- set ns.last = (messages|length - 1) - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set thought = '' %}
        {%- if message.reasoning_content is string %}
            {%- set thought = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and thought %}
            {{- '<|im_start|>assistant\\n<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + content }}
        {%- endif %}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n{"name": "' ~ call.function.name ~ '", "arguments": ' }}
            {{- call.function.arguments if call.function.arguments is string else call.function.arguments|tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or loop.previtem.role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""

LLAMA_LIKE = """
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{% set date_string = strftime_now("%d %b %Y") %}{% endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}{{- "Environment: functions\\n" }}{%- endif %}
{{- "Today: " + date_string + "\\n\\n" + system_message + "<|eot_id|>" }}
{%- if tools is not none and messages | length != 0 %}
    {%- for t in tools %}{{- t | tojson(indent=4) + "\\n\\n" }}{%- endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}{{- raise_exception("one call at a time") }}{%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + "}<|eot_id|>" }}
    {%- elif message.content is mapping or message.content is iterable %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" + message.content | tojson + "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""

MISTRAL_LIKE = """
{%- if messages[0]["role"] == "system" %}
    {%- set preamble = messages[0]["content"] %}
    {%- set rest = messages[1:] %}
{%- else %}
    {%- set rest = messages %}
{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- set asked = rest | selectattr("role", "equalto", "user") | list %}
{%- for message in rest | rejectattr("role", "equalto", "tool") | rejectattr("tool_calls", "defined") %}
    {%- if (message["role"] == "user") != (loop.index0 % 2 == 0) %}
        {{- raise_exception("Roles must take turns, beginning with the user!") }}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in rest %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == asked[-1]) %}
            {{- "[TOOLS] [" }}
            {%- for tool in tools %}
                {%- for key, val in tool["function"].items() if key != "return" %}
                    {{- '"' + key + '": ' + (val | tojson) }}{%- if not loop.last %}{{- ", " }}{%- endif %}
                {%- endfor %}
            {%- endfor %}
            {{- "][/TOOLS]" }}
        {%- endif %}
        {%- if loop.last and preamble is defined %}
            {{- "[INST] " + preamble + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- else %}
        {{- raise_exception("Roles are user, assistant and system only!") }}
    {%- endif %}
{%- endfor %}
"""

DEEPSEEK_LIKE = """
{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}
{%- set ns = namespace(is_first=false, is_tool=false, system_prompt='', is_first_sp=true) %}
{%- for message in messages %}{%- if message['role'] == 'system' %}
{%- if ns.is_first_sp %}{% set ns.system_prompt = ns.system_prompt + message['content'] %}{% set ns.is_first_sp = false %}
{%- else %}{% set ns.system_prompt = ns.system_prompt + '\\n\\n' + message['content'] %}{%- endif %}
{%- endif %}{%- endfor -%}
{{ bos_token }}{{ ns.system_prompt }}
{%- for message in messages %}
{%- if message['role'] == 'user' %}{%- set ns.is_tool = false -%}{{'<|User|>' + message['content']}}{%- endif %}
{%- if message['role'] == 'assistant' and message['content'] is not none %}
{%- set content = message['content'] %}
{%- if '</think>' in content %}{%- set content = content.split('</think>')[-1] %}{%- endif %}
{{'<|Assistant|>' + content + '<|end|>'}}{%- endif %}
{%- if message['role'] == 'tool' %}{%- set ns.is_tool = true -%}
{{'<|tool_output|>' + message['content'] + '<|/tool_output|>'}}{%- endif %}
{%- endfor -%}
{% if add_generation_prompt and not ns.is_tool %}{{'<|Assistant|><think>\\n'}}{% endif %}
"""

HARMONY_LIKE = """
{%- macro param_type(spec) -%}
    {%- if spec.type == "array" -%}
        {%- if spec['items'] -%}{{ param_type(spec['items']) }}[]{%- else -%}any[]{%- endif -%}
    {%- elif spec.type is iterable and spec.type is not string -%}
        {{- spec.type | join(" | ") -}}
    {%- else -%}{{ spec.type or "any" }}{%- endif -%}
{%- endmacro -%}
{%- macro namespace_of(name, tools) -%}
    {{- "namespace " + name + " {\\n" }}
    {%- for tool in tools %}
        {%- set f = tool.function %}
        {{- "// " + f.description|default("no description", true) + "\\ntype " + f.name + " = (_: {\\n" }}
        {%- for key, spec in (f.parameters.properties or {}).items() %}
            {{- key ~ ("?" if key not in (f.parameters.required or [])) ~ ": " ~ param_type(spec) }}
            {%- if spec.default is defined %}{{- ", // default: " ~ spec.default|tojson }}{%- endif %}
            {{- ",\\n" }}
        {%- endfor %}
        {{- "}) => any;\\n" }}
    {%- endfor %}
    {{- "} // namespace " + name }}
{%- endmacro -%}
{{- "<|start|>system<|message|>Knowledge: " + (cutoff or "2024-06") + "\\nToday: " + strftime_now("%Y-%m-%d") }}
{{- "\\nReasoning: " + (reasoning_effort | default("medium")) + "<|end|>" }}
{%- if messages[0].role in ["developer", "system"] %}
    {%- set developer = messages[0].content %}{%- set loop_messages = messages[1:] %}
{%- else %}{%- set developer = "" %}{%- set loop_messages = messages %}{%- endif %}
{%- if developer or tools %}
    {{- "<|start|>developer<|message|>" + developer }}
    {%- if tools %}{{- "\\n\\n" + namespace_of("functions", tools) }}{%- endif %}
    {{- "<|end|>" }}
{%- endif %}
{%- set last = namespace(name=none) %}
{%- for message in loop_messages -%}
    {%- if message.role == 'assistant' -%}
        {%- if "tool_calls" in message -%}
            {%- for call in message.tool_calls %}{%- set last.name = call.function.name %}{%- endfor %}
            {{- "<|start|>assistant to=functions." + (last.name or "?") + "<|channel|>commentary<|call|>" }}
        {%- elif loop.last and not add_generation_prompt -%}
            {%- if message.thinking %}
                {{- "<|start|>assistant<|channel|>analysis<|message|>" + message.thinking }}
            {%- endif %}
            {%- generation -%}
            {{- "<|start|>assistant<|channel|>final<|message|>" + message.content + "<|return|>" }}
            {%- endgeneration -%}
        {%- else -%}
            {{- "<|start|>assistant<|channel|>final<|message|>" + message.content + "<|end|>" }}
        {%- endif -%}
    {%- elif message.role == 'tool' -%}
        {%- if last.name is none %}{{- raise_exception("no call came before") }}{%- endif %}
        {{- "<|start|>functions." + last.name + " to=assistant<|message|>" + message.content|tojson + "<|end|>" }}
    {%- else -%}
        {{- "<|start|>" + message.role + "<|message|>" + message.content + "<|end|>" }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|start|>assistant" -}}{%- endif -%}
"""

VISION_LIKE = """
{%- set image_count = namespace(value=0) %}
{%- macro show(content) %}
    {%- if content is string %}{{- content }}
    {%- else %}
        {%- for item in content %}
            {%- if 'image' in item or item.type == 'image' %}
                {%- set image_count.value = image_count.value + 1 %}
                {%- if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|image|>
            {%- elif 'text' in item %}{{- item.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
{%- endmacro %}
{%- for message in messages %}
    {{- '<|' ~ message.role ~ '|>' ~ show(message.content) ~ '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>{%- endif %}
"""

WHOLE = {
    "ChatML": CHATML,
    "Llama": LLAMA_LIKE,
    "Mistral": MISTRAL_LIKE,
    "DeepSeek": DEEPSEEK_LIKE,
    "harmony": HARMONY_LIKE,
    "vision": VISION_LIKE,
}

AROUND = (
    "{{ bos_token }}",
    "{% if tools is not none %}tools: {{ tools | tojson }}{% endif %}\n",
    "{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}",
    "{% if documents is not none %}documents: {{ documents | length }}{% endif %}",
    "{% for d in documents or [] %}[{{ loop.index }}] {{ d.title }}: {{ d['text'] }}\n{% endfor %}",
    "{{ tools is defined }} {{ documents is none }} {{ add_generation_prompt is defined }}",
    "{{ strftime_now('%d %B %Y') }}",
    "{{ date | default('no date') }}{{ mood }}",
    "{{ sep_token is defined }}{{ unk_token }}{{ image_token }}{{ pad_token }}",
    "{% if enable_thinking is defined and not enable_thinking %}<no_think>{% endif %}",
    "{{ {'b': 'é<&>', 'a': [1, 2.5, none, true]} | tojson }}",
    "{{ {'b': 'é', 'a': 1} | tojson(ensure_ascii=True, sort_keys=True) }}",
    "{{ {'b': 'é', 'a': [1]} | tojson(separators=(',', ':'), indent=1) }}",
    "{{ {'b': 1} | tojson(false, 4) }}",
    "{% set ns = namespace(n=0) %}{% for i in range(4) %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}",
    "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% elif i == 5 %}{% break %}{% endif %}{{ i }}{% endfor %}",
    "{{ dict(a=1, b=2).items() | list }}{{ dict.fromkeys(['x'], 0) }}",
    "{% set ns = namespace(_hidden=1) %}",
    "{% set ns = namespace() %}{% set ns._hidden = 1 %}",
    "{% set ns = namespace({'self': 1}, b=2) %}{{ ns.b }}",
    "{% macro twice(x, y='?') %}{{ x }}{{ x }}{{ y }}{% endmacro %}{{ twice('ab') }}{{ twice(1, y=2) }}",
    "{% macro around() %}<{{ caller('in') }}>{% endmacro %}{% call(x) around() %}{{ x }}{% endcall %}",
    "{% set block %}a {{ messages | length }} b{% endset %}{{ block | upper }}",
    "{% filter replace('a', 'o') %}banana{% endfilter %}",
    "{%- raw %}{{ raw }}{% endraw -%}\n",
    "   {# a note #}  text {#- another -#}  \n",
    "{{ messages | map(attribute='role') | join(', ') }}",
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
    "{{ (messages | last).role }}{{ messages[-1]['role'] }}{{ messages[0].get('name', 'nobody') }}",
    "{{ messages[0].no_such_thing }}",
    "{{ messages[0].no_such.thing }}",
    "{{ raise_exception('no') if messages | length > 3 }}",
    "{{ messages.append(1) }}",
    "{{ 'a' ~ 1 ~ none ~ true }}{{ 7 // 2 }}{{ 2 ** 5 }}{{ '%s-%d' % ('x', 3) }}{{ '{:>5}'.format('r') }}",
    "{{ 'a b'.split() }}{{ ' pad '.strip() }}{{ 'x'.startswith('x') }}{{ 'ab'[::-1] }}",
    "{{ 'abc' | first }}{{ [3, 1, 2] | sort | join }}{{ 'word word' | title | replace('W', 'w') }}",
    "{{ now }}{{ lipsum is defined }}{{ cycler('a', 'b').next() }}{{ joiner(',')() }}",
    "{{ '<b>' | e }}{{ '<b>' | safe }}{{ [1, 2] | string | length }}",
    "{% include 'other' %}",
    "{{ messages | tojson }}",
)

OF_A_MESSAGE = (
    "{{ message.content }}",
    "{{ message['content'] }}\n",
    "{{ message.content | trim }}",
    "{{ message['content'] + eos_token }}",
    "{{ message.role | upper }}: ",
    "<|{{ message.role }}|>{{- message.content -}}<|end|>\n",
    "  {% if message.role == 'assistant' %}\n{% generation %}{{ message.content }}{% endgeneration %}\n  {% endif %}",
    "{% generation %}{% set kept = 1 %}{{ message.content }}{% endgeneration %}{{ kept is defined }}",
    "{% if message.tool_calls is defined %}{{ message.tool_calls | tojson }}{% endif %}",
    "{{ message | tojson }}\n",
    "{{ message.keys() | list }}",
    "{% for key, value in message.items() %}{{ key }}={{ value }};{% endfor %}",
    "{{ message.reasoning_content }}{{ message.thinking }}{{ message.reasoning }}",
    "{% if message.reasoning_content is string %}<think>{{ message.reasoning_content }}</think>{% endif %}",
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}",
    "{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}",
    "{% set content = message.content %}{% for part in content %}{{ part['text'] }}{% endfor %}",
    "{{ message.content | map(attribute='text') | join('') }}",
    "{{ loop.index }}/{{ loop.length }}{{ ' last' if loop.last }}{{ loop.cycle('a', 'b') }}",
    "{% if loop.previtem is defined %}{{ loop.previtem.role }}{% endif %}{{ loop.changed(message.role) }}",
    "{% if message.name %}({{ message.name }}){% endif %}",
    "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('take turns') }}{% endif %}",
    "{% if message.role not in ['user', 'assistant', 'system'] %}{% continue %}{% endif %}",
    "{{ message.content.split('</think>')[-1] }}",
    "{{ message.content[:20] }}",
    "{{ 'é\\n' ~ message.content | length }}",
)
