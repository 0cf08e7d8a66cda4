"""``python -m control`` is the ``control-cli`` command."""

from control.cli import main

main()
