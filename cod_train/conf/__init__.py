"""Configs for `python -m cod_train.verl_main --config-name=NAME`, one file each; `base` has what they share. docs/training.md."""
