"""Golden chat prompts: transformers' own rendering (Jinja2, sandboxed) of templates in the manner of common model families, and of the
one in the real GGUF. Where transformers raises an error, so must we: `refused` is then true."""

import argparse
import json
from pathlib import Path

import gguf
from transformers.utils.chat_template_utils import render_jinja_template

TEMPLATES = {
    # Llama 3: beginning-of-text once, trimmed content.
    "headers": (
        "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + message['role']"
        " + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token +"
        " content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n'"
        " }}{% endif %}"
    ),
    # Llama 2 and Mistral: the system message goes into the first turn, roles must alternate.
    "instructions": (
        "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}"
        "{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate user/assistant') }}"
        "{% endif %}{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\n' + system_message +"
        " '\n<</SYS>>\n\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}"
        "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
        "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    # Gemma: no system role, the assistant is called model.
    "turns": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for message in messages %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}"
        "{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
    ),
    # Qwen 2: a default system message, tools that nobody gave, whitespace control.
    "chatml": (
        "{%- if tools %}\n    {{- tools | tojson }}\n{%- else %}\n    {%- if messages[0]['role'] == 'system' %}\n"
        "        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}\n    {%- else %}\n"
        "        {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}\n    {%- endif %}\n{%- endif %}\n"
        "{%- for message in messages %}\n    {%- if (message.role == \"user\") or (message.role == \"system\" and not loop.first)"
        " or (message.role == \"assistant\" and not message.tool_calls) %}\n"
        "        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}\n    {%- endif %}\n{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n"
    ),
    # Zephyr: lines of its own for every tag, which only comes out right with trim_blocks and lstrip_blocks.
    "lines": (
        "{% for message in messages %}\n  {% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n"
        "  {% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
        "  {% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n  {% endif %}\n"
        "  {% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n  {% endif %}\n{% endfor %}\n"
    ),
    # SmolLM 3: marks around what the model is trained to say.
    "marked": (
        "{%- for message in messages -%}\n{{ '<' + message.role + '>' }}\n{%- if message.role == 'assistant' -%}\n"
        "  {% generation %}\n  {{ message.content }}{{ eos_token }}\n  {%- endgeneration %}\n{%- else %}\n"
        "{{ message.content }}\n{%- endif %}\n{% endfor %}"
    ),
    # What newer templates use of Python: methods of strings, a namespace, slices, tests, loop controls, a macro, JSON.
    "python": (
        "{% macro shout(text) %}{{ text.upper() }}!{% endmacro %}{% set ns = namespace(last=-1, users=0) %}"
        "{% for message in messages %}{% if message.role == 'user' %}{% set ns.last = loop.index0 %}{% set ns.users = ns.users + 1 %}"
        "{% endif %}{% endfor %}{% for message in messages[::-1] %}{% if message.role not in ['user', 'assistant'] %}{% continue %}"
        "{% endif %}{% if message.content is string and message.content.startswith('stop') %}{% break %}{% endif %}"
        "{{ loop.index }}/{{ messages|length }} {{ message.role.title() }}: {{ message.content.split('\n')[0].lstrip().replace('a', 'A') }}"
        " {{ message.content[:3] ~ '|' ~ message.content[-2:] }} {{ shout(message.role) }} {{ message.content | tojson }}"
        "{{ ' <' ~ message.nothing|default('none') ~ '>' }}{{ ' undefined' if message.nothing is not defined }}\n{% endfor %}"
        "last={{ ns.last }} users={{ ns.users }} {{ {'a': 1, 'b': [true, none, 'ü<&>\\'']} | tojson }} {{ [1, 2] | tojson(indent=2) }}"
        " {{ '%s-%d' | format('x', 3) }} {{ ['a', 'b'] | join(', ') }} {{ messages | map(attribute='role') | list | join('+') }}"
        " {{ messages | selectattr('role', 'equalto', 'user') | list | length }} {{ range(3) | list | last }} {{ 7 // 2 }} {{ 7 / 2 }}"
    ),
}

CHATS = {
    "one": [("user", "What is the capital of France?")],
    "system": [("system", "Be brief."), ("user", " Hello <b>&amp;</b> \"you\"\n")],
    "turns": [("user", "Hi"), ("assistant", "Hello!"), ("user", "grüße 🦀\nsecond line"), ("assistant", "stop it"), ("user", "a\tb")],
    "wrong": [("user", "one"), ("user", "two")],
    "empty": [("user", "")],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("golden", type=Path, help="folder; chat.json is written there")
    args = parser.parse_args()
    own = gguf.GGUFReader(args.gguf).fields["tokenizer.chat_template"].contents()
    templates, lines = {"smollm2": own} | TEMPLATES, []
    for template, text in templates.items():
        for chat, turns in CHATS.items():
            for prompted in (True, False):
                messages = [{"role": role, "content": content} for role, content in turns]
                row = {"template": template, "chat": chat, "messages": messages, "add_generation_prompt": prompted}
                try:
                    rendered, _ = render_jinja_template(
                        [messages], chat_template=text, add_generation_prompt=prompted, bos_token="<s>", eos_token="</s>"
                    )
                    row["rendered"] = rendered[0]
                except Exception as refused:
                    row["refused"] = str(refused)
                lines.append(json.dumps(row, ensure_ascii=False))
    head = json.dumps({"templates": templates}, ensure_ascii=False)[:-1]
    (args.golden / "chat.json").write_text(head + ', "chats": [\n' + ",\n".join(lines) + "\n]}\n")
    print(sum("refused" in line for line in lines), "of", len(lines), "refused")


if __name__ == "__main__":
    main()
