"""Plugins for training frameworks that prepare their data before a Trainer exists."""
