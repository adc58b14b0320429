"""Making the shipped tiny policies: a tokenizer, cloning from scripted players, export to GGUF.

    python -m cod_train.tiny clone --policy embedded --out DIR --seed 0
    python -m cod_train.tiny evaluate DIR
    python -m cod_train.tiny export DIR

Needs the extra `policy`.
"""
