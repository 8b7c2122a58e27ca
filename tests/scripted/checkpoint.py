"""A checkpoint without weights for scripted models: a tokenizer that knows every format's tokens, and its templates."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

CONTEXT = 200_000
SCRIPT = "script.json"
BEGIN, END = "<|im_start|>", "<|im_end|>"

SPECIAL = (
    "<|endoftext|>", BEGIN, END,
    "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>",
    "<|tool_calls_section_begin|>", "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>",
    "<|tool_calls_section_end|>", "<|python_tag|>",
)  # fmt: skip
SHOWN = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")

FRAME = """\
{%- set first = messages[0].content if messages[0].role == 'system' else '' %}
{%- if first or tools %}
    {{- '<|im_start|>system\\n' + first }}
    {%- if tools %}
        {{- '\\n\\n# Tools\\n\\nYou may call these functions:\\n<tools>' }}
        {%- for tool in tools %}{{ '\\n' }}{{ tool | tojson }}{% endfor %}
        {{- '\\n</tools>' }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'tool' %}
        {{- '<|im_start|>tool\\n<tool_response>\\n' }}{{ m.content }}{{ '\\n</tool_response><|im_end|>\\n' }}
    {%- elif not (loop.first and m.role == 'system') %}
        {{- '<|im_start|>' + m.role + '\\n' }}
        {%- if m.reasoning_content %}{{ '<think>\\n' }}{{ m.reasoning_content }}{{ '\\n</think>\\n\\n' }}{% endif %}
        {{- m.content or '' }}
        {%- for c in m.tool_calls or [] %}@CALL@{% endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""

CALLS = {
    "hermes": """\
        {{- '\\n' if m.content or not loop.first }}{{ '<tool_call>\\n{"name": "' }}{{ c.function.name }}
        {{- '", "arguments": ' }}{{ c.function.arguments | tojson }}{{ '}\\n</tool_call>' }}""",
    "qwen3_coder": """\
        {{- '\\n<tool_call>\\n<function=' }}{{ c.function.name }}{{ '>\\n' }}
        {%- for name, value in c.function.arguments | items %}{{ '<parameter=' }}{{ name }}{{ '>\\n' }}
        {{- value if value is string else value | tojson }}{{ '\\n</parameter>\\n' }}{% endfor %}
        {{- '</function>\\n</tool_call>' }}""",
    "deepseek_v3": """\
        {{- '<｜tool▁calls▁begin｜>' if loop.first else '\\n' }}{{ '<｜tool▁call▁begin｜>function<｜tool▁sep｜>' }}
        {{- c.function.name }}{{ '\\n```json\\n' }}{{ c.function.arguments | tojson }}
        {{- '\\n```<｜tool▁call▁end｜>' }}{{ '<｜tool▁calls▁end｜>' if loop.last }}""",
    "deepseek_v31": """\
        {{- '<｜tool▁calls▁begin｜>' if loop.first }}{{ '<｜tool▁call▁begin｜>' }}{{ c.function.name }}
        {{- '<｜tool▁sep｜>' }}{{ c.function.arguments | tojson }}{{ '<｜tool▁call▁end｜>' }}
        {{- '<｜tool▁calls▁end｜>' if loop.last }}""",
    "kimi_k2": """\
        {{- '<|tool_calls_section_begin|>' if loop.first }}{{ '<|tool_call_begin|>' }}{{ c.id }}
        {{- '<|tool_call_argument_begin|>' }}{{ c.function.arguments | tojson }}{{ '<|tool_call_end|>' }}
        {{- '<|tool_calls_section_end|>' if loop.last }}""",
    "llama3_json": """\
        {{- '<|python_tag|>' if loop.first else '; ' }}{{ '{"name": "' }}{{ c.function.name }}
        {{- '", "parameters": ' }}{{ c.function.arguments | tojson }}{{ '}' }}{# for ipython #}""",
}
"""How each format writes a call, by the name of its parser."""


def write_checkpoint(folder: Path, script: Path, call_format: str) -> None:
    """A folder that `tests.scripted.engine` serves: `script` is said in `call_format`."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "chat_template": chat_template(call_format),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": tokenizer.get_vocab_size(),
        "max_position_embeddings": CONTEXT,
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "eos_token_id": tokenizer.token_to_id(END),
    }
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copyfile(script, folder / SCRIPT)


def chat_template(call_format: str) -> str:
    """The template of a model that writes its calls in this format."""
    template = FRAME.replace("@CALL@", CALLS[call_format])
    if call_format.startswith("deepseek"):  # whose own templates show calls, but no tools
        template = template.replace("first or tools", "first").replace("if tools", "if false")
        template = template.replace("for tool in tools", "for tool in []")
    return template


@functools.cache
def make_tokenizer() -> Tokenizer:
    """A byte-level BPE of words and code of this project."""
    root = Path(__file__).resolve().parents[2]
    texts = [path.read_text() for pattern in ("docs/a*.md", "tests/e2e/*.py") for path in sorted(root.glob(pattern))]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=3000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in SHOWN])
    return tokenizer
