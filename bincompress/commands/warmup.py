"""bincompress warmup"""

from typing import Any

import click

from bincompress.commands.options import engine_options
from bincompress.commands.shared import decoding_announced, print_json


@click.command()
@click.argument("store", required=False)
@engine_options
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def command(store: str | None, as_json: bool, **options: Any) -> None:
    """Compile the kernels that run a model, so that its first token comes early: for images and first boots.

    With STORE exactly those that generate, chat, run, serve and evaluate use with that model and these options; without
    it those of the usual kind of store.

    \b
    Example:
      bincompress warmup ./store
    """
    from cpu_kernels.jit.compiler import announce
    from cpu_kernels.jit.kernel_cache import cache_folder

    compiled: list[str] = []
    with decoding_announced(), announce(compiled.append):
        from bincompress.inference.precompile import compile_for
        from bincompress.inference.warmup import first_token_kernels
        from bincompress.model.packed_linear import ActivationSettings

        if store is None:
            for kernel in first_token_kernels():
                kernel.compile()
        else:
            settings = ActivationSettings(int(options["activation_bits"]), options["activation_scale"])
            compile_for(
                store, options["threads"], settings, options["kernel"], options["memory"], int(options["kv_bits"])
            )
    folder = cache_folder()
    if as_json:
        print_json({"store": store, "compiled": sorted(set(compiled)), "folder": folder and str(folder)})
        return
    place = f"kept in {folder}" if folder else "not kept: there is no folder for them, see above"
    click.echo(f"{len(compiled)} kernels compiled here, {place}")
