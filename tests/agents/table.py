"""The agents that are run, each configured as its own documents say, with nothing changed in it."""

from __future__ import annotations

from dataclasses import dataclass, field

PROMPT = "The test of rate.py fails. Find the bug, fix it and run the test."


@dataclass(frozen=True)
class Model:
    """What an agent must know of a server: its address, the model's name, the context and the longest answer."""

    url: str
    name: str
    context: int
    output: int


@dataclass(frozen=True)
class Agent:
    """`command` starts it, with the prompt behind; `env` and `files` below its home folder are its configuration.

    `{url}`, `{model}`, `{context}` and `{output}` in any of them are those of a `Model`. `small` is a command that
    leaves out tools or instructions, for a model whose context is too small for them.
    """

    name: str
    command: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    small: tuple[str, ...] = ()

    def pointed_at(self, model: Model) -> Agent:
        """The same, configured for a server."""
        values = {"{url}": model.url, "{model}": model.name, "{context}": str(model.context)}
        values["{output}"] = str(model.output)

        def put(text: str) -> str:
            for name, value in values.items():
                text = text.replace(name, value)
            return text

        return Agent(
            self.name,
            tuple(put(word) for word in self.command),
            {name: put(value) for name, value in self.env.items()},
            {name: put(text) for name, text in self.files.items()},
            tuple(put(word) for word in self.small),
        )


CODEX = """\
model = "{model}"
model_provider = "tokenspeed"
model_context_window = {context}
check_for_update_on_startup = false

[model_providers.tokenspeed]
name = "TokenSpeed"
base_url = "{url}/v1"
wire_api = "responses"

[analytics]
enabled = false
"""

OPENCODE = """\
{
  "$schema": "https://opencode.ai/config.json",
  "model": "tokenspeed/{model}",
  "autoupdate": false,
  "share": "disabled",
  "provider": {
    "tokenspeed": {
      "npm": "@ai-sdk/openai-compatible",
      "name": "TokenSpeed",
      "options": {"baseURL": "{url}/v1", "apiKey": "none"},
      "models": {"{model}": {"limit": {"context": {context}, "output": {output}}}}
    }
  },
  "agent": {"plain": {"mode": "primary", "prompt": "Answer briefly.", "tools": {"*": false}}}
}
"""

QWEN = """\
{
  "security": {"auth": {"selectedType": "openai"}},
  "privacy": {"usageStatisticsEnabled": false},
  "telemetry": {"enabled": false},
  "general": {"enableAutoUpdate": false}
}
"""

AIDER = """\
- name: openai/{model}
  edit_format: diff
  extra_params:
    max_tokens: {output}
"""

AGENTS = (
    Agent(
        "codex",
        ("codex", "exec", "--sandbox", "danger-full-access"),
        files={".codex/config.toml": CODEX, ".codex/brief.md": "Answer briefly.\n"},
        small=(
            "codex", "exec", "--sandbox", "read-only", "-c", "features.multi_agent=false",
            "-c", 'model_instructions_file="../home/.codex/brief.md"',
        ),
    ),
    Agent(
        "claude-code",
        ("claude", "--allowedTools", "Bash,Edit,Read", "--print"),
        {
            "ANTHROPIC_BASE_URL": "{url}",
            "ANTHROPIC_AUTH_TOKEN": "none",
            "ANTHROPIC_MODEL": "{model}",
            "ANTHROPIC_DEFAULT_HAIKU_MODEL": "{model}",
            "CLAUDE_CODE_MAX_CONTEXT_TOKENS": "{context}",
            "CLAUDE_CODE_MAX_OUTPUT_TOKENS": "{output}",
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        },
        small=("claude", "--tools", "", "--system-prompt", "Answer briefly.", "--print"),
    ),
    Agent(
        "opencode",
        ("opencode", "run"),
        {
            "OPENCODE_DISABLE_AUTOUPDATE": "1",
            "OPENCODE_DISABLE_MODELS_FETCH": "1",
            "OPENCODE_DISABLE_LSP_DOWNLOAD": "1",
        },
        {".config/opencode/opencode.json": OPENCODE},
        ("opencode", "run", "--agent", "plain"),
    ),
    Agent(
        "qwen-code",
        ("qwen", "--yolo", "--prompt"),
        {
            "OPENAI_BASE_URL": "{url}/v1",
            "OPENAI_API_KEY": "none",
            "OPENAI_MODEL": "{model}",
            "QWEN_CODE_MAX_OUTPUT_TOKENS": "{output}",
        },
        {".qwen/settings.json": QWEN},
        ("qwen", "--bare", "--system-prompt", "Answer briefly.", "--prompt"),
    ),
    Agent(
        "aider",
        (
            "aider", "--model", "openai/{model}", "--yes-always", "--no-show-model-warnings",
            "--no-check-update", "--analytics-disable", "--auto-test",
            "--test-cmd", "python3 test_rate.py", "rate.py", "--message",
        ),
        {"OPENAI_API_BASE": "{url}/v1", "OPENAI_API_KEY": "none", "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
        {".aider.model.settings.yml": AIDER},
    ),
    Agent(
        "mini-swe-agent",
        (
            "mini", "--model", "openai/{model}", "--yolo", "--exit-immediately",
            "--config", "mini.yaml", "--config", "model.model_kwargs.api_base={url}/v1",
            "--config", "model.model_kwargs.max_tokens={output}", "--task",
        ),
        {
            "OPENAI_API_KEY": "none",
            "MSWEA_CONFIGURED": "true",
            "MSWEA_COST_TRACKING": "ignore_errors",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        },
    ),
)  # fmt: skip
