"""Configurations for solo-learn's main_pretrain.py; Hydra's pkg:// finds them here."""
