"""Model families that are not timm's and that come with this code.

The package has none. A checkpoint of such models brings their files along, and this one, written anew, imports them, so
that they register what is in them.
"""

FAMILIES: tuple[type, ...] = ()
