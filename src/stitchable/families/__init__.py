"""Which models can be anchors, and how: the table of timm's classes, and families of your own."""
