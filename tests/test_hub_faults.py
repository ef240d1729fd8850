"""What if the Hub lets one wait, sends one in circles, or sends other bytes? One line, in time, and nothing is kept."""

from pathlib import Path

import pytest

from tests.conftest import RunWithHub
from tests.fake_hub import FakeHub

# The client's own waits take no time, and are told.
TIMED = (
    "import sys, time; from bincompress import cli; waits = []; time.sleep = waits.append\n"
    "import atexit; atexit.register(lambda: print('waits', max(waits, default=0)))\n"
    "sys.argv = ['bincompress', *sys.argv[1:]]; cli.main()"
)


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("waits", "too many requests"),
        pytest.param("circles", "redirect", marks=pytest.mark.slow),
        pytest.param("shortened", "the download broke off: ", marks=pytest.mark.slow),
        ("damaged", "came damaged, and was removed from the cache"),
        pytest.param("page", "came damaged", marks=pytest.mark.slow),
    ],
)
def test_a_hub_that_does_not_give_the_weights(
    hub: FakeHub, run_with_hub: RunWithHub, tmp_path: Path, mode: str, words: str
) -> None:
    hub.fault = mode
    done = run_with_hub(hub.server_port, "compress", "team/tiny", tmp_path / "store", code=TIMED)
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2
    assert len(told) == 1
    assert told[0].startswith("error: team/tiny: ")
    assert words in told[0]
    assert "Traceback" not in done.stderr
    assert float(done.stdout.split("waits ")[1]) <= 8
    assert not (tmp_path / "store").exists()
    hub.fault = ""
    done = run_with_hub(hub.server_port, "compress", "team/tiny", tmp_path / "store", code=TIMED)
    assert done.returncode == 0, done.stderr


def test_a_store_is_asked_for_once(run_with_hub: RunWithHub, hub: FakeHub) -> None:
    for port, mode, words in ((9, "", "could not be reached"), (hub.server_port, "waits", "too many requests")):
        hub.fault = mode
        done = run_with_hub(port, "inspect", "team/tiny", code=TIMED)
        assert (done.returncode, done.stdout) == (2, "waits 0\n")
        assert words in done.stderr
        assert done.stderr.startswith("error: team/tiny: ")
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", [("models",), ("compress", "team/tiny", "store")])
def test_a_user_without_a_home(run_with_hub: RunWithHub, hub: FakeHub, command: tuple[str, ...]) -> None:
    # As of a container whose user has no entry in /etc/passwd.
    code = (
        "import os, sys; from bincompress import cli; os.getuid = lambda: 54321\n"
        "for name in ('HOME', 'HF_HOME', 'XDG_CACHE_HOME'): os.environ.pop(name, None)\n"
        "sys.argv = ['bincompress', *sys.argv[1:]]; cli.main()"
    )
    done = run_with_hub(hub.server_port, *command, code=code)
    assert done.returncode == 2
    assert "this user has no home folder; set HOME" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr
