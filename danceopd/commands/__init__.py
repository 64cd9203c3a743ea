"""Commands of the `danceopd` command line, one room each; `danceopd.cli` puts them together."""
