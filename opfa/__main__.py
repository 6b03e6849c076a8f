"""`python -m opfa`, which is what launchers start on every rank."""

from opfa.commands.app import main

main()
