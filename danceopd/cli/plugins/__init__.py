"""`danceopd plugins`: the parts by kind, those that are built in and those of installed packages. Read `listing.py`."""

from danceopd.cli.plugins.listing import plugins

__all__ = ["plugins"]
