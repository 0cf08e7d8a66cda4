"""``python -m spheres`` is the ``sphere`` command."""

from spheres.cli import main

main()
