"""The statistics of a model's inputs: `calibrate`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from bincompress.api.progress import OnCount, uncounted
from bincompress.calibration.collect import SAMPLES, choose_samples, run_in_threads
from bincompress.calibration.collect import calibrate as collect
from bincompress.calibration.expert_tokens import expert_tokens, few_tokens
from bincompress.calibration.statistics import Statistics
from bincompress.compression.text_only import language_model
from bincompress.errors import BincompressError
from bincompress.inference.load import usable_threads
from bincompress.model.checkpoint_source import checkpoint_config
from bincompress.sources.hub import open_source
from bincompress.sources.text import read_text


@dataclass(frozen=True)
class CalibrationResult:
    """What came of a calibration."""

    stats: str
    tokens: int
    inputs: dict[str, str]  # by matrix: the input that it reads
    experts: dict[int, list[int]] = field(default_factory=dict)  # by layer: the tokens that each expert saw
    remarks: tuple[str, ...] = ()  # which experts saw too few tokens


def calibrate(
    source: str | Path,
    stats: str,
    text: str | Path,
    *,
    samples: int = SAMPLES,
    context: int | None = None,
    runner: Literal["local", "ray"] = "local",
    threads: int | None = None,
    address: str | None = None,
    text_only: bool = False,
    overwrite: bool = False,
    progress: OnCount = uncounted,
) -> CalibrationResult:
    """Collect the statistics of what a model's linear layers read on a text, for error-compensated quantization.

    text: a UTF-8 file like what the model is for, and not the one that it is evaluated on. samples: windows spread
    evenly over it, of `context` tokens each (512, or as many as the model takes). text_only: for a `compress` that is
    text_only too. The same call resumes after the last completed layer of an interrupted one. Raises StoreError,
    CheckpointError, UnsupportedModelError, RecipeError or TensorError.
    """
    if runner == "local":
        if address is not None:
            raise BincompressError("--address is for --runner ray; the local runner takes --threads")
        run_layer = run_in_threads(threads or usable_threads())
    else:
        if threads is not None:
            raise BincompressError("--threads is for --runner local; on a cluster every part runs on one core")
        from bincompress.process.own_jobs import own_jobs

        run_layer = own_jobs("calibration").run_on_ray(address, stats)
    checkpoint = open_source(str(source))
    checkpoint = language_model(checkpoint) if text_only else checkpoint
    tokens = choose_samples(checkpoint, read_text(Path(text)), samples, context)
    found: Statistics = collect(checkpoint, tokens, stats, runner=run_layer, overwrite=overwrite, progress=progress)
    config = checkpoint_config(checkpoint)
    counts = expert_tokens(config, found)
    inputs = found.attributes["inputs"]
    return CalibrationResult(stats, int(tokens.size), inputs, counts, tuple(few_tokens(config, counts)))
