"""`python -m bincompress`."""

from bincompress.cli import main

main()
