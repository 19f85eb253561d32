"""What the passes share: targets cut, blocks passed, work shared out. No pass is imported here."""
