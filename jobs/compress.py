"""The entry for `ray job submit -- python -m jobs.compress SOURCE STORE ...`: bincompress compress, on that cluster."""

import sys

from bincompress.cli import main

if __name__ == "__main__":
    # Later options win, so whatever is given overrides these.
    sys.argv[1:1] = ["compress", "--runner", "ray"]
    main()
