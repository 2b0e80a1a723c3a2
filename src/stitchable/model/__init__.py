"""What travels to the Hub with every checkpoint: files that import only each other, torch, timm and transformers."""
