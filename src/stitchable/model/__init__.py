"""The code that travels to the Hub with every checkpoint; its files import only each other, torch, timm and transformers."""
