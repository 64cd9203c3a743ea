"""One plug-in of each kind for danceopd, each in a file of its own (docs/plugins.md)."""
