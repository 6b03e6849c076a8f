"""`python -m opfa`, which is what launchers start on every rank."""

from opfa.cli import main

main()
