"""The command line of lm-evaluation-harness, to which the model `bincompress` is known."""

import sys


def main() -> None:
    """Run it; where the harness is not installed, say how to install it."""
    try:
        from lm_eval.__main__ import cli_evaluate

        import bincompress.lm_eval.model  # noqa: F401 (it registers the model)
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        print("error: lm_eval is not installed: pip install 'bincompress[lm-eval]'", file=sys.stderr)
        sys.exit(2)
    cli_evaluate()


if __name__ == "__main__":
    main()
