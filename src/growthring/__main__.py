"""``python -m growthring`` is the command ``growthring``."""

from growthring.cli import main

main()
