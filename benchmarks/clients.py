"""Which versions of the clients and libraries that the server is tested with are installed here?

python -m benchmarks.clients
"""

from importlib.metadata import PackageNotFoundError, version

_PACKAGES = (
    "openai", "ollama", "lm_eval", "schemathesis", "llguidance", "starlette", "uvicorn", "prometheus-client",
)  # fmt: skip


def main() -> None:
    """Print a line for each."""
    for name in _PACKAGES:
        try:
            print(name, version(name))
        except PackageNotFoundError:
            print(name, "not installed")


if __name__ == "__main__":
    main()
