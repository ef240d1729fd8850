"""Training with PyTorch: `train`, planes and scales, and `distill`, coefficients."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from bincompress.api.compression import compress
from bincompress.api.progress import OnCount, uncounted
from bincompress.api.pytorch import torch_needed
from bincompress.errors import BincompressError
from bincompress.methods import of_planes
from bincompress.methods.declaration import Block
from bincompress.sources.hub import open_source
from bincompress.sources.text import read_text

if TYPE_CHECKING:
    from bincompress.distillation.independent import LayerRunner
    from bincompress.distillation.layer_run import OnLayers
    from bincompress.distillation.run import Distilled
    from bincompress.distillation.settings import DistillSettings, LayerSettings
    from bincompress.distillation.train import OnStep
    from bincompress.distillation.train_run import Trained


def distill(
    store: str,
    teacher: str | Path,
    out: str,
    *,
    text: str | Path | None = None,
    settings: "DistillSettings | None" = None,
    device: str = "auto",
    threads: int | None = None,
    checkpoint_every: int | None = None,
    work: Path | None = None,
    cached_logits: Path | None = None,
    overwrite: bool = False,
    on_step: "OnStep" = lambda progress: None,
    on_written: OnCount = uncounted,
) -> "Distilled":
    """Train the coefficients of a store against the model that it was made from, and write them to a new store.

    text: a UTF-8 file to train on; without one the teacher writes what is trained on (settings.written_tokens). The
    same call resumes from the last checkpoint of an interrupted one. device: "auto", "cpu" or "cuda". work: where
    checkpoints lie, every `checkpoint_every` steps, or by time; beside the store if not given. cached_logits: a folder
    that keeps the teacher's logits. Needs PyTorch: pip install 'bincompress[distill]'.
    Raises DistillError, StoreError, CheckpointError or UnsupportedModelError.
    """
    with torch_needed("distillation"):
        from bincompress.distillation.places import Places
        from bincompress.distillation.run import distill as run
    from bincompress.distillation.settings import DistillSettings

    content = read_text(Path(text)) if text is not None else None
    places = Places(device, threads, checkpoint_every, work, cached_logits)
    return run(
        store, open_source(str(teacher)), content, out, settings or DistillSettings(), places,
        overwrite=overwrite, on_step=on_step, on_written=on_written,
    )  # fmt: skip


def train(
    source: str | Path,
    store: str,
    text: str | Path,
    *,
    start: str | None = None,
    planes: Literal[1, 2] = 2,
    block: Block = 128,
    scale_bits: Literal[8, 16] | None = None,
    embeddings: Literal["keep", "4bit", "8bit"] = "keep",
    layers: "LayerSettings | None" = None,
    model: "DistillSettings | None" = None,
    runner: Literal["local", "ray"] = "local",
    address: str | None = None,
    device: str = "auto",
    threads: int | None = None,
    checkpoint_every: int | None = None,
    work: Path | None = None,
    overwrite: bool = False,
    on_layers: "OnLayers" = lambda done, total, line: None,
    on_step: "OnStep" = lambda progress: None,
    on_written: OnCount = uncounted,
) -> "Trained":
    """Train the planes and scales of a model's layers on a text, and write the result to a new store.

    start: the store to begin with; without one a store of `planes` planes with scales for each `block` columns and
    these embeddings is made from the source, without calibration. scale_bits: of the trained scales; None keeps the
    start's. layers: settings of the training layer after layer; model: of the whole model's training, which follows it
    where both are given. runner: who trains layers that read the unquantized model's (layers.inputs); "ray" trains them
    beside each other on a Ray cluster, at `address`, one of `threads` cores each (1 if not given), and on GPUs where it
    has them. The same call resumes an interrupted one. device, threads, checkpoint_every, work: as for
    `distill`. Needs PyTorch: pip install 'bincompress[distill]'.
    Raises DistillError, StoreError, CheckpointError, RecipeError or UnsupportedModelError.
    """
    with torch_needed("training"):
        from bincompress.distillation.places import START, Places
        from bincompress.distillation.train_run import train as run
    if layers is None and model is None:
        raise BincompressError("nothing to train: expected layers or model, or both")
    run_layers = _training_on_ray(layers, address) if runner == "ray" else None
    checkpoint = open_source(str(source))

    def make_start(folder: Path) -> str:
        made = str(folder / START)
        # The checkpoint's own place: a revision that moved meanwhile would be another model.
        compress(checkpoint.place, made, block=block, embeddings=embeddings, **of_planes(planes))
        return made

    places = Places(device, threads, checkpoint_every, work)
    return run(
        start, make_start, checkpoint, read_text(Path(text)), store, layers, model, scale_bits, places,
        overwrite=overwrite, run_layers=run_layers, on_layers=on_layers, on_step=on_step, on_written=on_written,
    )  # fmt: skip


def _training_on_ray(layers: "LayerSettings | None", address: str | None) -> "LayerRunner":
    if layers is None or layers.inputs != "unquantized":
        raise BincompressError(
            "--runner ray trains layers beside each other, and these read the trained layers before them; "
            "--layer-inputs unquantized makes them independent"
        )
    from bincompress.process.own_jobs import own_jobs

    runner: LayerRunner = own_jobs("training").run_on_ray(address)
    return runner
