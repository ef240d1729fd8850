"""The training loop: steps, judging on held-out text, checkpoints, and going on from one with the same result."""

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from bincompress.distillation.model import Predictions, Student
from bincompress.distillation.settings import DistillError, DistillSettings
from bincompress.distillation.teacher import Teacher
from bincompress.distillation.windows import Windows

_JUDGED_AT_ONCE = 4  # held-out windows
_SECONDS_BETWEEN = 30.0  # checkpoints
_TIMES_BETWEEN = 20  # as long as the last one took to write
_VECTORS = 0.3  # share of the learning rate, where planes are trained


@dataclass
class Progress:
    """How far a run is: all that a checkpoint holds beside parameters and optimizer."""

    step: int = 0
    losses: list[float] = field(default_factory=list)  # of every step
    judged: list[tuple[int, float]] = field(default_factory=list)  # steps done, held-out perplexity
    best_step: int = 0
    best_perplexity: float = math.inf
    rechosen: bool | None = None  # whether planes were chosen anew and kept
    stopped: str = ""  # why it ended before its last step


OnStep = Callable[[Progress], None]


class Training:
    """One distillation in progress."""

    def __init__(
        self,
        student: Student,
        teacher: Teacher,
        predictions: Predictions,
        windows: Windows,
        settings: DistillSettings,
        choose_planes: Callable[[Student], None] | None = None,
        keep_start: bool = False,
    ) -> None:
        """choose_planes: gives a student's matrices other planes, for its coefficients as they are.

        keep_start: whether the start is a result, where nothing was better.
        """
        self._keep_start = keep_start
        self.progress = Progress()
        self._student = student
        self._teacher = teacher
        self._predictions = predictions
        self._windows = windows
        self._settings = settings
        self._choose_planes = choose_planes
        self._parameters = [one for kind in student.parameters().values() for one in kind]
        self._optimizer = optimizer(student, settings.lr, settings.lr_planes, predictions.device)
        self._best = self._copied()

    def run(self, checkpoint: "Checkpoints | None" = None, on_step: OnStep = lambda progress: None) -> None:
        """Train to the last step, or until held-out text stops gaining; the student then has its best parameters.

        Raises DistillError where nothing was better than the start.
        """
        settings, progress = self._settings, self.progress
        if not progress.judged:
            self._judge()
        while progress.step < settings.steps and not progress.stopped:
            loss = self._step(progress.step)
            if not math.isfinite(loss):
                progress.stopped = f"the loss became {loss} at step {progress.step + 1}; try a smaller --lr"
                break
            progress.losses.append(loss)
            progress.step += 1
            if self._choose_planes is not None and progress.step == settings.steps // 2:
                self._try_planes(self._choose_planes)
            if progress.step % settings.evaluate_every == 0 or progress.step == settings.steps:
                self._judge()
            if checkpoint is not None and checkpoint.due(progress.step):
                checkpoint.write(self.state())
            on_step(progress)
        if not progress.best_step and not self._keep_start:
            why = progress.stopped or "try a smaller --lr, or more --steps"
            raise DistillError(f"training did not improve the held-out perplexity, so no store was written: {why}")
        self._restore(self._best)

    def state(self) -> dict[str, Any]:
        """Return everything that going on needs."""
        return {
            "progress": vars(self.progress),
            "now": self._copied(),
            "best": self._best,
            "optimizer": self._optimizer.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.progress = Progress(**state["progress"])
        self._restore(state["now"])
        self._best = state["best"]
        self._optimizer.load_state_dict(state["optimizer"])

    def _step(self, step: int) -> float:
        settings = self._settings
        set_rate(self._optimizer, rate(step, settings.warmup, settings.steps))
        numbers = self._windows.of_step(step, settings.batch)
        size = settings.batch // settings.accumulate
        weights = self._student.weights()
        loss = 0.0
        for start in range(0, settings.batch, size):
            part = numbers[start : start + size]
            ids = self._predictions.ids(self._windows.training[part])
            loss += self._predictions.learn(weights, ids, self._teacher.logits(part), settings.batch * ids.shape[1])
        if math.isfinite(loss):
            self._optimizer.zero_grad()
            self._student.backward(weights)
            self._optimizer.step()
        return loss

    def _perplexity(self) -> float:
        weights = {name: values.detach() for name, values in self._student.weights().items()}
        return perplexity(lambda ids: self._predictions.text_loss(weights, ids), self._predictions, self._windows)

    def _judge(self) -> None:
        """Measure on held-out text, keep the best, and stop where nothing has been gained for long."""
        progress, found = self.progress, self._perplexity()
        progress.judged.append((progress.step, found))
        if found < progress.best_perplexity:
            progress.best_step, progress.best_perplexity = progress.step, found
            self._best = self._copied()
        since = sum(1 for step, _ in progress.judged if step > progress.best_step)
        if since >= self._settings.patience and progress.step < self._settings.steps:
            progress.stopped = f"held-out perplexity has not fallen since step {progress.best_step}"

    def _try_planes(self, choose: Callable[[Student], None]) -> None:
        """Choose planes anew for the coefficients as they are; keep them where held-out text gains."""
        before, planes = self._perplexity(), self._copied()
        choose(self._student)
        self.progress.rechosen = self._perplexity() < before
        if not self.progress.rechosen:
            self._restore(planes)

    def _copied(self) -> dict[str, Any]:
        planes = {
            name: torch.from_numpy(matrix.planes.view("int64").copy())
            for name, matrix in self._student.matrices.items()
            if self._choose_planes is not None
        }
        return {"moved": [values.detach().clone() for values in self._parameters], "planes": planes}

    def _restore(self, saved: dict[str, Any]) -> None:
        with torch.no_grad():
            for values, found in zip(self._parameters, saved["moved"], strict=True):
                values.copy_(found)
        for name, planes in saved["planes"].items():
            self._student.matrices[name].set_planes(planes.cpu().numpy().view("uint64"), self._predictions.device)


def perplexity(loss: Callable[[torch.Tensor], float], predictions: Predictions, windows: Windows) -> float:
    """Return the perplexity on held-out windows, each from its second token; loss: the sum over some windows."""
    held = windows.held_out
    total = sum(
        loss(predictions.ids(held[start : start + _JUDGED_AT_ONCE])) for start in range(0, len(held), _JUDGED_AT_ONCE)
    )
    mean = total / (held.size - len(held))
    return math.exp(mean) if mean < 700 else math.inf


def optimizer(student: Student, lr: float, lr_planes: float, device: torch.device) -> torch.optim.Optimizer:
    """Return AdamW over what a student trains; lr: of coefficients and vectors, lr_planes: of latents."""
    found = student.parameters()
    latents = found["planes"]
    # Beside planes that move, vectors take smaller steps and the second moments forget sooner.
    shares = [(found["coefficients"], lr), (found["vectors"], lr * _VECTORS if latents else lr), (latents, lr_planes)]
    groups = [{"params": own, "lr": most, "most": most} for own, most in shares if own]
    betas = (0.9, 0.95 if latents else 0.99)
    return torch.optim.AdamW(groups, betas=betas, weight_decay=0.0, fused=device.type == "cuda" or bool(latents))


def set_rate(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Set the learning rates to a share of their greatest."""
    for group in optimizer.param_groups:
        group["lr"] = group["most"] * share


def rate(step: int, warmup: float, steps: int) -> float:
    """Return the share of the learning rate at a step: up in a straight line, then down along a cosine."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


class Checkpoints:
    """A run's checkpoint file, written every so many steps or by time, and what it was made with."""

    def __init__(
        self, path: Path, every: int | None, record: dict[str, Any], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """every: steps; None is by time: one takes some GB and seconds, and all of them at most a twentieth of the run.

        record: what has to be equal for a run to go on from it.
        """
        self._path = path
        self._every = every
        self._record = record
        self._clock = clock
        self._last = clock()
        self._took = 0.0

    def due(self, step: int) -> bool:
        """Return whether one is to be written after so many steps."""
        if self._every is None:
            return self._clock() - self._last >= max(_SECONDS_BETWEEN, _TIMES_BETWEEN * self._took)
        return self._every > 0 and step % self._every == 0

    def write(self, state: dict[str, Any]) -> None:
        """Replace the checkpoint; a crash leaves the one before."""
        begin = self._clock()
        self._write(state)
        self._last = self._clock()
        self._took = self._last - begin

    def _write(self, state: dict[str, Any]) -> None:
        partial = self._path.with_suffix(".partial")
        with writable(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"record": self._record, "state": state}, partial)
            os.replace(partial, self._path)

    def read(self, device: torch.device) -> dict[str, Any] | None:
        """Return the state to go on from, None if there is none; raises DistillError where another run wrote it."""
        if not self._path.exists():
            return None
        try:
            found = torch.load(self._path, map_location=device, weights_only=True)
            record, state = found["record"], found["state"]
        except Exception as error:  # a damaged file makes torch raise many kinds
            raise DistillError(
                f"{self._path}: not a readable checkpoint ({type(error).__name__}); --overwrite starts again"
            ) from None
        for key in sorted({*record, *self._record}):
            value = self._record.get(key)
            if record.get(key) != value:
                raise DistillError(
                    f"{self._path}: a run with other settings was interrupted here: {_named(key, record, value)}; "
                    "use the same settings to resume, or --overwrite to start again"
                )
        return dict(state)


def _named(key: str, record: dict[str, Any], value: Any) -> str:
    if key != "settings" or value is None:
        return f"its {key} was different"
    return DistillSettings(**value).difference(record.get(key, {}))


@contextlib.contextmanager
def writable(path: Path) -> Iterator[None]:
    """Name the file where a disk is full or not to be written to."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # PyTorch's are RuntimeErrors
        path.with_suffix(".partial").unlink(missing_ok=True)
        raise DistillError(f"{path}: cannot be written: {error}; free some space") from None
