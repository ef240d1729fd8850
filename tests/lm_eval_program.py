"""Runs lm-evaluation-harness on tasks of local files with several models, in a process of its own.

python lm_eval_program.py FOLDER '[[name, model_args], ...]': FOLDER has the tasks; results.json is written there.
"""

import json
import sys
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager

import bincompress.lm_eval.model  # noqa: F401 (it registers the model)


def main(folder: Path, models: list[tuple[str, str, list[str]]]) -> None:
    """Write each model's results and single answers."""
    found = []
    for name, arguments, tasks in models:
        manager = TaskManager(include_path=str(folder))
        result = lm_eval.simple_evaluate(
            model=name, model_args=arguments, tasks=tasks, task_manager=manager, batch_size=4, device="cpu",
            bootstrap_iters=0,
        )  # fmt: skip
        samples = {
            task: [sample["filtered_resps"] for sample in sorted(given, key=lambda sample: int(sample["doc_id"]))]
            for task, given in result["samples"].items()
        }
        found.append({"results": result["results"], "samples": samples})
    (folder / "results.json").write_text(json.dumps(found, default=str))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
