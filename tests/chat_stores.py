"""Stores of the demo model with a chat template."""

import shutil
from pathlib import Path

from bincompress import compress
from tests.conftest import DEMO_MODEL

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if enable_thinking %}Think.\n{% endif %}"
    "{% if forever %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{% endif %}answer:"
)


def make_store(folder: Path, groups: int = 4) -> Path:
    """Return a store of the demo model with a chat template."""
    shutil.copytree(DEMO_MODEL, folder / "model")
    (folder / "model" / "chat_template.jinja").write_text(TEMPLATE)
    compress(str(folder / "model"), str(folder / "store"), groups=groups, block=64)
    return folder / "store"
