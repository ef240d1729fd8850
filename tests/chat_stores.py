"""Stores of the demo model with a chat template, and tools for one that takes them."""

import shutil
from pathlib import Path
from typing import Any

from bincompress import compress
from tests.conftest import DEMO_MODEL

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if enable_thinking %}Think.\n{% endif %}"
    "{% if forever %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{% endif %}answer:"
)
# Takes tools, and asks for calls in the form of Hermes and Qwen.
HERMES = (
    "{% if tools %}{% for t in tools %}{{ t.function.name }}\n{% endfor %}Write <tool_call></tool_call>.\n{% endif %}"
    "{% for m in messages %}{{ m['role'] if m.role != 'tool' else 'result' }}: {{ m.content }}"
    "{% for call in m.tool_calls or [] %}<{{ call.function.name }}{{ call.function.arguments | tojson }}>{% endfor %}\n"
    "{% endfor %}answer:"
)  # fmt: skip
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
OTHER: Any = {"type": "function", "function": {"name": "clock"}}


def make_store(folder: Path, groups: int = 4) -> Path:
    """Return a store of the demo model with a chat template."""
    shutil.copytree(DEMO_MODEL, folder / "model")
    (folder / "model" / "chat_template.jinja").write_text(TEMPLATE)
    compress(str(folder / "model"), str(folder / "store"), groups=groups, block=64)
    return folder / "store"
